"""A convolution whose kernel the image itself generates."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import BatchNorm, Conv, ConvNormRelu
from dsnet_jax.ops import Extent
from dsnet_jax.ops.pooling import adaptive_mean
from dsnet_jax.ops.precision import at_least_float32


class DynamicFilter(nn.Module):
    """Convolves each channel of a map with a kernel generated from the map; one kernel an image, for all positions.

    Source: Jia et al. 2016, "Dynamic Filter Networks", with the generator of the paper's "Comparing with Related
    Works": convolution, BN and ReLU; adaptive average pooling to the kernel's size; convolution. Its sizes are ours:
    both convolutions 1x1 and as wide as the map; the result is normalised and rectified as a sampled map is.

    Attributes:
      kernel_size: k, an odd number.
    """

    kernel_size: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
        channels = x.shape[-1]
        reduced = ConvNormRelu(channels, dtype=self.dtype, name="reduce")(x, extent, train=train)
        means = adaptive_mean(reduced, self.kernel_size, extent)
        kernels = Conv(channels, use_bias=True, dtype=self.dtype, name="generate")(means)
        source = x if extent is None else extent.zero_outside(x)
        return BatchNorm(relu=True, dtype=self.dtype, name="norm")(convolve_depthwise(source, kernels), train=train)


def convolve_depthwise(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """Each channel of each image with its own kernel, zeros around: x [B, H, W, C], kernels [B, k, k, C], as x."""
    (height, width), k = x.shape[1:3], kernels.shape[1]
    padded = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    kernels = at_least_float32(kernels)
    total = jnp.zeros(x.shape, kernels.dtype)
    for row in range(k):
        for column in range(k):
            total += padded[:, row : row + height, column : column + width] * kernels[:, row, column, None, None]
    return total.astype(x.dtype)
