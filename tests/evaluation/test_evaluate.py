"""Scores of a whole split, against a plain loop over its images, and the files that an evaluation leaves."""

import csv
import errno
import json
import os
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from dsnet_jax import parallel
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.transforms import resize_image
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import evaluate as module
from dsnet_jax.evaluation.boundary import boundary_counts
from dsnet_jax.evaluation.evaluate import Evaluation, evaluate, evaluate_run
from dsnet_jax.evaluation.inference import segment
from dsnet_jax.evaluation.protocols import Protocol, protocol_named
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.normalise import normalise


def plain_matrix(trained, split, image_scale):
    """Image by image: no canvas, no batch, no padding, and somebody else's confusion matrix."""

    @jax.jit
    def labels_of(image, like):
        logits = trained.model.apply(trained.variables, normalise(image[None]), train=False).logits
        ratio_hw = np.array(image.shape[:2]) / np.array(like.shape) / 8  # The network's stride is 8.
        return jnp.argmax(resize_bilinear(logits, like.shape, ratio_hw), axis=-1)[0]

    matrix = np.zeros((3, 3), np.int64)
    for index in range(len(split)):
        image = resize_image(decode_image(split[index].image, "image"), image_scale)
        truth = decode_mask(split[index].label, "label")
        prediction = np.asarray(labels_of(image, truth))
        matrix += confusion_matrix(truth[truth != 255], prediction[truth != 255], labels=range(3))
    return matrix


def valid_pixels(split):
    return sum(int((decode_mask(split[index].label, "label") != 255).sum()) for index in range(len(split)))


@pytest.fixture
def val(rooms):
    return open_split(str(rooms), "rooms", "val")


@pytest.mark.parametrize("image_scale", [1.0, 0.5])
def test_the_counts_are_those_of_a_plain_loop_at_the_labels_own_size(random_run, val, small_config, image_scale):
    trained = load_trained(random_run)
    small_config.data.image_scale = image_scale
    found = evaluate(trained.model, trained.variables, val, small_config)
    expected = plain_matrix(trained, val, image_scale)
    assert (expected.diagonal() > 100).sum() >= 2  # The network does tell classes apart.
    # Rounding may decide between two classes whose logits are equal but for it, here and there.
    assert np.abs(found.matrix - expected).sum() <= 4
    assert found.matrix.sum() == expected.sum() == valid_pixels(val)


def test_the_counts_do_not_depend_on_the_batch_size_and_padding_is_counted(random_run, val, small_config):
    """Eight devices. In batches of 8 three images have a smaller canvas, in a batch of 16 all have the same one."""
    trained = load_trained(random_run)
    results = []
    for batch_size, padding in ((8, 5), (16, 5)):
        small_config.evaluation.batch_size = batch_size
        found = evaluate(trained.model, trained.variables, val, small_config)
        assert (found.images, found.padding_images) == (11, padding)
        results.append(found)
    assert np.abs(results[0].matrix - results[1].matrix).sum() <= 4  # Rounding may decide between equal logits.
    pixels = sum(int(height) * int(width) for height, width in val.sizes_hw)
    assert results[0].padded_share == pytest.approx((8 * 64 * 64 + 8 * 32 * 32) / pixels)
    assert results[1].padded_share == pytest.approx(16 * 64 * 64 / pixels)
    assert [found.programs for found in results] == [2, 1]


class OneConvolution(nn.Module):
    """In the place of a network, where it matters only how often it is compiled."""

    @nn.compact
    def __call__(self, images, extent, *, train):
        return SimpleNamespace(logits=nn.Conv(3, (9, 9), (8, 8), padding=((4, 4), (4, 4)))(images))


@pytest.fixture
def one_device(monkeypatch):
    """With eight, every batch has seven images and more that pad it."""
    one = parallel.mesh_over(jax.devices()[:1])
    monkeypatch.setattr(parallel, "local_mesh", lambda: one)


@pytest.mark.usefixtures("one_device")
def test_an_evaluation_compiles_a_program_for_each_canvas_and_nothing_else(val, small_config, compilations):
    model = OneConvolution()
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3)), None, train=False
    )
    small_config.evaluation.scales = (0.5, 1.0)
    pixels = Protocol("", (0.5, 1.0)).pixels(val.sizes_hw).sum()
    segment.clear_cache()
    # In batches of 4, because the mirror images double them: two of the larger canvas, one of the smaller.
    for name, share in (("ss", None), ("ms_flip", (8 * (64**2 + 32**2) + 4 * 2 * 32**2) / pixels)):
        compilations.clear()
        protocol = protocol_named(name, small_config)
        for programs in (2, 0):  # A second evaluation finds them.
            found = evaluate(model, variables, val, small_config, protocol=protocol)
            assert (len(compilations), found.programs) == (programs, 2)
            assert share is None or found.padded_share == pytest.approx(share)
            compilations.clear()


@pytest.mark.usefixtures("one_device")
def test_protocols_have_results_and_folders_of_their_own(random_run, capsys):
    for protocol, folder in (("ss", "val"), ("slide", "val-slide")):
        windows = ["--config.evaluation.slide_crop_hw=(32, 32)"]
        evaluate_run(random_run, protocol=protocol, config_flags=windows if protocol == "slide" else [])
        folder = random_run / "evaluation" / folder
        results = json.loads((folder / "results.json").read_text())
        assert (results["protocol"], results["images"], results["programs"]) == (protocol, 11, 2)
        assert results["config"]["evaluation"]["slide_crop_hw"] == ([32, 32] if protocol == "slide" else [])
        assert results["padded_share"] > 1 and f"({protocol})" in (folder / "table.md").read_text()
        assert "on 2 canvases" in capsys.readouterr().out
    evaluate_run(random_run, protocol="flip", config_flags=["--config.evaluation.padded_share=9.0"])
    results = json.loads((random_run / "evaluation" / "val-flip" / "results.json").read_text())
    assert results["programs"] == 1 and results["padded_share"] > 1.2
    counts = [(random_run / "evaluation" / name / "confusion_matrix.csv").read_text() for name in ("val", "val-slide")]
    assert counts[0] != counts[1]


def test_pixels_near_outlines_are_counted_in_every_image(random_run, val, small_config):
    trained = load_trained(random_run)
    found = evaluate(trained.model, trained.variables, val, small_config, show=len(val))
    expected = boundary_counts([(example.label, labels) for example, labels in found.shown], 3)
    assert len(found.shown) == 11 and expected.any(axis=0).all()
    np.testing.assert_array_equal(found.boundary, expected)


def test_an_image_that_is_lost_on_the_way_is_an_error(random_run, val, small_config, monkeypatch):
    trained = load_trained(random_run)
    original = module.evaluation_examples

    def losing(*arguments):
        for example in original(*arguments):
            if example.index != 4:
                yield example

    monkeypatch.setattr(module, "evaluation_examples", losing)
    with pytest.raises(RuntimeError, match="10 images were scored, split val of rooms has 11"):
        evaluate(trained.model, trained.variables, val, small_config)


def test_a_split_without_labels_is_refused_before_anything_is_computed_or_written(random_run, monkeypatch):
    monkeypatch.setattr(module, "Segmenter", None)
    with pytest.raises(InputError, match="'test' of rooms has no labels to score: choose another --split"):
        evaluate_run(random_run, split="test")
    assert not (random_run / "evaluation").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(random_run, monkeypatch):
    monkeypatch.setattr(module, "evaluate", None)
    (random_run / "evaluation").write_text("")
    with pytest.raises(InputError, match=r"evaluation/val cannot be written \(Not a directory\): make room"):
        evaluate_run(random_run)


def test_the_scores_are_printed_though_the_disk_is_full(random_run, monkeypatch, capsys):
    counted = Evaluation(np.eye(3, dtype=np.int64), np.ones((3, 3), np.int64), 11, 0, 1.0, 1, [])
    monkeypatch.setattr(module, "evaluate", lambda *arguments, **options: counted)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.reports, "write_results", full)
    with pytest.raises(InputError, match=r"evaluation/val cannot be written \(No space left on device\)"):
        evaluate_run(random_run)
    assert "100.00 % mIoU" in capsys.readouterr().out


def test_examples_to_look_at_are_spread_over_the_split(random_run, val, small_config):
    trained = load_trained(random_run)
    shown = evaluate(trained.model, trained.variables, val, small_config, show=3).shown
    assert [example.index for example, _ in shown] == [0, 5, 10]
    for example, prediction in shown:
        assert prediction.shape == example.label.shape and prediction.dtype == np.uint8
        assert prediction.max() < 3


def test_examples_to_look_at_are_spread_over_those_of_the_own_process(random_run, val, small_config, monkeypatch):
    trained = load_trained(random_run)
    monkeypatch.setattr(module, "jax", SimpleNamespace(process_index=lambda: 0, process_count=lambda: 2))
    monkeypatch.setattr(
        module.processes,
        "sum_over_processes",
        lambda counts: np.array([11, *counts[1:]]) if counts.ndim == 1 else counts,
    )
    shown = evaluate(trained.model, trained.variables, val, small_config, show=3).shown
    assert [example.index for example, _ in shown] == [0, 4, 10]  # Of 0, 2, 4, 6, 8, 10.


def test_a_run_is_scored_into_files_that_agree(random_run, val, small_config, capsys):
    evaluate_run(random_run)
    folder = random_run / "evaluation" / "val"
    names = {"results.json", "table.md", "confusion_matrix.csv", "confusion_matrix.png", "overlays"}
    assert {path.name for path in folder.iterdir()} == names
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.reader((folder / "confusion_matrix.csv").read_text().splitlines()))
    matrix = np.array([row[1:] for row in rows[1:]], np.int64)
    assert rows[0] == ["true class", "wall", "floor", "lamp"]
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert results["miou"] == pytest.approx(iou.mean())
    assert 0 < results["boundary_miou"] < 1 and results["boundary_classes_averaged"] == 3
    assert (results["images"], results["padding_images"], results["pixels"]) == (11, 5, valid_pixels(val))
    assert (results["checkpoint_step"], results["split"], results["protocol"]) == (7, "val", "ss")
    assert results["config"]["model"]["width"] == small_config.model.width
    assert f"{100 * iou.mean():.2f} % mIoU" in (folder / "table.md").read_text()
    printed = capsys.readouterr().out
    assert f"{100 * iou.mean():.2f} % mIoU" in printed and "pixels computed over pixels of the images: 1." in printed


def test_overlays_are_written_for_as_many_images_as_are_asked_for_and_old_ones_go(random_run, capsys):
    folder = random_run / "evaluation" / "val" / "overlays"
    folder.mkdir(parents=True)
    (folder / "room05.png").write_text("of an earlier step")
    evaluate_run(random_run, config_flags=["--config.evaluation.overlays=2"])
    assert "overlays/ (2 pictures)" in capsys.readouterr().out
    overlays = sorted(folder.iterdir())
    assert [path.name for path in overlays] == ["room00.png", "room10.png"]
    with Image.open(overlays[0]) as picture:
        assert picture.mode == "RGB"


def test_old_overlays_go_where_the_name_of_the_workdir_looks_like_a_pattern(random_run):
    workdir = random_run.rename(random_run.with_name("voc[1]"))
    folder = workdir / "evaluation" / "val" / "overlays"
    folder.mkdir(parents=True)
    for name in ("room05.png", "notes.txt"):
        (folder / name).write_text("of an earlier step")
    evaluate_run(workdir, config_flags=["--config.evaluation.overlays=1"])
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "room00.png"]


def test_another_split_and_the_best_step_can_be_asked_for(random_run):
    evaluate_run(random_run, step="best", split="train")
    results = json.loads((random_run / "evaluation" / "train" / "results.json").read_text())
    assert (results["images"], results["checkpoint_step"]) == (27, 7)


def test_another_root_can_be_asked_for(random_run, rooms, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(rooms, moved)
    config = json.loads((random_run / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (random_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not prepared"):
        evaluate_run(random_run)
    evaluate_run(random_run, root=str(moved))
    assert (random_run / "evaluation" / "val" / "results.json").exists()


def test_a_data_set_that_has_other_classes_now_is_refused(random_run, rooms, tmp_path):
    shutil.copytree(rooms.parent / "source", tmp_path / "source")
    (tmp_path / "source" / "classes.txt").write_text("lamp\nwall\nfloor\n")
    prepare("folder", str(tmp_path / "source"), str(tmp_path / "datasets"), name="rooms")
    with pytest.raises(InputError, match="prepare the data set as it was"):
        evaluate_run(random_run, root=str(tmp_path / "datasets"))


def test_a_step_that_is_not_there_is_told(random_run):
    with pytest.raises(InputError, match="step 3 is needed, steps 7 found"):
        evaluate_run(random_run, step=3)


def test_without_an_evaluated_step_there_is_no_best(random_run):
    (random_run / "checkpoints" / "scores.json").unlink()
    with pytest.raises(InputError, match="no checkpoint was evaluated: leave --step out"):
        load_trained(random_run, "best")


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        evaluate_run(tmp_path)
