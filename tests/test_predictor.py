import sys

import numpy as np
import pytest
from PIL import Image
from test_architecture import modules_after

import dsnet_jax
from dsnet_jax.cli import main
from dsnet_jax.errors import InputError


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size_hw, 3), np.uint8) for size_hw in ((40, 50), (33, 64), (64, 64))]


def test_a_loaded_run_labels_as_the_command_does_and_in_batches_of_any_sizes(
    images, small_config, random_run, tmp_path
):
    network = dsnet_jax.load(random_run, batch_size=2)
    assert network.class_names == ("wall", "floor", "lamp")
    assert network.palette[0] == (200, 60, 60)
    several = network.predict(images)
    assert all(labels.base is None and labels.flags.writeable for labels in several)
    assert [labels.shape for labels in several] == [image.shape[:2] for image in images]

    Image.fromarray(images[0]).save(tmp_path / "0.png")
    assert main(["predict", f"--workdir={random_run}", f"--output={tmp_path}/out", str(tmp_path / "0.png")]) == 0
    by_command = np.array(Image.open(tmp_path / "out" / "0.png"))
    assert len(np.unique(by_command)) > 1
    np.testing.assert_array_equal(several[0], by_command)
    colours = network.colourise(several[0])
    np.testing.assert_array_equal(colours[several[0] == 0], np.full(((several[0] == 0).sum(), 3), (200, 60, 60)))

    file = tmp_path / "run.weights"  # Whatever its name is.
    assert main(["export", f"--workdir={random_run}", "--format=safetensors", f"--output={file}"]) == 0
    from_file = dsnet_jax.load(file)
    assert from_file.class_names == network.class_names
    np.testing.assert_array_equal(from_file.predict(images[0]), by_command)
    with pytest.raises(InputError, match=r"run\.weights: a file has one step, 500 cannot be chosen"):
        dsnet_jax.load(file, step=500)


def test_what_is_no_image_is_refused(small_config, random_run):
    network = dsnet_jax.load(random_run)
    with pytest.raises(ValueError, match=r"image 0 is float64\[4, 4, 3\]: uint8 \[H, W, 3\], RGB, is needed"):
        network.predict(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"image 1 is uint8\[4, 4\]"):
        network.predict([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_image_is_refused_before_anything_is_read(batch_size):
    with pytest.raises(InputError, match=f"^batch_size is {batch_size}: 1 or more is needed$"):
        dsnet_jax.load("nowhere", batch_size=batch_size)


@pytest.mark.parametrize("path", ["gs://bucket/run", "gs://bucket/run.safetensors"])
def test_storage_whose_package_is_missing_is_told_with_the_extra(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # An import raises.
    with pytest.raises(InputError, match=r"^gs://bucket/run.* cannot be reached .*pip install -e '\.\[gcs\]'"):
        dsnet_jax.load(path)


def test_the_package_is_imported_without_jax_until_something_is_loaded():
    assert "jax" not in modules_after("import dsnet_jax")
    assert "dsnet_jax.predictor" in modules_after("from dsnet_jax import load")
