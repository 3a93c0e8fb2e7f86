"""The Dynamic Sampling Network: the paper's Figure 3."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.cgds import CGDS
from dsnet_jax.models.classifier import classify
from dsnet_jax.models.layers import ConvNormRelu, SegmentationOutput
from dsnet_jax.models.pyramid import PyramidPooling
from dsnet_jax.models.resnet import ResNet
from dsnet_jax.ops import Extent

GUIDES = ("aspp", "pyramid", "stage5")


class DSNet(nn.Module):
    """Backbone, context, CGDS and classifier.

    The paper calls CGDS a plug-and-play module. With ASPP as context it makes DSNet; with pyramid pooling it is PSPNet
    that it is plugged into, and with stage5 itself, which needs no context module, FCN.

    Attributes:
      backbone: a ResNet.
      num_classes: K.
      width: channels of ASPP, CGDS and the classifier.
      atrous_rates: ASPP's dilations at output stride 16; scaled with the backbone's.
      aspp_dropout: behind ASPP, training only.
      low_level_stage: X(i) that is sampled, 3, 4 or 5 (Table 1).
      guide: what predicts the points and joins the concatenation: aspp, or pyramid (pooling) or stage5 (Table 1), these
        two projected to `width`.
      sampling: where CGDS has its points from: `cgds.SAMPLINGS`.
      sampling_kernel: k.
      sampling_formulation: as of `dynamic_sampling_conv`; None: the platform's own.
      modification_kernel: side of the feature modification's convolution.
      dropout: before the classes, training only.
      deep_supervision: a classifier on stage4, training only.
      auxiliary_width: channels of that one; 0: `width`.
    """

    backbone: ResNet
    num_classes: int
    width: int = 256
    atrous_rates: Sequence[int] = (6, 12, 18)
    aspp_dropout: float = 0.0
    low_level_stage: int = 3
    guide: str = "aspp"
    sampling: str = "predicted"
    sampling_kernel: int = 3
    sampling_formulation: str | None = None
    modification_kernel: int = 1
    dropout: float = 0.1
    deep_supervision: bool = True
    auxiliary_width: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, extent: Extent | None = None, *, train: bool) -> SegmentationOutput:
        """Normalised images [B, H, W, 3] to logits on the grid of the low-level stage.

        Raises:
          ValueError: guide, low_level_stage or sampling is none of those above.
        """
        if self.guide not in GUIDES or self.low_level_stage not in (3, 4, 5):
            raise ValueError(f"guide is {self.guide!r}, low_level_stage is {self.low_level_stage}: see their choices")
        features = self.backbone(images, extent, train=train)
        stride, x = self.backbone.output_stride, features[5]
        if self.guide == "aspp":
            guide = ASPP(self.width, self.atrous_rates, stride, self.aspp_dropout, dtype=self.dtype, name="aspp")
        else:
            guide = ConvNormRelu(self.width, dtype=self.dtype, name="guide")
        if self.guide == "pyramid":
            x = PyramidPooling(dtype=self.dtype, name="pyramid")(x, extent, train=train)
        high_level = guide(x, extent, train=train)
        cgds = CGDS(
            self.width,
            self.sampling_kernel,
            self.modification_kernel,
            stride_ratio=min(2**self.low_level_stage / stride, 1.0),
            sampling=self.sampling,
            formulation=self.sampling_formulation,
            dtype=self.dtype,
            name="cgds",
        )
        points = cgds(features[self.low_level_stage], high_level, extent, train=train)
        return classify(self, points.concatenated(), features[4], extent, train, points.offsets)
