"""The networks that DSNet is compared with and that work on one grid: FCN, DeepLabv3, PSPNet, and ASPP with more."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.cgds import DynamicSamplingConv
from dsnet_jax.models.classifier import classify
from dsnet_jax.models.dynamic_filter import DynamicFilter
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.models.pyramid import PyramidPooling
from dsnet_jax.models.resnet import ResNet
from dsnet_jax.ops import Extent


class Baseline(nn.Module):
    """Backbone, context, classifier.

    Without context it is FCN (Long et al. 2015, in torchvision's form), with ASPP DeepLabv3 (Chen et al. 2017), with
    pyramid pooling PSPNet (Zhao et al. 2017). X(5) goes through those of the modules that there are, in order.

    Attributes:
      backbone: a ResNet.
      num_classes: K.
      pyramid: pyramid pooling, or None.
      aspp: or None.
      dynamic_filter: or None.
      deformable: a convolution at points that it predicts from the map it samples, or None.
      width: channels of the classifier.
      dropout: before the classes, training only.
      deep_supervision: a second classifier on stage4, training only.
      auxiliary_width: channels of that one; 0: `width`.
    """

    backbone: ResNet
    num_classes: int
    pyramid: PyramidPooling | None = None
    aspp: ASPP | None = None
    dynamic_filter: DynamicFilter | None = None
    deformable: DynamicSamplingConv | None = None
    width: int = 256
    dropout: float = 0.1
    deep_supervision: bool = True
    auxiliary_width: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, extent: Extent | None = None, *, train: bool) -> SegmentationOutput:
        """Normalised images [B, H, W, 3] to logits at the backbone's output stride."""
        features = self.backbone(images, extent, train=train)
        x, offsets = features[5], None
        for module in (self.pyramid, self.aspp, self.dynamic_filter):
            if module is not None:
                x = module(x, extent, train=train)
        if self.deformable is not None:
            x, offsets = self.deformable(x, x, extent, train=train)
        return classify(self, x, features[4], extent, train, offsets)
