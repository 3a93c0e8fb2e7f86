"""Batch normalisation taken into the convolutions before it, for inference."""

from typing import Any

import numpy as np

from dsnet_jax.models.layers import EPSILON

# What a batch normalisation called `norm` normalises, by the name in its scope: a convolution's, a non-local block's
# projection, a dynamic filter's generator (whose result is a kernel, one value a channel), the sampling convolution's
# own kernel.
PRODUCERS = ("conv", "project", "generate", "kernel")


def fold_batch_norm(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of the same network, whose every batch normalisation adds a bias and does nothing else.

    Scale and statistics go into the kernel of the convolution before it, computed in float64; what remains has mean 0,
    scale 1 and the variance that with epsilon makes 1, so that the network's own definition runs it, in inference.

    Args:
      variables: params and batch_stats, float32, of any network of `models`.

    Returns:
      NumPy arrays in the same tree; nothing of `variables` is changed.

    Raises:
      ValueError: a batch normalisation follows nothing that is known.
    """
    params = _copied(variables["params"])
    statistics = _copied(variables["batch_stats"])
    _fold(params, statistics, "")
    return {**variables, "params": params, "batch_stats": statistics}


def _copied(tree: Any) -> Any:
    return {name: _copied(leaf) for name, leaf in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


def _fold(params: dict, statistics: dict, path: str) -> None:
    for name, inside in statistics.items():
        if "mean" not in inside:
            _fold(params[name], inside, f"{path}/{name}")
            continue
        norm = params[name]
        scale, bias, mean, variance = (
            np.asarray(array, np.float64) for array in (norm["scale"], norm["bias"], inside["mean"], inside["var"])
        )
        rate = scale / np.sqrt(variance + EPSILON)
        producer = _producer(params, name, path)
        shift = bias - mean * rate
        for part in ("kernel", "bias"):
            if part in producer:
                producer[part] = (producer[part] * rate).astype(producer[part].dtype)
        ones = np.ones_like(norm["scale"])
        norm["scale"], norm["bias"] = ones, shift.astype(ones.dtype)
        inside["mean"], inside["var"] = np.zeros_like(ones), ones * np.asarray(1 - EPSILON, ones.dtype)


def _producer(params: dict, norm: str, path: str) -> dict:
    """The scope whose kernel, and bias, make what `norm` normalises."""
    names = PRODUCERS if norm == "norm" else (norm.replace("norm", "conv"),)
    for name in names:
        if name in params:
            return params if name == "kernel" else params[name]
    raise ValueError(f"{path}/{norm}: of {', '.join(names)} none is beside it")
