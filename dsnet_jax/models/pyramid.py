"""Pyramid pooling: the context of PSPNet."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import ConvNormRelu
from dsnet_jax.ops import Extent, resize_bilinear
from dsnet_jax.ops.pooling import adaptive_mean

BINS = 1, 2, 3, 6  # Sides of the grids.


class PyramidPooling(nn.Module):
    """A map beside its means over ever finer grids, each reduced by a 1x1 convolution and resized to the map.

    Source: Zhao et al. 2017, "Pyramid Scene Parsing Network". What follows there, a 3x3 convolution, dropout and a 1x1
    convolution, is our classifier; it is 512 wide there and as wide as all classifiers here.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, 2 * C], the map itself first, then C // 4 channels of each grid; 4 divides C."""
        width = x.shape[-1] // len(BINS)
        maps = [x]
        for bins in BINS:
            reduce = ConvNormRelu(width, dtype=self.dtype, name=f"pool{bins}")
            means = reduce(adaptive_mean(x, bins, extent), train=train)
            ratio_hw = None if extent is None else bins / extent.valid_hw(x.shape[1:3])
            maps.append(resize_bilinear(means, x.shape[1:3], ratio_hw).astype(x.dtype))
        return jnp.concatenate(maps, axis=-1)
