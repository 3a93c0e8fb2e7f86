"""Scores of a whole split, against a plain loop over its images, and the files that an evaluation leaves."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.transforms import resize_image
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import evaluate as module
from dsnet_jax.evaluation.evaluate import evaluate, evaluate_run
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.normalise import normalise

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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
    """Eight devices: batches are of 8 and of 16. The eleven images have two canvases, three images and eight."""
    trained = load_trained(random_run)
    results = []
    for batch_size, padding in ((8, 5), (16, 13 + 8)):
        small_config.evaluation.batch_size = batch_size
        found = evaluate(trained.model, trained.variables, val, small_config)
        assert (found.images, found.padding_images) == (11, padding)
        results.append(found)
    np.testing.assert_array_equal(results[0].matrix, results[1].matrix)
    pixels = sum(int(height) * int(width) for height, width in val.sizes_hw)
    assert results[0].padded_share == pytest.approx((8 * 64 * 64 + 8 * 32 * 32) / pixels)


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


def test_a_split_without_labels_is_refused(random_run):
    with pytest.raises(InputError, match="'test' of rooms has no labels to score: choose another --split"):
        evaluate_run(random_run, split="test")


def test_examples_to_look_at_are_spread_over_the_split(random_run, val, small_config):
    trained = load_trained(random_run)
    shown = evaluate(trained.model, trained.variables, val, small_config, show=3).shown
    assert [example.index for example, _ in shown] == [0, 5, 10]
    for example, prediction in shown:
        assert prediction.shape == example.label.shape and prediction.dtype == np.uint8
        assert prediction.max() < 3


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
    assert (results["images"], results["padding_images"], results["pixels"]) == (11, 5, valid_pixels(val))
    assert (results["checkpoint_step"], results["split"], results["protocol"]) == (7, "val", "ss")
    assert results["config"]["model"]["width"] == small_config.model.width
    assert f"{100 * iou.mean():.2f} % mIoU" in (folder / "table.md").read_text()
    printed = capsys.readouterr().out
    assert f"{100 * iou.mean():.2f} % mIoU" in printed and "pixels computed over pixels of the images: 1." in printed


def test_overlays_are_written_for_as_many_images_as_the_config_says(random_run, small_config):
    config = json.loads((random_run / "config.json").read_text())
    config["evaluation"]["overlays"] = 2
    (random_run / "config.json").write_text(json.dumps(config))
    evaluate_run(random_run)
    overlays = sorted((random_run / "evaluation" / "val" / "overlays").iterdir())
    assert [path.name for path in overlays] == ["room00.png", "room10.png"]
    with Image.open(overlays[0]) as picture:
        assert picture.mode == "RGB"


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
