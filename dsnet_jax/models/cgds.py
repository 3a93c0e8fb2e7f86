"""The Context Guided Dynamic Sampling module: the paper's contribution, for any pair of feature maps (its Figure 2)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import HEAD_INIT, BatchNorm, Conv, ConvNormRelu, resize_map
from dsnet_jax.ops import Extent, dynamic_sampling_conv


@flax.struct.dataclass
class CGDSOutput:
    """The three maps that the classifier reads, on the grid of the low-level feature, and the points.

    Attributes:
      modified: X(M), [B, H, W, width].
      sampled: X(S), [B, H, W, width].
      guide: the high-level feature, resized, [B, H, W, C].
      offsets: Z, [B, H, W, k*k, 2], (dy, dx) in pixels of X(M), float32.
    """

    modified: jax.Array
    sampled: jax.Array
    guide: jax.Array
    offsets: jax.Array

    def concatenated(self) -> jax.Array:
        """concat(X(M), X(S), X(ASPP)): [B, H, W, 2 * width + C]."""
        return jnp.concatenate([self.modified, self.sampled, self.guide], axis=-1)


class CGDS(nn.Module):
    """Samples a low-level feature map at points that a high-level one predicts.

    Attributes:
      width: channels of X(M) and X(S).
      sampling_kernel: k; k*k points are sampled at each position.
      modification_kernel: side of the feature modification's convolution.
      stride_ratio: the low-level map's stride over that of the high-level one.
    """

    width: int = 256
    sampling_kernel: int = 3
    modification_kernel: int = 1
    stride_ratio: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, low_level: jax.Array, high_level: jax.Array, extent: Extent | None = None, *, train: bool
    ) -> CGDSOutput:
        """`low_level` [B, H, W, C], `high_level` [B, h, w, C'] of the same images."""
        k = self.sampling_kernel
        modification = ConvNormRelu(self.width, self.modification_kernel, dtype=self.dtype, name="modification")
        modified = modification(low_level, extent, train=train)
        guide = resize_map(high_level, modified.shape[1:3], self.stride_ratio, extent)
        # Started at zero: the module begins as an ordinary convolution. bfloat16 has steps of 1/4 pixel at 32.
        precise = jnp.promote_types(self.dtype, jnp.float32)
        predict = Conv(2 * k * k, 3, use_bias=True, kernel_init=nn.initializers.zeros, dtype=precise, name="offset")
        offsets = predict(guide, extent).reshape(*modified.shape[:3], k * k, 2)
        kernel = self.param("kernel", HEAD_INIT, (k, k, self.width, self.width), jnp.float32)
        source = modified if extent is None else extent.zero_outside(modified)
        sampled = dynamic_sampling_conv(source, offsets, kernel)
        sampled = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(sampled, train=train))
        return CGDSOutput(modified, sampled, guide, offsets)
