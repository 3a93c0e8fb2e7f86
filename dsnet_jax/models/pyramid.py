"""Pyramid pooling: the context of PSPNet."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import ConvNormRelu
from dsnet_jax.ops import Extent, resize_bilinear
from dsnet_jax.ops.pooling import adaptive_mean


class PyramidPooling(nn.Module):
    """A map beside its means over ever finer grids, each reduced by a 1x1 convolution and resized to the map.

    Source: Zhao et al. 2017, "Pyramid Scene Parsing Network". What follows there, a 3x3 convolution, dropout and a 1x1
    convolution, is our classifier; it is 512 wide there and as wide as all classifiers here.

    Attributes:
      bins: sides of the grids. Each gets as many channels as the input has, divided by their number.
    """

    bins: Sequence[int] = (1, 2, 3, 6)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, 2 * C], the map itself first; for a C that the number of grids divides."""
        width = x.shape[-1] // len(self.bins)
        maps = [x]
        for bins in self.bins:
            reduce = ConvNormRelu(width, dtype=self.dtype, name=f"pool{bins}")
            means = reduce(adaptive_mean(x, bins, extent), train=train)
            ratio_hw = None if extent is None else bins / extent.valid_hw(x.shape[1:3])
            maps.append(resize_bilinear(means, x.shape[1:3], ratio_hw).astype(x.dtype))
        return jnp.concatenate(maps, axis=-1)
