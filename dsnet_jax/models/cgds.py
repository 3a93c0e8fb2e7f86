"""The Context Guided Dynamic Sampling module: the paper's contribution, for any pair of feature maps (its Figure 2)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import HEAD_INIT, BatchNorm, Conv, ConvNormRelu, resize_map
from dsnet_jax.models.nonlocal_block import NonLocal
from dsnet_jax.ops import Extent, dynamic_sampling_conv
from dsnet_jax.ops.convolution import conv2d
from dsnet_jax.ops.precision import float32_or_wider

# Where the points come from: a convolution of the guide; the same of the guide after a non-local block, the paper's
# other sampling operation; of the sampled map itself, as in deformable convolution; from nowhere, the regular grid.
SAMPLINGS = ("predicted", "nonlocal", "self", "regular")


@flax.struct.dataclass
class CGDSOutput:
    """The three maps that the classifier reads, on the grid of the low-level feature, and the points.

    Attributes:
      modified: X(M), [B, H, W, width].
      sampled: X(S), [B, H, W, width].
      guide: the high-level feature, resized, [B, H, W, C].
      offsets: Z, [B, H, W, k*k, 2], (dy, dx) in pixels of X(M), float32; None on the regular grid.
    """

    modified: jax.Array
    sampled: jax.Array
    guide: jax.Array
    offsets: jax.Array | None

    def concatenated(self) -> jax.Array:
        """concat(X(M), X(S), X(ASPP)): [B, H, W, 2 * width + C]."""
        return jnp.concatenate([self.modified, self.sampled, self.guide], axis=-1)


class DynamicSamplingConv(nn.Module):
    """Dynamic sampling convolution (equation 2), batch normalisation, ReLU.

    A map that is its own guide makes it a deformable convolution: version 1 (Dai et al. 2017), or with modulation
    version 2 (Zhu et al. 2019).

    Attributes:
      width: channels of the output.
      kernel_size: k; k*k points are sampled at each position.
      modulated: samples are scaled, each by a sigmoid that the guide predicts with the offsets; all start at one half.
      formulation: as of `dynamic_sampling_conv`; None: the platform's own.
    """

    width: int = 256
    kernel_size: int = 3
    modulated: bool = False
    formulation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, guide: jax.Array | None, extent: Extent | None = None, *, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Samples `x` [B, H, W, C] at points that `guide` [B, H, W, C'] predicts, or on the regular grid without one.

        Returns:
          [B, H, W, width] in `dtype`, and the offsets, [B, H, W, k*k, 2] in float32, (dy, dx) in pixels of `x`; None
          without a guide.
        """
        k = self.kernel_size
        kernel = self.param("kernel", HEAD_INIT, (k, k, x.shape[-1], self.width), jnp.float32)
        source = x if extent is None else extent.zero_outside(x)
        if guide is None:
            offsets, sampled = None, conv2d(source, kernel.astype(source.dtype))
        else:
            # Started at zero: the module begins as an ordinary convolution. bfloat16 has steps of 1/4 pixel at 32.
            precise = float32_or_wider(self.dtype)
            outputs = (3 if self.modulated else 2) * k * k
            init = nn.initializers.zeros
            predicted = Conv(outputs, 3, use_bias=True, kernel_init=init, dtype=precise, name="offset")(guide, extent)
            offsets = predicted[..., : 2 * k * k].reshape(*x.shape[:3], k * k, 2)
            modulation = nn.sigmoid(predicted[..., 2 * k * k :]) if self.modulated else None
            sampled = dynamic_sampling_conv(source, offsets, kernel, modulation, formulation=self.formulation)
        return BatchNorm(relu=True, dtype=self.dtype, name="norm")(sampled, train=train), offsets


class CGDS(nn.Module):
    """Samples a low-level feature map at points that a high-level one predicts.

    Attributes:
      width: channels of X(M) and X(S).
      sampling_kernel: k; k*k points are sampled at each position.
      modification_kernel: side of the feature modification's convolution.
      stride_ratio: the low-level map's stride over that of the high-level one.
      sampling: where the points come from, one of `SAMPLINGS`.
      formulation: as of `dynamic_sampling_conv`; None: the platform's own.
    """

    width: int = 256
    sampling_kernel: int = 3
    modification_kernel: int = 1
    stride_ratio: float = 0.5
    sampling: str = "predicted"
    formulation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, low_level: jax.Array, high_level: jax.Array, extent: Extent | None = None, *, train: bool
    ) -> CGDSOutput:
        """`low_level` [B, H, W, C], `high_level` [B, h, w, C'] of the same images.

        Raises:
          ValueError: there is no such sampling.
        """
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {self.sampling!r}: one of {SAMPLINGS} is needed")
        modification = ConvNormRelu(self.width, self.modification_kernel, dtype=self.dtype, name="modification")
        modified = modification(low_level, extent, train=train)
        guide = points_from = resize_map(high_level, modified.shape[1:3], self.stride_ratio, extent)
        if self.sampling == "nonlocal":  # On the coarser grid: at stride 8 it would cost sixteen times as much.
            gathered = NonLocal(dtype=self.dtype, name="nonlocal")(high_level, extent, train=train)
            points_from = resize_map(gathered, modified.shape[1:3], self.stride_ratio, extent)
        elif self.sampling != "predicted":
            points_from = modified if self.sampling == "self" else None
        convolution = DynamicSamplingConv(
            self.width, self.sampling_kernel, formulation=self.formulation, dtype=self.dtype
        )
        nn.share_scope(self, convolution)
        sampled, offsets = convolution(modified, points_from, extent, train=train)
        return CGDSOutput(modified, sampled, guide, offsets)
