"""Pure functions of arrays: no Flax, no parameters, no config."""

from dsnet_jax.ops.dynamic_sampling import dynamic_sampling_conv
from dsnet_jax.ops.extent import Extent
from dsnet_jax.ops.resize import resize_bilinear
from dsnet_jax.ops.sampling_by_gather import bilinear_sample

__all__ = ["Extent", "bilinear_sample", "dynamic_sampling_conv", "resize_bilinear"]
