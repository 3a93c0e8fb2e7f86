"""A run's network as it is loaded, with fields of its evaluation from the command line."""

import pytest

from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.evaluate import evaluate_run
from dsnet_jax.evaluation.predict import predict_files
from dsnet_jax.evaluation.submit import predict_submission
from dsnet_jax.evaluation.trained import load_trained

FLAG = "--config.evaluation."


def test_fields_of_the_evaluation_may_differ_from_the_runs(random_run):
    before = load_trained(random_run).config
    flags = [f"{FLAG}scales=0.5,1", f"{FLAG}batch_size=3"]
    config = load_trained(random_run, config_flags=flags, fields=["scales", "batch_size"]).config
    assert (config.evaluation.scales, config.evaluation.batch_size) == ((0.5, 1), 3)
    config.evaluation.update(scales=before.evaluation.scales, batch_size=before.evaluation.batch_size)
    assert config == before == load_trained(random_run).config


@pytest.mark.parametrize(
    "flag, message",
    [
        (f"{FLAG}scale=(1.0,)", "config.evaluation has the fields batch_size, overlays, padded_share, scales, "),
        ("--config.seed=1", "config.evaluation has the fields"),
        (f"{FLAG}scales", "a value of the kind of (0.75, 1.0"),
        (f"{FLAG}scales=0.5", "a value of the kind of (0.75, 1.0"),
        (f"{FLAG}scales=(0.5,", "a value of the kind of (0.75, 1.0"),
        (f"{FLAG}batch_size=many", "a value of the kind of 8"),
    ],
)
def test_a_flag_that_is_wrong_is_told(random_run, flag, message):
    with pytest.raises(InputError) as raised:
        load_trained(random_run, config_flags=[flag], fields=["scales", "batch_size"])
    assert str(raised.value).startswith(f"{flag!r}: {message}") and raised.value.exit_code == 2


def test_values_are_checked_wherever_they_come_from(random_run):
    with pytest.raises(InputError, match=r"scales is \(0.75, -1\): 0.1 to 10 is needed") as raised:
        load_trained(random_run, config_flags=[f"{FLAG}scales=0.75,-1"], fields=["scales"])
    assert raised.value.exit_code == 2
    file = random_run / "config.json"
    file.write_text(file.read_text().replace('"overlays": 8', '"overlays": -1'))
    with pytest.raises(InputError, match=r"config\.json: config\.evaluation\.overlays is -1"):
        load_trained(random_run)


@pytest.mark.parametrize(
    "use, protocol, field, read",
    [
        (evaluate_run, "ss", "scales=0.5,1.0", "only batch_size, overlays, padded_share"),
        (evaluate_run, "slide", "scales=0.5,1.0", "only batch_size, overlays, padded_share, slide_crop_hw, slide_stri"),
        (evaluate_run, "ms_flip", "slide_crop_hw=(64,64)", "only batch_size, overlays, padded_share, scales"),
        (predict_files, "flip", "batch_size=2", "nothing of config.evaluation"),
        (predict_files, "ms_flip", "overlays=2", "only scales"),
        (predict_submission, "ss", "overlays=2", "only batch_size, padded_share"),
    ],
)
def test_a_field_that_would_not_be_read_is_refused(random_run, tmp_path, use, protocol, field, read):
    arguments = {
        evaluate_run: {},
        predict_files: {"step": None, "inputs": ["photo.png"], "output": tmp_path / "out"},
        predict_submission: {"step": None, "split": "val", "submission": tmp_path / "all.zip"},
    }
    with pytest.raises(InputError) as raised:
        use(random_run, **arguments[use], protocol=protocol, config_flags=[f"{FLAG}{field}"])
    assert str(raised.value).startswith(f"'{FLAG}{field}' is not read here, {read}")
    assert str(raised.value).endswith("leave it out, or give another --protocol")
