"""DSNet, Context Guided Dynamic Sampling for semantic segmentation, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsnet_jax.predictor import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load`, once somebody asks for it: the command line starts without importing JAX."""
    if name == "load":
        from dsnet_jax.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
