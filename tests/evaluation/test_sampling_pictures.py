"""`dsnet inspect points`: what is drawn, and for which images."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dsnet_jax import cli
from dsnet_jax.data.pipeline import Example
from dsnet_jax.evaluation import sampling_pictures, sampling_points
from dsnet_jax.evaluation.sampling_pictures import _draw_points
from dsnet_jax.evaluation.sampling_points import SampledPoints


def inspect_points(run, rooms, *flags):
    return cli.main(["inspect", "points", f"--workdir={run}", f"--root={rooms}", *map(str, flags)])


def test_pictures_of_some_images_and_figures_of_all_are_written(random_run, rooms, capsys):
    assert inspect_points(random_run, rooms, "--images=2", f"--baseline={random_run}") == 0
    folder = random_run / "sampling_points" / "val"
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.png",
        "figures.json",
        "room00.png",
        "room10.png",
    ]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["images"] == 11 and 0 < figures["mean_pixels"] < figures["largest_pixels"]
    assert figures["mean_pixels"] == pytest.approx(8 * figures["mean_cells"])
    printed = capsys.readouterr().out
    assert f"drawn into {folder}: room00, room10\n" in printed
    assert f" {figures['mean_pixels']:.2f} " in printed and f" {figures['largest_cells']:.3f} " in printed
    assert "rooms val, step 7" in printed
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 4 * 240 and picture.height > 2 * 240  # Image, truth, baseline, network, twice.


def test_images_and_positions_can_be_chosen_and_a_split_without_labels_be_drawn(random_run, rooms, tmp_path):
    flags = "--split=test", "--id=room01", "--position=3,60", "--position=20,8.5", f"--output={tmp_path / 'out'}"
    assert inspect_points(random_run, rooms, *flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures.json", "room01.png"]


def test_without_pictures_the_figures_are_written_and_computed_on_few_canvases(random_run, rooms, monkeypatch, capsys):
    config = json.loads((random_run / "config.json").read_text())
    config["evaluation"]["batch_size"] = 16
    (random_run / "config.json").write_text(json.dumps(config))
    seen = []
    original = sampling_points._offsets
    monkeypatch.setattr(sampling_points, "_offsets", lambda *given: seen.append(given[2].shape) or original(*given))
    assert inspect_points(random_run, rooms, "--images=0", f"--baseline={random_run}") == 0
    assert [path.name for path in (random_run / "sampling_points" / "val").iterdir()] == ["figures.json"]
    assert "val: nothing\n" in capsys.readouterr().out
    assert seen == [(16, 64, 64, 3)]  # All of one canvas, though some have one of their own that is smaller.


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(
    random_run, rooms, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sampling_pictures, "sampled_points", None)
    (tmp_path / "file").write_text("")
    assert inspect_points(random_run, rooms, f"--output={tmp_path / 'file'}") == 1
    assert "file cannot be written (Not a directory): give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--id=attic"], "split 'val' of rooms has no image 'attic': the first is 'room00'"),
        (["--position=50,3"], "the position 50,3 is not in room00, which has 40 x 56 pixels"),
        (["--images=-1"], "--images is -1"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_written(flags, message, random_run, rooms, capsys):
    assert inspect_points(random_run, rooms, *flags) != 0
    assert message in capsys.readouterr().err
    assert not (random_run / "sampling_points").exists()


def test_another_runs_classes_are_refused(random_run, rooms, capsys):
    file = random_run / "dataset.json"
    file.write_text(file.read_text().replace("lamp", "carpet"))
    assert inspect_points(random_run, rooms) == 1
    assert "was trained on other classes than rooms has now" in capsys.readouterr().err


def drawn(offsets, positions, label_hw=(32, 48), id_="street"):
    image = np.full((*label_hw, 3), 90, np.uint8)
    labels = np.zeros(label_hw, np.uint8)
    points = SampledPoints(offsets, (8.0, 8.0))
    return _draw_points(Example(0, id_, image, labels, label_hw), points, positions, labels)


def test_the_points_are_drawn_where_they_lie_and_those_outside_are_counted():
    offsets = np.zeros((4, 6, 9, 2), np.float32)
    offsets[1, 2] = (0.5, 1)
    offsets[1, 2, 0], offsets[1, 2, 8] = (0, -9), (6, 1)
    regular, predicted, lengths, _ = drawn(offsets, [(12, 20)]).axes
    grid = [(y, x) for y in (3.5, 11.5, 19.5) for x in (11.5, 19.5, 27.5)]
    moved = [(3.5, 11.5 - 72), *((y + 4, x + 8) for y, x in grid[1:8]), (19.5 + 48, 27.5 + 8)]
    for axes, expected in ((regular, grid), (predicted, moved)):
        _, points, ring = (collection.get_offsets() for collection in axes.collections)
        np.testing.assert_allclose(points[:, ::-1], expected)
        np.testing.assert_allclose(ring, [(19.5, 11.5)])
    assert regular.get_title() == "regular grid"
    assert predicted.get_title() == "predicted points, 2 outside the image"
    for axes in (regular, predicted, lengths):
        assert axes.get_xlim() == (-0.5, 47.5) and axes.get_ylim() == (31.5, -0.5)


def test_an_id_is_no_formula():
    figure = drawn(np.zeros((4, 6, 9, 2), np.float32), [(12, 20)], id_="$x^{$")
    figure.savefig(io.BytesIO())  # A formula would be put together here, and fail.
    assert figure.get_suptitle().startswith("$x^{$: offsets of ")


def test_the_map_has_a_cell_for_each_position_with_the_mean_of_its_points_in_pixels():
    offsets = np.zeros((4, 6, 9, 2), np.float32)
    offsets[3, 5, 2] = (3, 4)
    _, _, lengths, bar = drawn(offsets, [(12, 20)], (30, 45)).axes
    shown = lengths.images[0]
    expected = np.zeros((4, 6))
    expected[3, 5] = 5 * 8 / 9
    np.testing.assert_allclose(shown.get_array(), expected)
    assert shown.get_extent() == [-0.5, 47.5, 31.5, -0.5]  # Cells of 8 x 8, the last of which end outside the image.
    assert "pixels" in bar.get_ylabel()
