"""The fully convolutional network: the plain one that DSNet is compared with."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.classifier import Classifier
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.models.resnet import ResNet
from dsnet_jax.ops import Extent


class FCN(nn.Module):
    """Backbone and classifier (Long et al. 2015, in torchvision's form).

    Attributes:
      backbone: a ResNet.
      num_classes: K.
      width: channels of the classifier.
      dropout: before the classes, training only.
      deep_supervision: a second classifier on stage4, training only.
    """

    backbone: ResNet
    num_classes: int
    width: int = 256
    dropout: float = 0.1
    deep_supervision: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, extent: Extent | None = None, *, train: bool) -> SegmentationOutput:
        """Normalised images [B, H, W, 3] to logits at the backbone's output stride."""
        features = self.backbone(images, extent, train=train)
        classifier = Classifier(self.num_classes, self.width, self.dropout, dtype=self.dtype, name="classifier")
        auxiliary = None
        if self.deep_supervision and train:
            head = Classifier(self.num_classes, self.width, self.dropout, dtype=self.dtype, name="auxiliary")
            auxiliary = head(features[4], extent, train=train)
        return SegmentationOutput(classifier(features[5], extent, train=train), auxiliary)
