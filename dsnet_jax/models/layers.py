"""The layers that every network here is made of, aware of padding.

Each takes an optional `extent`, as described in docs/architecture.md, "Padding changes nothing": who reads cells beyond
its own position (a convolution larger than 1x1, pooling, a mean) masks its input; nobody masks its output.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dsnet_jax.ops import Extent, resize_bilinear
from dsnet_jax.ops.batch_norm import batch_norm, batch_norm_inference
from dsnet_jax.ops.convolution import conv2d
from dsnet_jax.ops.precision import at_least_float32

# torchvision starts its ResNets by the number of outputs (He et al. 2015), PyTorch all other convolutions uniformly
# within 1 / sqrt(inputs). In front of batch normalisation the size of a kernel sets its pace: a step turns it by an
# angle that goes with the inverse square, so that a head started as the backbone is would learn 20 times more slowly.
BACKBONE_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
HEAD_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

MOMENTUM, EPSILON = 0.9, 1e-5  # Of batch normalisation.


@flax.struct.dataclass
class SegmentationOutput:
    """What a segmentation network returns.

    Attributes:
      logits: [B, h, w, K], at the network's own stride; float32.
      auxiliary_logits: [B, h', w', K] of deep supervision, float32; None outside training or without it.
      offsets: [B, h, w, k*k, 2], (dy, dx) in pixels of the sampled map, float32; None for networks that do not sample.
    """

    logits: jax.Array
    auxiliary_logits: jax.Array | None = None
    offsets: jax.Array | None = None


class Conv(nn.Module):
    """Convolution with explicit symmetric padding: the output has ceil(size / stride) cells."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = HEAD_INIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features], in `dtype`.

        Raises:
          ValueError: kernel_size is even, so that nothing can be symmetric.
        """
        size = self.kernel_size
        if size % 2 == 0:
            raise ValueError(f"kernel_size is {size}: an odd number is needed")
        kernel = self.param("kernel", self.kernel_init, (size, size, x.shape[-1], self.features), jnp.float32)
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        if size > 1 and extent is not None:
            x = extent.zero_outside(x)
        x = conv2d(x, kernel, self.stride, self.dilation)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return x


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch sets it: momentum 0.9 (its 0.1), epsilon 1e-5.

    Under `jax.jit` the mean over a batch that is sharded over devices is the mean over the global batch: statistics are
    cross-device without naming an axis. Not Flax's: its gradient keeps more (`ops/batch_norm.py`).

    Attributes:
      relu: whether negative results are set to zero.
    """

    relu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> the same shape, in `dtype`; statistics and parameters are float32."""
        x, channels = x.astype(self.dtype), x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not train:
            return batch_norm_inference(x, scale, bias, mean.value, variance.value, EPSILON, self.relu)
        y, batch_mean, batch_variance = batch_norm(x, scale, bias, EPSILON, self.relu)
        if not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
            variance.value = MOMENTUM * variance.value + (1 - MOMENTUM) * batch_variance
        return y


class ConvNormRelu(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    kernel_init: nn.initializers.Initializer = HEAD_INIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features], in `dtype`."""
        conv = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.dilation,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )
        return BatchNorm(relu=True, dtype=self.dtype, name="norm")(conv(x, extent), train=train)


def max_pool(x: jax.Array, extent: Extent | None = None) -> jax.Array:
    """3x3 maximum with stride 2 of a map that is not negative, [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

    Zero stands for minus infinity outside the valid part and in the padding, one row and column on each side, which is
    right only after a ReLU. Computed as maxima of strided slices, along the height and then along the width: on CPU the
    gradient is then five times faster than that of a windowed reduction. Equal maxima share the gradient.
    """
    if extent is not None:
        x = extent.zero_outside(x)
    for axis in (1, 2):
        size = x.shape[axis]
        cells = -(-size // 2)
        padding = [(0, 0)] * 4
        padding[axis] = (1, 2 * cells - size)
        padded = jnp.pad(x, padding)
        before, centre, after = (jax.lax.slice_in_dim(padded, i, i + 2 * cells - 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(before, centre), after)
    return x


def global_mean(x: jax.Array, extent: Extent | None = None) -> jax.Array:
    """Mean over the valid cells, [B, H, W, C] -> [B, 1, 1, C], summed in float32, returned in the type of `x`."""
    precise = at_least_float32(x)
    if extent is None:
        mean = jnp.mean(precise, axis=(1, 2), keepdims=True)
    else:
        cells = jnp.prod(extent.valid_hw(x.shape[1:3]), axis=-1)[:, None, None, None]
        mean = jnp.sum(extent.zero_outside(precise), axis=(1, 2), keepdims=True) / cells
    return mean.astype(x.dtype)


def resize_map(x: jax.Array, shape_hw: tuple[int, int], ratio: float, extent: Extent | None = None) -> jax.Array:
    """A feature map at the grid of another one of the same images, bilinear, in the type of `x`.

    Args:
      x: [B, H, W, C].
      shape_hw: height and width of the other map.
      ratio: the other map's stride over that of `x`.
      extent: of the images.
    """
    if x.shape[1:3] == tuple(shape_hw):
        return x
    valid = None if extent is None else extent.valid_hw(x.shape[1:3])
    return resize_bilinear(x, shape_hw, (ratio, ratio), valid).astype(x.dtype)
