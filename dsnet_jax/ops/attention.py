"""Attention from every position to every other one, in bands."""

from functools import partial

import jax
import jax.numpy as jnp

from dsnet_jax.ops.precision import float32_or_wider

# Of the products of queries and keys, how many exist at a time for one image: 8 MB in float32. A crop of 512 x 512 at
# stride 16 has 2^20; an image of 1024 x 2048 has 2^26, 268 MB.
MAX_PRODUCTS = 2**21


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array | None = None,
    max_products: int = MAX_PRODUCTS,
) -> jax.Array:
    """For each query the mean of the values, weighted by the softmax of its scaled products with the keys.

    Queries go in bands of equal length, one after another, each computed anew for the gradient: of the [N, M] weights
    no more than a band is ever kept, forward or backward. The price is a second pass forward when training.

    Args:
      queries: [B, N, D], any float type; products and the softmax are float32.
      keys: [B, M, D].
      values: [B, M, E].
      valid: which keys count, bool [B, M], at least one of each image; None: all.
      max_products: N x M of a band, for each image.

    Returns:
      [B, N, E] in the type of `values`.
    """
    batch, count, width = queries.shape
    bands = -(-count * keys.shape[1] // max_products)
    length = -(-count // bands)
    bands = -(-count // length)
    precise = float32_or_wider(queries.dtype)

    @partial(jax.checkpoint, prevent_cse=bands == 1)
    def of_band(band):
        products = jnp.einsum("bnd,bmd->bnm", band, keys, preferred_element_type=precise) / width**0.5
        if valid is not None:
            products = jnp.where(valid[:, None], products, -jnp.inf)
        weights = jax.nn.softmax(products).astype(values.dtype)
        return jnp.einsum("bnm,bme->bne", weights, values)

    if bands == 1:
        return of_band(queries)
    padded = jnp.pad(queries, ((0, 0), (0, bands * length - count), (0, 0)))
    result = jax.lax.map(of_band, padded.reshape(batch, bands, length, width).swapaxes(0, 1))
    return result.swapaxes(0, 1).reshape(batch, bands * length, -1)[:, :count]
