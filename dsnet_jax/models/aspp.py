"""Atrous spatial pyramid pooling: the multi-scale context X(ASPP) that guides the sampling."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import ConvNormRelu, global_mean
from dsnet_jax.ops import Extent


class ASPP(nn.Module):
    """A 1x1 convolution, dilated 3x3 convolutions and image pooling side by side, concatenated and projected.

    Source: Chen et al. 2017, "Rethinking Atrous Convolution", as torchvision has it.

    Attributes:
      width: channels of every branch and of the output.
      atrous_rates: dilations of the 3x3 convolutions, in cells of the input, at output stride 16; others scale them.
      output_stride: input pixels of the network per cell of the input.
      dropout: share of the output's values dropped in training; 0.5 in torchvision.
    """

    width: int = 256
    atrous_rates: Sequence[int] = (6, 12, 18)
    output_stride: int = 16
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, width]."""
        branches = [ConvNormRelu(self.width, dtype=self.dtype, name="point")(x, extent, train=train)]
        for i, rate in enumerate(self.atrous_rates):
            dilation, rest = divmod(rate * 16, self.output_stride)
            if rest:
                raise ValueError(f"atrous_rates are {self.atrous_rates}: even ones are needed at output stride 32")
            atrous = ConvNormRelu(self.width, 3, dilation=dilation, dtype=self.dtype, name=f"atrous{i}")
            branches.append(atrous(x, extent, train=train))
        pooled = ConvNormRelu(self.width, dtype=self.dtype, name="pool")(global_mean(x, extent), train=train)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        x = ConvNormRelu(self.width, dtype=self.dtype, name="project")(x, extent, train=train)
        return nn.Dropout(self.dropout, deterministic=not train)(x)
