"""Compiled inference on images of any size: one program for each pair of canvases, with all passes of a protocol."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.evaluation.canvases import WAITING_PIXELS, Batch, CanvasPair, batches, choose_canvases
from dsnet_jax.evaluation.metrics import confusion_counts
from dsnet_jax.evaluation.passes import merged_labels, passes_over
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol
from dsnet_jax.ops.extent import Extent
from dsnet_jax.ops.normalise import normalise

if TYPE_CHECKING:
    from dsnet_jax.data.pipeline import Example

_compiled: set[tuple] = set()  # What tells the programs of `segment` apart that this process holds.


class Segmenter:
    """A network with its weights, ready to label images on the devices of one process.

    Attributes:
      model: called as `model.apply(variables, images, extent, train=False)`, gives an object with `logits`.
      mesh: devices of this process, one axis "data": batches are split over it, weights are copied to each.
      protocol: what the network is given of an image.
    """

    def __init__(self, model: nn.Module, variables: dict, mesh: Mesh, protocol: Protocol = SINGLE_SCALE):
        """Takes the variables as they are where they lie on the devices of the mesh, otherwise a copy.

        Args:
          model: see above; hashable, because programs are shared by all segmenters with an equal model.
          variables: params, batch_stats; on any devices, but each array whole on every one of them.
          mesh: see above.
          protocol: see above.
        """
        self.model, self.mesh, self.protocol = model, mesh, protocol
        whole = parallel.replicated(mesh)
        there = all(getattr(leaf, "sharding", None) == whole for leaf in jax.tree.leaves(variables))
        self._variables = variables if there else jax.device_put(jax.device_get(variables), whole)

    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Labels a batch, whose size must be a multiple of the device count. Does not wait for the devices.

        Before a program would be one too many for a process (`parallel.share_of_mappings`), all are dropped.

        Returns:
          labels: uint8 [B, Ho, Wo], predicted; 255 outside each `label_hw`.
          counts: the confusion matrix of the batch, int32 [K, K] as in `metrics`; None without true labels.
        """
        shapes = batch.images.shape, batch.labels is not None, batch.label_canvas_hw
        program = self.model, self.mesh, self.protocol, shapes
        if program not in _compiled and parallel.share_of_mappings() > 0.5:
            segment.clear_cache()
            _compiled.clear()
        _compiled.add(program)
        arrays = batch.images, batch.size_hw, self.protocol.scaled_hw(batch.size_hw), batch.labels, batch.label_hw
        arrays = jax.device_put(arrays, parallel.split_by_batch(self.mesh))
        static = {"protocol": self.protocol, "label_canvas_hw": batch.label_canvas_hw}
        return segment(self.model, self._variables, *arrays, **static)

    def whole(self, batch_size: int, why: str = "") -> int:
        """The batch size, rounded up (and said) to a multiple of the device count; `why` follows the one wanted."""
        devices = self.mesh.size
        whole = -(-batch_size // devices) * devices
        if whole != batch_size:
            wanted = f"{batch_size}{why}"
            logging.warning("evaluating %d images at a time, not %s: there are %d devices", whole, wanted, devices)
        return whole

    def run(
        self, examples: Iterable["Example"], batch_size: int
    ) -> Iterator[tuple[Batch, jax.Array, jax.Array | None]]:
        """Labels all examples: yields each batch with what `__call__` returns for it.

        One batch is always under way, so that the devices compute while the host lays out the next.

        Args:
          examples: see `batches`.
          batch_size: images a batch, see `whole`.
        """
        return self._run(batches(examples, self.whole(batch_size)))

    def _run(self, in_turn: Iterable[Batch]) -> Iterator[tuple[Batch, jax.Array, jax.Array | None]]:
        under_way = None
        for batch in in_turn:
            started = batch, *self(batch)
            if under_way is not None:
                yield under_way
            under_way = started
        if under_way is not None:
            yield under_way

    def run_known(
        self,
        examples_at: Callable[[Sequence[int]], Iterable["Example"]],
        sizes_hw: np.ndarray,
        config: ConfigDict,
    ) -> Iterator[tuple[Batch, jax.Array, jax.Array | None]]:
        """As `run`, for examples whose sizes are known beforehand: on the few canvases of `choose_canvases`.

        One canvas after another, the largest first: a program is needed no more when the next one is compiled.

        Args:
          examples_at: gives the examples at positions in `sizes_hw`, in their order.
          sizes_hw: heights and widths of their labels, [N, 2].
          config: of the experiment: data.image_scale, evaluation.padded_share, and evaluation.batch_size, which is
            divided by how much the protocol enlarges an image, if it does; see `whole` for the rest.
        """
        asked, share = config.evaluation.batch_size, config.evaluation.padded_share
        times = max(1.0, self.protocol.enlargement)  # Smaller scales do not make the batch larger than was asked for.
        why = f" ({asked} at single scale: for {self.protocol.name} an image takes {times:g} times the memory)"
        batch_size = self.whole(max(1, int(asked / times)), why if times > 1 else "")
        canvases = choose_canvases(sizes_hw, config.data.image_scale, self.protocol, batch_size, share)

        def order(position: int) -> tuple:
            image, label = canvases[tuple(sizes_hw[position].tolist())]
            return -image[0] * image[1], image, label, position

        def canvases_of(example: "Example") -> CanvasPair:
            return canvases[example.label_hw]

        examples = examples_at(sorted(range(len(sizes_hw)), key=order))
        canvas_by_canvas = itertools.groupby(examples, canvases_of)  # Also the batches that are not full.
        in_turn = (batches(group, batch_size, WAITING_PIXELS, canvases_of) for _, group in canvas_by_canvas)
        return self._run(itertools.chain.from_iterable(in_turn))


@partial(jax.jit, static_argnames=("model", "protocol", "label_canvas_hw"))
def segment(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    size_hw: jax.Array,
    scaled_hw: jax.Array,
    labels: jax.Array | None,
    label_hw: jax.Array,
    *,
    protocol: Protocol,
    label_canvas_hw: tuple[int, int],
) -> tuple[jax.Array, jax.Array | None]:
    """The compiled program: from images to predicted labels and, given true ones, their confusion counts.

    Arguments and results are those of `Segmenter`; `scaled_hw` [B, S, 2] are `protocol.scaled_hw` of the sizes.
    """
    extent = Extent(size_hw, images.shape[1:3])
    images = extent.zero_outside(normalise(images))

    def network(images: jax.Array, extent: Extent) -> jax.Array:
        return model.apply(variables, images, extent, train=False).logits

    passes = passes_over(network, images, extent, scaled_hw, label_hw, label_canvas_hw, protocol)
    predictions = merged_labels(passes, label_hw)
    counts = None if labels is None else confusion_counts(labels, predictions, passes[0].logits.shape[-1])
    return predictions, counts
