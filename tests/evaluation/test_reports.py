"""Results as files and as a table."""

import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import reports
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol
from dsnet_jax.evaluation.reports import console_table, markdown_table, summarise, write_results

SPEC = DatasetSpec("rooms", ("wall|door", "cha[i]r", "[b]lamp"), ((0, 0, 0), (200, 0, 0), (0, 200, 0)))
MATRIX = np.array([[60, 10, 0], [5, 25, 0], [0, 0, 0]], np.int64)
MS_FLIP = Protocol("ms_flip", (0.75, 1.0, 2.0), flip=True)
BOUNDARY = np.array([[8, 5, 0], [10, 20, 0], [18, 10, 0]], np.int64)  # 8 of 20, 5 of 25.


CONFIG = {"seed": 3, "data": {"image_scale": 1.0}}


def results_of(matrix=MATRIX, images=7, spec=SPEC, boundary=BOUNDARY, protocol=SINGLE_SCALE, config=CONFIG):
    return summarise(
        matrix,
        boundary,
        spec,
        split="val",
        images=images,
        padding=1,
        checkpoint_step=1200,
        config=config,
        protocol=protocol,
    )


def test_results_json_holds_every_figure_and_where_it_comes_from(tmp_path):
    write_results(tmp_path / "new" / "evaluation", results_of(), MATRIX)
    results = json.loads((tmp_path / "new" / "evaluation" / "results.json").read_text())
    assert results["miou"] == pytest.approx((60 / 75 + 25 / 40) / 2)
    assert results["boundary_miou"] == pytest.approx((8 / 20 + 5 / 25) / 2)
    assert results["mean_accuracy"] == pytest.approx((60 / 70 + 25 / 30) / 2)
    assert results["pixel_accuracy"] == pytest.approx(0.85)
    assert results["frequency_weighted_iou"] == pytest.approx(0.7 * 60 / 75 + 0.3 * 25 / 40)
    assert (results["dataset"], results["split"], results["protocol"]) == ("rooms", "val", "ss")
    assert (results["images"], results["padding_images"], results["pixels"]) == (7, 1, 100)
    assert (results["checkpoint_step"], results["config"]) == (1200, CONFIG)
    assert results["absent_classes"] == ["[b]lamp"] and results["classes_averaged"] == 2
    assert results["boundary_classes_averaged"] == 2 and results["benchmark_figures"] == []
    chair, lamp = results["classes"][1:]
    assert chair == {
        "name": "cha[i]r",
        "iou": 25 / 40,
        "boundary_iou": 5 / 25,
        "accuracy": 25 / 30,
        "true_pixels": 30,
        "predicted_pixels": 35,
    }
    nothing = {"iou": None, "boundary_iou": None, "accuracy": None, "true_pixels": 0, "predicted_pixels": 0}
    assert lamp == {"name": "[b]lamp", **nothing}


def test_the_matrix_can_be_read_back_with_its_class_names(tmp_path):
    write_results(tmp_path, results_of(), MATRIX)
    with (tmp_path / "confusion_matrix.csv").open(newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["true class", *SPEC.class_names] and [row[0] for row in rows] == list(SPEC.class_names)
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], np.int64), MATRIX)


def test_a_write_that_dies_leaves_the_results_before_it_whole(tmp_path, monkeypatch):
    write_results(tmp_path, results_of(), MATRIX)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    class FullDisk(type(reports.epath.Path(tmp_path))):
        def write_bytes(self, data):
            super().write_bytes(data[:20])
            raise OSError("no space left on device")

    monkeypatch.setattr(reports.epath, "Path", FullDisk)
    with pytest.raises(OSError, match="no space"):
        write_results(tmp_path, results_of(MATRIX * 2), MATRIX * 2)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_text() for name in before} == before
    write_results(tmp_path, results_of(MATRIX * 2), MATRIX * 2)
    assert (
        {path.name for path in tmp_path.iterdir()}
        == before.keys()
        == {
            "results.json",
            "confusion_matrix.csv",
            "table.md",
        }
    )


def test_an_evaluation_without_valid_pixels_is_refused():
    with pytest.raises(InputError, match="no valid pixel"):
        results_of(MATRIX * 0)


def test_the_markdown_table_has_a_row_for_each_class_and_names_the_absent_ones():
    page = markdown_table(results_of())
    assert "# rooms val: 71.25 % mIoU (ss)" in page
    assert "| wall\\|door | 80.00 | 40.00 | 85.71 | 70.00 |" in page and "| [b]lamp | – | – | – | 0.00 |" in page
    assert "| class | IoU % | boundary IoU % | accuracy % | true pixels % |\n|---|---:|---:|---:|---:|\n" in page
    assert "| mIoU | 71.25 |\n| mean boundary IoU | 30.00 |" in page
    assert "mean of 2 of 3 classes" in page and "are [b]lamp." in page
    assert "| pixel accuracy | 85.00 |" in page and "7 images, 100 valid pixels, weights of step 1,200" in page


def test_the_mean_of_all_classes_is_said_to_be_one():
    assert "mean of all 3 classes" in markdown_table(results_of(np.eye(3, dtype=np.int64)))


@pytest.mark.parametrize(
    "protocol, image_scale, seen",
    [
        (SINGLE_SCALE, 1.0, "each image, whole, at its own size"),
        (Protocol("flip", flip=True), 0.5, "each image and its mirror image, whole, at 0.5 of its own size"),
        (MS_FLIP, 1.0, "each image and its mirror image, whole, at 0.75, 1, 2 times its own size"),
        (MS_FLIP, 0.5, "each image and its mirror image, whole, at 0.75, 1, 2 times 0.5 of its own size"),
        (
            Protocol("slide", crop_hw=(96, 128), stride_hw=(64, 86)),
            1.0,
            "each image at its own size, through windows of 96 x 128 pixels (height x width) every 64 x 86 pixels",
        ),
    ],
)
def test_results_and_tables_name_the_protocol_and_say_what_it_is(protocol, image_scale, seen):
    results = results_of(protocol=protocol, config={"data": {"image_scale": image_scale}})
    console = Console(width=300, file=(output := io.StringIO()))
    console.print(console_table(results))
    assert (results["protocol"], results["seen"]) == (protocol.name, seen)
    for text in (markdown_table(results), output.getvalue()):
        assert f"mIoU ({protocol.name})" in text and f"Protocol {protocol.name}: {seen}." in text


def test_where_other_classes_have_outlines_than_are_averaged_it_is_said():
    page = markdown_table(results_of(boundary=BOUNDARY * [[1, 0, 0]]))
    assert "| cha[i]r | 62.50 | – | 83.33 | 30.00 |" in page and "| mean boundary IoU | 40.00 |" in page
    assert page.endswith("are [b]lamp. That of the boundary IoU is of 1, which have outlines.\n")
    without = results_of(boundary=BOUNDARY * 0)
    assert without["boundary_miou"] is None and "| mean boundary IoU | – |" in markdown_table(without)


def test_a_benchmarks_own_figures_stand_beside_the_miou_in_every_form(tmp_path):
    spec = DatasetSpec("ade20k", SPEC.class_names, SPEC.palette)
    results = results_of(spec=spec)
    (figure,) = results["benchmark_figures"]
    assert (figure["name"], figure["value"]) == ("ADE20K score", pytest.approx((0.85 + 0.7125) / 2))
    write_results(tmp_path, results, MATRIX)
    line = "| ADE20K score | 78.12 | mean of pixel accuracy and mIoU, over labelled pixels |"
    assert line in (tmp_path / "table.md").read_text()
    console = Console(width=200, file=(output := io.StringIO()))
    console.print(console_table(results))
    assert "ADE20K score: 78.12 % (mean of pixel accuracy" in output.getvalue()


def test_a_figure_that_does_not_exist_is_null_and_says_why(tmp_path):
    results = results_of(spec=DatasetSpec("pascal_context", SPEC.class_names, SPEC.palette))
    write_results(tmp_path, results, MATRIX)
    read = json.loads((tmp_path / "results.json").read_text())["benchmark_figures"]
    assert [figure["value"] is None for figure in read] == [False, True, False]
    assert "| mIoU, 60 classes | – | none: it needs a network trained with background" in markdown_table(results)


def test_the_console_table_shows_scores_and_names_as_they_are():
    console = Console(width=100, file=(output := io.StringIO()))
    console.print(console_table(results_of()))
    text = output.getvalue()
    assert "rooms val: 71.25 % mIoU (ss)" in text and "cha[i]r" in text and "62.50" in text
    assert "not counted: 1." in text and "are [b]lamp" in text
    mean, by_frequency = (next(line for line in text.splitlines() if name in line) for name in ("mean  ", "by freq"))
    assert [float(value) for value in re.findall(r"[\d.]+", mean)] == [71.25, 30.0, 84.52]
    assert "74.75" in by_frequency and "85.00" in by_frequency
