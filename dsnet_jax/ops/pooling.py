"""Means over a grid of bins, of maps whose valid parts differ in size."""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.extent import Extent
from dsnet_jax.ops.precision import float32_or_wider


def adaptive_mean(x: jax.Array, bins: int, extent: Extent | None = None) -> jax.Array:
    """Means over `bins` x `bins` bins of the valid part, as `torch.nn.functional.adaptive_avg_pool2d` takes them.

    Bin i of a side of n cells has the cells from floor(i n / bins) up to ceil((i + 1) n / bins): neighbours overlap
    where n does not divide. Two products with matrices of membership, zeros and ones, one for each axis: which cells a
    bin has may so differ from image to image, and cells beyond the valid part are in none.

    Args:
      x: [B, H, W, C], finite; sums are accumulated in float32.
      bins: of either side; may be more than there are cells.
      extent: of the images; None: every cell is valid.

    Returns:
      float32 [B, bins, bins, C].
    """
    sizes = jnp.array([x.shape[1:3]]) if extent is None else extent.valid_hw(x.shape[1:3])
    for axis in (0, 1):
        bin_of = jnp.arange(bins)
        first = (bin_of * sizes[:, axis, None] // bins)[..., None]
        after = (-(-(bin_of + 1) * sizes[:, axis, None] // bins))[..., None]
        cells = jnp.arange(x.shape[1 + axis])
        members = ((first <= cells) & (cells < after)).astype(x.dtype)
        members = jnp.broadcast_to(members, (x.shape[0], *members.shape[1:]))
        pattern = ("bih,bhwc->biwc", "biw,bhwc->bhic")[axis]
        precise = float32_or_wider(x.dtype)
        sums = jnp.einsum(pattern, members, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=precise)
        counts = (after - first).astype(precise)
        x = sums / (counts[..., None] if axis == 0 else counts[:, None])
    return x
