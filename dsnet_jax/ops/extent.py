"""Which cells of a padded batch are real."""

import flax.struct
import jax
import jax.numpy as jnp

CANVAS_MULTIPLE = 32  # The coarsest output stride: every feature map then divides the canvas evenly.


@flax.struct.dataclass
class Extent:
    """The valid part of images that lie in the top-left corners of one canvas.

    Modules take it as their last argument and give the valid part of their output the value that the bare image would
    have had; None says that every cell is valid and leaves the program as if there were no such argument.

    Attributes:
      size_hw: valid height and width of each image in canvas pixels, int32 [B, 2], at least 1.
      canvas_hw: height and width of the canvas in pixels, multiples of `CANVAS_MULTIPLE`; static.
    """

    size_hw: jax.Array
    canvas_hw: tuple[int, int] = flax.struct.field(pytree_node=False)

    def __post_init__(self):
        if any(side % CANVAS_MULTIPLE for side in self.canvas_hw):
            raise ValueError(f"canvas_hw is {self.canvas_hw}: both sides must be multiples of {CANVAS_MULTIPLE}")

    def valid_hw(self, feature_hw: tuple[int, int]) -> jax.Array:
        """Valid cells of a feature map of `feature_hw` cells, which divide the canvas, int32 [B, 2].

        ceil(size * feature / canvas), divided by the stride instead: the product of two sides may be beyond int32.
        """
        stride_hw = [canvas // feature for canvas, feature in zip(self.canvas_hw, feature_hw, strict=True)]
        return -(-self.size_hw // jnp.array(stride_hw, jnp.int32))

    def mask(self, feature_hw: tuple[int, int]) -> jax.Array:
        """True where a cell of a feature map is valid, bool [B, H, W, 1]."""
        valid = self.valid_hw(feature_hw)
        rows = jnp.arange(feature_hw[0]) < valid[:, :1]
        columns = jnp.arange(feature_hw[1]) < valid[:, 1:]
        return (rows[:, :, None] & columns[:, None, :])[..., None]

    def zero_outside(self, x: jax.Array) -> jax.Array:
        """`x` [B, H, W, C] with zero in the cells that are not valid."""
        return jnp.where(self.mask(x.shape[1:3]), x, jnp.zeros((), x.dtype))
