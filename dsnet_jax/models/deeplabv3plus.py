"""DeepLabv3+: ASPP and a decoder that reads an early, detailed feature on its regular grid."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.classifier import classify
from dsnet_jax.models.layers import ConvNormRelu, SegmentationOutput, resize_map
from dsnet_jax.models.resnet import ResNet
from dsnet_jax.ops import Extent

LOW_LEVEL_WIDTH = 48  # Channels that the low-level map is reduced to.


class Decoder(nn.Module):
    """A low-level map, reduced, beside a high-level one, resized, and a 3x3 convolution of both.

    Attributes:
      width: channels of the output.
      stride_ratio: the low-level map's stride over that of the high-level one.
    """

    width: int = 256
    stride_ratio: float = 0.25
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, low_level: jax.Array, high_level: jax.Array, extent: Extent | None = None, *, train: bool
    ) -> jax.Array:
        """`low_level` [B, H, W, C], `high_level` [B, h, w, C'] of the same images, to [B, H, W, width]."""
        low_level = ConvNormRelu(LOW_LEVEL_WIDTH, dtype=self.dtype, name="reduce")(low_level, extent, train=train)
        high_level = resize_map(high_level, low_level.shape[1:3], self.stride_ratio, extent)
        x = jnp.concatenate([low_level, high_level], axis=-1)
        return ConvNormRelu(self.width, 3, dtype=self.dtype, name="fuse")(x, extent, train=train)


class DeepLabV3Plus(nn.Module):
    """Backbone, ASPP, decoder, classifier.

    Source: Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution": X(2) reduced to 48 channels, beside
    ASPP's map two 3x3 convolutions of 256. The second is our classifier's. Convolutions are dense; mmsegmentation's are
    separable, and 512 wide.

    Attributes:
      backbone: a ResNet.
      num_classes: K.
      width: channels of ASPP, the decoder and the classifier.
      atrous_rates: ASPP's dilations at output stride 16; scaled with the backbone's.
      aspp_dropout: behind ASPP, training only.
      dropout: before the classes, training only.
      deep_supervision: a classifier on stage4, training only.
      auxiliary_width: channels of that one; 0: `width`.
    """

    backbone: ResNet
    num_classes: int
    width: int = 256
    atrous_rates: Sequence[int] = (6, 12, 18)
    aspp_dropout: float = 0.0
    dropout: float = 0.1
    deep_supervision: bool = True
    auxiliary_width: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, extent: Extent | None = None, *, train: bool) -> SegmentationOutput:
        """Normalised images [B, H, W, 3] to logits at stride 4."""
        features = self.backbone(images, extent, train=train)
        stride = self.backbone.output_stride
        aspp = ASPP(self.width, self.atrous_rates, stride, self.aspp_dropout, dtype=self.dtype, name="aspp")
        decoder = Decoder(self.width, stride_ratio=4 / stride, dtype=self.dtype, name="decoder")
        x = decoder(features[2], aspp(features[5], extent, train=train), extent, train=train)
        return classify(self, x, features[4], extent, train)
