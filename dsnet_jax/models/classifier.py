"""From features to classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import Conv, ConvNormRelu
from dsnet_jax.ops import Extent


class Classifier(nn.Module):
    """3x3 convolution, batch normalisation, ReLU, dropout, and a 1x1 convolution to classes.

    Attributes:
      num_classes: K.
      width: channels between the convolutions.
      dropout: share of values dropped in training.
    """

    num_classes: int
    width: int = 256
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None = None, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> float32 logits [B, H, W, K]."""
        x = ConvNormRelu(self.width, 3, dtype=self.dtype, name="conv")(x, extent, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        # Logits near 20 are 1/8 apart in bfloat16, so that classes would tie.
        precise = jnp.promote_types(self.dtype, jnp.float32)
        return Conv(self.num_classes, use_bias=True, dtype=precise, name="logits")(x, extent)
