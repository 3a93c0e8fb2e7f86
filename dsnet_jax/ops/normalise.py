"""Images as the networks want them."""

import jax
import jax.numpy as jnp

# Of ImageNet's RGB, in units of 0..1: what torchvision's weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)


def normalise(images: jax.Array) -> jax.Array:
    """RGB images, uint8 [..., 3], as float32 of the same shape: (x / 255 - mean) / standard deviation.

    Raises:
      TypeError: the images are not uint8, so that their range is not known.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images are {images.dtype}: uint8 is needed")
    return (images.astype(jnp.float32) / 255.0 - jnp.array(MEAN)) / jnp.array(STANDARD_DEVIATION)
