"""The Dynamic Sampling Network: the paper's Figure 3."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.cgds import CGDS
from dsnet_jax.models.classifier import Classifier
from dsnet_jax.models.layers import ConvNormRelu, SegmentationOutput
from dsnet_jax.models.resnet import ResNet
from dsnet_jax.ops import Extent


class DSNet(nn.Module):
    """Backbone, ASPP, CGDS and classifier.

    Attributes:
      backbone: a ResNet.
      num_classes: K.
      width: channels of ASPP, CGDS and the classifier.
      atrous_rates: ASPP's dilations at output stride 16; scaled with the backbone's.
      low_level_stage: X(i) that is sampled, 3, 4 or 5 (Table 1).
      guide: what predicts the points and joins the concatenation: aspp, or stage5 projected to `width` (Table 1).
      sampling_kernel: k.
      modification_kernel: side of the feature modification's convolution.
      dropout: before the classes, training only.
      deep_supervision: a classifier on stage4, training only.
    """

    backbone: ResNet
    num_classes: int
    width: int = 256
    atrous_rates: Sequence[int] = (6, 12, 18)
    low_level_stage: int = 3
    guide: str = "aspp"
    sampling_kernel: int = 3
    modification_kernel: int = 1
    dropout: float = 0.1
    deep_supervision: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, extent: Extent | None = None, *, train: bool) -> SegmentationOutput:
        """Normalised images [B, H, W, 3] to logits on the grid of the low-level stage.

        Raises:
          ValueError: guide or low_level_stage is none of those above.
        """
        if self.guide not in ("aspp", "stage5") or self.low_level_stage not in (3, 4, 5):
            raise ValueError(f"guide is {self.guide!r}, low_level_stage is {self.low_level_stage}: see their choices")
        features = self.backbone(images, extent, train=train)
        if self.guide == "aspp":
            rates = [max(1, rate * 16 // self.backbone.output_stride) for rate in self.atrous_rates]
            guide = ASPP(self.width, rates, dtype=self.dtype, name="aspp")
        else:
            guide = ConvNormRelu(self.width, dtype=self.dtype, name="guide")
        high_level = guide(features[5], extent, train=train)
        cgds = CGDS(
            self.width,
            self.sampling_kernel,
            self.modification_kernel,
            stride_ratio=min(2**self.low_level_stage / self.backbone.output_stride, 1.0),
            dtype=self.dtype,
            name="cgds",
        )
        points = cgds(features[self.low_level_stage], high_level, extent, train=train)
        classifier = Classifier(self.num_classes, self.width, self.dropout, dtype=self.dtype, name="classifier")
        auxiliary = None
        if self.deep_supervision and train:
            head = Classifier(self.num_classes, self.width, self.dropout, dtype=self.dtype, name="auxiliary")
            auxiliary = head(features[4], extent, train=train)
        return SegmentationOutput(
            logits=classifier(points.concatenated(), extent, train=train),
            auxiliary_logits=auxiliary,
            offsets=points.offsets,
        )
