"""The non-local block: attention from every position to every other one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import BatchNorm, Conv
from dsnet_jax.ops import Extent
from dsnet_jax.ops.attention import attend


class NonLocal(nn.Module):
    """A map plus what it gathers from all its valid positions, weighted by embedded similarity.

    Source: Wang et al. 2018, "Non-local Neural Networks": embedded Gaussian, half the channels inside, a residual that
    ends with batch normalisation. Three things are ours: products are scaled by the root of the channels, so that the
    softmax does not start saturated; embeddings have no bias (that of the keys would change nothing); and the
    normalisation's scale starts at one, where Wang et al. take zero to leave a pretrained network as it is, since here
    the convolution that follows, which predicts offsets, starts at zero.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
        batch, height, width, channels = x.shape

        def embed(name: str) -> jax.Array:
            y = Conv(channels // 2, dtype=self.dtype, name=name)(x, extent)
            return y.reshape(batch, height * width, -1)

        valid = None if extent is None else extent.mask((height, width)).reshape(batch, height * width)
        y = attend(embed("query"), embed("key"), embed("value"), valid).reshape(batch, height, width, -1)
        y = Conv(channels, dtype=self.dtype, name="project")(y, extent)
        return x + BatchNorm(dtype=self.dtype, name="norm")(y, train=train)
