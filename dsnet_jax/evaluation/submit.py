"""Labels a prepared split for the server of its benchmark: `dsnet predict --submission`."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from dsnet_jax import parallel
from dsnet_jax.data.pipeline import Example, evaluation_examples
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.protocols import FIELDS, protocol_named
from dsnet_jax.evaluation.submissions import write_submission
from dsnet_jax.evaluation.trained import load_trained, open_split_of
from dsnet_jax.progress import track


def predict_submission(
    workdir: epath.PathLike,
    step: int | str | None,
    split: str,
    submission: str | os.PathLike,
    root: str | None = None,
    protocol: str = "ss",
    config_flags: Sequence[str] = (),
) -> None:
    """Labels every image of a split at its own size and writes the archive that the benchmark's server takes.

    The split may lack labels, as `test` does. All of it is predicted by this process, with its devices.

    Args:
      workdir: of the run.
      step: of the checkpoint; "best"; None: the last.
      split: of the run's data set.
      submission: the archive, on this machine; replaced when the new one is complete and valid.
      root: where prepared data sets lie; None: `config.data.root`.
      protocol: one of `protocols.NAMES`.
      config_flags: see `load_trained`.

    Raises:
      InputError: the run or the split cannot be used, its data set has no format for submissions, there is no such
        protocol, or the archive cannot be written.
    """
    trained = load_trained(workdir, step, config_flags, {"batch_size", "padded_share", *FIELDS.get(protocol, ())})
    config = trained.config
    data = open_split_of(trained, workdir, split, root)
    seen = protocol_named(protocol, config)

    def predictions() -> Iterator[tuple[str, np.ndarray]]:
        segmenter = Segmenter(trained.model, trained.variables, parallel.local_mesh(), seen)

        def examples_at(positions: Sequence[int]) -> Iterator[Example]:
            examples = evaluation_examples(data, config.data.image_scale, positions, config.data.read_threads)
            return track(examples, f"labelling {data.spec.name} {data.name}", len(data))

        for batch, labels, _ in segmenter.run_known(examples_at, data.sizes_hw, config):
            for example, prediction in batch.cropped(labels):
                yield example.id, prediction

    write_submission(submission, data, predictions())
    print(
        f"{len(data)} images of {data.spec.name} {data.name} labelled into {submission} ({protocol}, step "
        f"{trained.step}): a valid submission"
    )
