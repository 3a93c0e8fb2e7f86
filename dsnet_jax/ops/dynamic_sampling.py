"""Convolution over sampled points: equation 2 of the paper, its gradient, and which formulation runs where.

Points and offsets are (y, x) in pixels of the map that is sampled; the centre of its top-left cell is (0, 0).
"""

from functools import partial

import jax
from jax.export import is_symbolic_dim

from dsnet_jax.ops import sampling_by_gather, sampling_by_products
from dsnet_jax.ops.manual_axes import varying_alike
from dsnet_jax.ops.taps import Taps

FORMULATIONS = {"gather": sampling_by_gather, "hat": sampling_by_products}

# Beyond it the products with hat matrices, whose cost grows with the square of the area, are not worth their cost on
# any device: H*W/D times that of the convolution itself. Crops of 512 and 576 at stride 8 have 4096 and 5184 cells.
MAX_CELLS_BY_PRODUCTS = 8192


@partial(jax.jit, static_argnames="formulation")
def dynamic_sampling_conv(
    features: jax.Array,
    offsets: jax.Array,
    kernel: jax.Array,
    modulation: jax.Array | None = None,
    *,
    formulation: str | None = None,
) -> jax.Array:
    """Dynamic sampling convolution: a k x k convolution whose k*k points are moved by offsets.

    At every position (i, j) tap (m, n) reads the map at (i + m - (k-1)/2 + dy, j + n - (k-1)/2 + dx), bilinearly and
    zero outside, and multiplies what it reads by the kernel's own matrix [m, n]. Zero offsets make it an ordinary
    convolution with zero padding. One tap is computed at a time; of the forward pass nothing but the arguments is kept
    for the gradient, which samples anew, so that no buffer of k*k samples exists. At a whole number the gradient by an
    offset is the forward difference, as PyTorch's is.

    It may be called inside of `jax.vmap`, `jax.checkpoint`, `jax.shard_map`; on a mesh with explicit axes (the default
    of `jax.make_mesh`) by `jax.sharding.auto_axes`.

    Source: DSNet, equation 2; with `modulation`, Deformable ConvNets v2, equation 1.

    Args:
      features: [B, H, W, C], any float type; sums are accumulated in float32.
      offsets: [B, H, W, k*k, 2], (dy, dx) in pixels, row by row over the k x k grid; any finite value, kept in float32.
      kernel: [k, k, C, D], k odd.
      modulation: [B, H, W, k*k], factors on the samples; None: all one.
      formulation: "gather" or "hat", both exact; None: the one for the platform that the program is compiled for.

    Returns:
      [B, H, W, D] in the type of `features`.

    Raises:
      ValueError: k is even, shapes do not fit each other, or there is no such formulation.
    """
    batch, height, width, channels = features.shape
    size = kernel.shape[0]
    if size % 2 == 0 or kernel.ndim != 4 or kernel.shape[:3] != (size, size, channels):
        raise ValueError(f"kernel is {kernel.shape}: [k, k, {channels}, D] with k odd is needed")
    if offsets.shape != (batch, height, width, size * size, 2):
        raise ValueError(f"offsets are {offsets.shape}: {(batch, height, width, size * size, 2)} is needed")
    if modulation is not None and modulation.shape != offsets.shape[:-1]:
        raise ValueError(f"modulation is {modulation.shape}: {offsets.shape[:-1]} is needed")
    if formulation not in (None, *FORMULATIONS):
        raise ValueError(f"formulation is {formulation!r}: one of {[*FORMULATIONS]}, or None, is needed")
    return _convolve(formulation, *varying_alike(features, offsets, kernel, modulation))


def _run(function: str, formulation: str | None, features: jax.Array, *arguments):
    """Calls `forward` or `backward` of the formulation asked for, or of the platform's own.

    CPU and CUDA gather: measured on CPU (docs/performance.md), not on CUDA, which reads single cells fast. A TPU
    gathers row after row, while matrix products are what it is built for: products, not measured there either. At 64x64
    cells of 256 channels the products that stand for reading or adding one cell take 2.7 ns at a v5e's peak, a cell
    being 512 bytes in bfloat16: gathering is quicker if it reaches a quarter of the memory's bandwidth. "hat" is also
    for deterministic runs on CUDA, where a scatter adds up in no fixed order (and slowly with jaxlib 0.10.2 and 0.11.0
    but for a flag that `parallel.configure` sets; who calls this without our commands sets it too, or asks for "hat").
    """
    by_gather, by_products = (getattr(module, function) for module in FORMULATIONS.values())
    if formulation is not None:
        return getattr(FORMULATIONS[formulation], function)(features, *arguments)
    cells = features.shape[1] * features.shape[2]
    if is_symbolic_dim(cells) or cells > MAX_CELLS_BY_PRODUCTS:  # An exported program's size may not be known.
        return by_gather(features, *arguments)
    return jax.lax.platform_dependent(features, *arguments, tpu=by_products, default=by_gather)


def _taps(offsets: jax.Array, kernel: jax.Array, modulation: jax.Array | None) -> Taps:
    return Taps(offsets, kernel.reshape(-1, *kernel.shape[2:]), modulation)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(formulation, features, offsets, kernel, modulation):
    output = _run("forward", formulation, features, _taps(offsets, kernel, modulation))
    return output.reshape(*features.shape[:3], -1).astype(features.dtype)


def _convolve_keeping_arguments(formulation, *arguments):
    return _convolve(formulation, *arguments), arguments


def _gradients(formulation, arguments, cotangent):
    features, *taps = arguments
    cotangent = cotangent.reshape(features.shape[0], -1, cotangent.shape[-1])
    by_features, by_taps = _run("backward", formulation, features, _taps(*taps), cotangent)
    gradients = by_features, by_taps.offsets, by_taps.kernel, by_taps.factors
    return jax.tree.map(lambda gradient, like: gradient.reshape(like.shape).astype(like.dtype), gradients, arguments)


_convolve.defvjp(_convolve_keeping_arguments, _gradients)
