"""What the protocols show a network, and what of a config cannot be one."""

import numpy as np
import pytest

from dsnet_jax import cli
from dsnet_jax.config import default_config
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.protocols import NAMES, SINGLE_SCALE, Protocol, protocol_named

PAPER = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def config_with(**fields):
    config = default_config()
    config.evaluation.update(fields)
    return config


def test_the_default_config_gives_the_papers_protocols_and_windows_of_a_training_crop():
    found = {name: protocol_named(name, default_config()) for name in NAMES}
    assert found == {
        "ss": SINGLE_SCALE,
        "flip": Protocol("flip", (1.0,), flip=True),
        "ms_flip": Protocol("ms_flip", PAPER, flip=True),
        "slide": Protocol("slide", crop_hw=(512, 512), stride_hw=(342, 342)),
    }


def test_scales_and_windows_are_those_of_the_config():
    config = config_with(scales=(0.5, 2), slide_crop_hw=(96, 128), slide_stride_hw=(32, 40))
    assert protocol_named("ms_flip", config).scales == (0.5, 2.0)
    assert protocol_named("slide", config) == Protocol("slide", crop_hw=(96, 128), stride_hw=(32, 40))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("multi", {}, "'multi': one of ss, flip, ms_flip, slide is needed"),
        ("slide", {"slide_crop_hw": (96, 96), "slide_stride_hw": (96, 97)}, "would leave pixels out"),
    ],
)
def test_what_cannot_be_a_protocol_is_told(name, fields, message):
    with pytest.raises(InputError, match=message) as raised:
        protocol_named(name, config_with(**fields))
    assert raised.value.exit_code == 2


def test_the_command_line_offers_the_protocols_that_there_are(monkeypatch):
    given = []
    for command in ("evaluate", "predict"):
        monkeypatch.setitem(cli.COMMANDS, command, lambda options: given.append(options.protocol))
    for name in NAMES:
        assert cli.main(["evaluate", "--workdir=x", f"--protocol={name}"]) == 0
        assert cli.main(["predict", "--workdir=x", "--output=y", f"--protocol={name}", "image.png"]) == 0
    assert cli.main(["evaluate", "--workdir=x"]) == 0
    assert given == [name for name in NAMES for _ in range(2)] + ["ss"]
    assert cli.main(["evaluate", "--workdir=x", "--protocol=multi"]) == 2


def test_the_command_line_sets_fields_of_the_evaluation_and_no_others(monkeypatch, capsys):
    given = []
    for command in ("evaluate", "predict"):
        monkeypatch.setitem(cli.COMMANDS, command, given.append)
        field = "--config.evaluation.scales=(0.5,1.0)"
        assert cli.main([command, "--workdir=x", field]) == 0
        assert given.pop().config_flags == [field]
        for other in ("--config.seed=1", "--config=a.py"):
            assert cli.main([command, "--workdir=x", field, other]) == 2
            told = f"unknown argument '{other}' (the run's own config holds, but for --config.evaluation.FIELD=VALUE)"
            assert told in capsys.readouterr().err
        assert cli.main([command, "--workdir=x", field, "--sttep=3"]) == 2
        assert f"unknown argument '--sttep=3' (see dsnet {command} --help)" in capsys.readouterr().err


def test_a_field_with_spaces_is_not_taken_for_an_image(capsys):
    field = "--config.evaluation.scales=(0.5, 1.0)"
    for given in (["--output=y", field, "image.png"], ["--split=test", "--submission=s.tgz", field]):
        assert cli.main(["predict", "--workdir=x", *given]) == 2
        assert f"'{field}': leave out the spaces" in capsys.readouterr().err


def test_scaled_sizes_are_rounded_as_training_rounds_them():
    sizes_hw = np.stack([np.arange(1, 600), np.arange(600, 1199)], axis=1)
    scaled_hw = Protocol("ms_flip", PAPER, flip=True).scaled_hw(sizes_hw)
    assert scaled_hw.dtype == np.int32
    expected = [[scaled_size_hw(size, scale) for scale in PAPER] for size in sizes_hw.tolist()]
    np.testing.assert_array_equal(scaled_hw, expected)


def plain_starts(side, crop, stride):
    """As a loop over windows would find them."""
    starts = [0]
    while starts[-1] + crop < side:
        starts.append(min(starts[-1] + stride, side - crop))
    return starts


def test_as_many_windows_are_counted_as_a_loop_needs_and_as_many_pixels_as_they_show():
    protocol = Protocol("slide", crop_hw=(40, 50), stride_hw=(27, 50))
    sizes_hw = np.stack([np.arange(1, 200), np.arange(199, 0, -1)], axis=1)
    windows = [(len(plain_starts(h, 40, 27)), len(plain_starts(w, 50, 50))) for h, w in sizes_hw.tolist()]
    np.testing.assert_array_equal(protocol.windows_hw(sizes_hw), windows)
    expected = [
        rows * columns * min(40, h) * min(50, w) for (rows, columns), (h, w) in zip(windows, sizes_hw, strict=True)
    ]
    np.testing.assert_array_equal(protocol.pixels(sizes_hw), expected)
    assert protocol.pixels(np.array([64, 96]), 32) == 2 * 2 * 64 * 64


def test_pixels_of_scaled_images_are_counted_on_their_canvases():
    protocol = Protocol("ms_flip", (0.5, 1.5), flip=True)
    assert protocol.pixels(np.array([64, 96])) == 32 * 48 + 96 * 144
    assert protocol.pixels(np.array([64, 96]), 32) == 32 * 64 + 96 * 160
    assert protocol.enlargement == 2 * 1.5**2
