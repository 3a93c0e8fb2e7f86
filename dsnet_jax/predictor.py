"""Labels for arrays: `dsnet_jax.load`."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from dsnet_jax import parallel
from dsnet_jax.data.pipeline import Example, example_of
from dsnet_jax.data.specs import Colour
from dsnet_jax.errors import InputError, reaching
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.protocols import protocol_named
from dsnet_jax.evaluation.trained import Trained, load_trained
from dsnet_jax.experiment import build_model
from dsnet_jax.weights.safetensors import read_safetensors


def load(path: epath.PathLike, step: int | str | None = None, protocol: str = "ss", batch_size: int = 1) -> "Predictor":
    """A trained network, ready to label images.

    Args:
      path: of a workdir, or of a file of `dsnet export --format=safetensors`.
      step: of the checkpoint in a workdir; "best"; None: the last. A file has one.
      protocol: what the network sees of an image: ss, flip, ms_flip or slide.
      batch_size: images of one canvas that are computed at a time; rounded up, and said, to a multiple of the devices.

    Raises:
      InputError: there is nothing that can be used; a step is given with a file; or the batch size is less than 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: 1 or more is needed")
    with reaching(path, "give another path"):
        place = epath.Path(path)
        is_file = not place.is_dir() and (place.exists() or place.suffix == ".safetensors")
    if is_file:
        if step is not None:
            raise InputError(f"{path}: a file has one step, {step!r} cannot be chosen: give the workdir, or no step")
        config, spec, variables, found = read_safetensors(path)
        trained = Trained(config, spec, build_model(config.model, spec.num_classes), variables, found)
    else:
        trained = load_trained(path, step)
    return Predictor(trained, protocol, batch_size)


class Predictor:
    """A trained network that labels images of any size.

    Attributes:
      trained: config, classes, network and weights.
      class_names: what a label means, by position.
      palette: colours of the labels, (red, green, blue).
    """

    def __init__(self, trained: Trained, protocol: str, batch_size: int):
        self.trained = trained
        self.class_names: tuple[str, ...] = trained.spec.class_names
        self.palette: tuple[Colour, ...] = trained.spec.palette
        seen = protocol_named(protocol, trained.config)
        self._segmenter = Segmenter(trained.model, trained.variables, parallel.local_mesh(), seen)
        self._batch_size = self._segmenter.whole(batch_size)

    def predict(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        """The labels of an image, or of several.

        Images of one canvas make a batch, which is filled up with what is ignored. A program is compiled for each
        canvas; `JAX_COMPILATION_CACHE_DIR` keeps them.

        Args:
          images: RGB, uint8 [H, W, 3]; or a sequence of such, of any sizes, an array [B, H, W, 3] for instance.

        Returns:
          uint8 [H, W], positions in `class_names`; for a sequence a list of them.

        Raises:
          ValueError: an image is something else.
        """
        single = isinstance(images, (np.ndarray, jax.Array)) and images.ndim == 3
        several = [np.asarray(image) for image in ([images] if single else images)]
        labels: list[np.ndarray] = [None] * len(several)
        for batch, predicted, _ in self._segmenter.run(self._examples(several), self._batch_size):
            for example, own in batch.cropped(predicted):
                labels[example.index] = own.copy()  # Of the whole batch it would be a view, which cannot be written.
        return labels[0] if single else labels

    def _examples(self, images: list[np.ndarray]) -> Iterator[Example]:
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"image {index} is {image.dtype}{list(image.shape)}: uint8 [H, W, 3], RGB, is needed")
            yield example_of(index, f"image {index}", image, None, self.trained.config.data.image_scale)

    def colourise(self, labels: np.ndarray) -> np.ndarray:
        """Labels, uint8 [H, W], in their colours: RGB, uint8 [H, W, 3]."""
        return self.trained.spec.colourise(labels)
