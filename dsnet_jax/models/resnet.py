"""ResNet as a dense feature extractor: torchvision's, with the strides of its last stages traded for dilation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import BACKBONE_INIT, BatchNorm, Conv, ConvNormRelu, max_pool
from dsnet_jax.ops import Extent
from dsnet_jax.ops.batch_norm import STATISTICS, relu
from dsnet_jax.ops.convolution import CONVOLVED

STEM_WIDTHS = {"v1c": (32, 32, 64), "v1s": (64, 64, 128)}  # Three 3x3 convolutions in place of v1's one 7x7.

# Of these parts the gradient keeps inputs and what is named, and computes the rest anew. The first parts' maps are the
# largest: what is computed of their convolutions' results, element by element, is never kept.
REMAT = {
    "none": {"stem": (STATISTICS, CONVOLVED), "stage2": (STATISTICS, CONVOLVED)},
    "stem": {"stem": (STATISTICS,), "stage2": (STATISTICS, CONVOLVED)},
    "blocks": dict.fromkeys(("stem", "stage2", "stage3", "stage4", "stage5"), (STATISTICS,)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); the first has the stride.

    Attributes:
      width: channels inside the block and, times `expansion`, of its output.
      dilations: of the convolutions on the grid before the stride, and after it.
    """

    width: int
    stride: int
    dilations: tuple[int, int]
    dtype: Any = jnp.float32

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), width]."""
        conv = partial(Conv, kernel_init=BACKBONE_INIT, dtype=self.dtype)
        norm = partial(BatchNorm, dtype=self.dtype)
        before, after = self.dilations
        y = conv(self.width, 3, self.stride, before, name="conv1")(x, extent)
        y = norm(relu=True, name="norm1")(y, train=train)
        y = conv(self.width, 3, 1, after, name="conv2")(y, extent)
        y = norm(name="norm2")(y, train=train)
        if x.shape[-1] != y.shape[-1]:
            x = conv(self.width, 1, self.stride, name="downsample_conv")(x, extent)
            x = norm(name="downsample_norm")(x, train=train)
        return relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2016); the 3x3 has the stride, as in torchvision.

    Attributes: as `BasicBlock`'s. The one 3x3 lies before the stride, so the second dilation has nothing to dilate.
    """

    width: int
    stride: int
    dilations: tuple[int, int]
    dtype: Any = jnp.float32

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), 4 * width]."""
        conv = partial(Conv, kernel_init=BACKBONE_INIT, dtype=self.dtype)
        norm = partial(BatchNorm, dtype=self.dtype)
        before, _ = self.dilations
        y = conv(self.width, name="conv1")(x, extent)
        y = norm(relu=True, name="norm1")(y, train=train)
        y = conv(self.width, 3, self.stride, before, name="conv2")(y, extent)
        y = norm(relu=True, name="norm2")(y, train=train)
        y = conv(self.expansion * self.width, name="conv3")(y, extent)
        y = norm(name="norm3")(y, train=train)
        if x.shape[-1] != y.shape[-1]:
            x = conv(self.expansion * self.width, 1, self.stride, name="downsample_conv")(x, extent)
            x = norm(name="downsample_norm")(x, train=train)
        return relu(x + y)


class ResNet(nn.Module):
    """The backbone.

    With output stride 16 the last stage keeps its resolution and dilates by 2, with 8 the last two do, by 2 and 4. The
    features at stride 8 and 16, subsampled, are those at stride 32 with the same weights: a convolution dilates by what
    has been taken from the strides *before* it, so the one whose stride was taken is dilated one step less.

    Attributes:
      depth: blocks in stages 2 to 5.
      block: BasicBlock or Bottleneck.
      stem: v1, v1c or v1s.
      output_stride: 8, 16 or 32, input pixels per cell of stage5.
      multi_grid: factors on the dilations of stage5's blocks (Chen et al. 2017); empty: all one.
      remat: what the gradient computes anew: one of `REMAT`.
    """

    depth: Sequence[int]
    block: type[nn.Module]
    stem: str = "v1"
    output_stride: int = 16
    multi_grid: Sequence[int] = ()
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> dict[int, jax.Array]:
        """Images [B, H, W, 3] to the features of stages 2 to 5, by stage number; strides 4, 8, 16, 32 at most.

        Raises:
          ValueError: output_stride or multi_grid does not fit the network.
        """
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {self.output_stride}: 8, 16 or 32 is needed")
        if self.multi_grid and len(self.multi_grid) != self.depth[-1]:
            raise ValueError(f"multi_grid is {self.multi_grid}: stage5 has {self.depth[-1]} blocks, one factor each")

        def run(part: str, call: Callable, module: nn.Module, x: jax.Array) -> jax.Array:
            if train and (kept := REMAT[self.remat].get(part)):
                call = nn.remat(call, policy=jax.checkpoint_policies.save_only_these_names(*kept))
            return call(module, x, extent)

        x = run("stem", lambda self, x, extent: max_pool(self._stem(x, extent, train), extent), self, x)
        features, stride, dilation = {}, 4, 1
        for stage, blocks in zip((2, 3, 4, 5), self.depth, strict=True):
            grow = 1 if stage == 2 else 2
            step = min(grow, self.output_stride // stride)  # 1: the stride is taken, and dilation grows in its place.
            before, dilation, stride = dilation, dilation * grow // step, stride * step
            factors = self.multi_grid if stage == 5 and self.multi_grid else (1,) * blocks
            for i, factor in enumerate(factors):
                first = i == 0
                block = self.block(
                    width=32 * 2 ** (stage - 1),
                    stride=step if first else 1,
                    dilations=((before if first else dilation) * factor, dilation * factor),
                    dtype=self.dtype,
                    name=f"stage{stage}_block{i}",
                )
                x = run(f"stage{stage}", lambda block, x, extent: block(x, extent, train=train), block, x)
            features[stage] = x
        return features

    def _stem(self, x: jax.Array, extent: Extent | None, train: bool) -> jax.Array:
        """[B, H, W, 3] -> [B, ceil(H / 2), ceil(W / 2), 64 or 128]."""
        layer = partial(ConvNormRelu, kernel_init=BACKBONE_INIT, dtype=self.dtype)
        if self.stem == "v1":
            return layer(64, 7, 2, name="stem")(x, extent, train=train)
        for i, width in enumerate(STEM_WIDTHS[self.stem]):
            x = layer(width, 3, 2 if i == 0 else 1, name=f"stem{i}")(x, extent, train=train)
        return x


RESNETS = {
    "resnet18": partial(ResNet, (2, 2, 2, 2), BasicBlock),
    "resnet34": partial(ResNet, (3, 4, 6, 3), BasicBlock),
    "resnet50": partial(ResNet, (3, 4, 6, 3), Bottleneck),
    "resnet101": partial(ResNet, (3, 4, 23, 3), Bottleneck),
    "resnet152": partial(ResNet, (3, 8, 36, 3), Bottleneck),
}
