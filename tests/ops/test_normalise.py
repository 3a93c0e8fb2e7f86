"""Normalisation by ImageNet's mean and deviation."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops.normalise import normalise


def test_normalised_pixels_equal_torchvisions_formula():
    pixels = np.array([[[0, 128, 255], [255, 0, 64]]], np.uint8)
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = normalise(jnp.asarray(pixels))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_images_that_are_not_uint8_are_refused():
    with pytest.raises(TypeError, match="float32"):
        normalise(jnp.zeros((1, 2, 2, 3), jnp.float32))
