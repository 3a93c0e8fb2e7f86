"""From features to classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.layers import Conv, ConvNormRelu, SegmentationOutput
from dsnet_jax.ops import Extent
from dsnet_jax.ops.precision import float32_or_wider


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
        precise = float32_or_wider(self.dtype)
        return Conv(self.num_classes, use_bias=True, dtype=precise, name="logits")(x, extent)


def classify(
    network: nn.Module,
    x: jax.Array,
    stage4: jax.Array,
    extent: Extent | None,
    train: bool,
    offsets: jax.Array | None = None,
) -> SegmentationOutput:
    """How every network ends: its `classifier`, and deep supervision's, `auxiliary`, in training alone.

    Args:
      network: whose `__call__` it is called in, and whose submodules the classifiers become; it has the attributes
        num_classes, width, dropout, deep_supervision, auxiliary_width (0: as wide as `width`) and dtype.
      x: [B, H, W, C], what the network makes of an image.
      stage4: X(4), [B, h, w, C'], which deep supervision reads.
      offsets: of the points that were sampled on the way, if any were.
    """

    def classifier(name: str, width: int) -> Classifier:
        return Classifier(network.num_classes, width, network.dropout, dtype=network.dtype, name=name)

    auxiliary = None
    if network.deep_supervision and train:
        auxiliary = classifier("auxiliary", network.auxiliary_width or network.width)(stage4, extent, train=train)
    return SegmentationOutput(classifier("classifier", network.width)(x, extent, train=train), auxiliary, offsets)
