"""Can the network fit what its output grid can hold? Overfits a few images and compares with freely fitted logits.

    .venv/bin/python scripts/overfit.py --config=configs/camvid_dsnet_r18.py --images=8 --steps=800

Two mIoUs are printed, both on the training images at working resolution: that of the network, and that of logits on its
output grid that are fitted to the labels directly, the most that any network of this stride can reach. Both grids are
stretched to images whose sides are no multiples of the stride, in place of the cells that an evaluation has beyond. A
ratio well below 1 says that the network, the loss or the data path loses something.
"""

import argparse
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.config import load_config
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.records import open_split
from dsnet_jax.data.transforms import augment, scaled_size_hw
from dsnet_jax.evaluation.metrics import confusion_counts, score
from dsnet_jax.experiment import build_model
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.progress import track
from dsnet_jax.training.losses import cross_entropy
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import initial_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800)
    options, rest = parser.parse_known_args()
    config = load_config(rest)
    parallel.configure()

    split = open_split(config.data.root, config.data.name, config.data.train_split)
    batch = load_batch(split, np.linspace(0, len(split) - 1, options.images, dtype=int), config)
    num_classes = split.spec.num_classes
    model = build_model(config.model, num_classes)
    logits = fit_network(model, batch, config, options.steps)
    free = fit_logits(logits.shape, batch["label"])
    network_miou, free_miou = (miou_of(values, batch["label"], num_classes) for values in (logits, free))
    print(f"network {network_miou:.4f}, free logits {free_miou:.4f}, ratio {network_miou / free_miou:.4f}")


def load_batch(split, indices: np.ndarray, config: ConfigDict) -> dict[str, jax.Array]:
    """Whole images at working resolution: image uint8 [B, h, w, 3] and label uint8 [B, h, w]."""
    images, labels = [], []
    for index in indices.tolist():
        record = split[index]
        image, label = decode_image(record.image, record.id), decode_mask(record.label, record.id)
        size_hw = scaled_size_hw(label.shape, config.data.image_scale)
        image, label = augment(image, label, np.random.default_rng(0), size_hw, config.data.image_scale, (1, 1), 0)
        images.append(image)
        labels.append(label)
    if len({image.shape for image in images}) > 1:
        sys.exit("the images have different sizes: they cannot make one batch")
    return {"image": jnp.asarray(np.stack(images)), "label": jnp.asarray(np.stack(labels))}


def fit_network(model: nn.Module, batch: dict[str, jax.Array], config: ConfigDict, steps: int) -> jax.Array:
    """Trains on the batch alone and returns the logits of evaluation, float32 [B, h, w, K]."""
    schedule = poly_schedule(config.optimizer.base_lr, config.optimizer.poly_power, steps)
    optimizer = sgd(config.optimizer.momentum, 0.0, True, 1.0, 1.0, config.optimizer.offset_lr_multiplier)
    state = jax.jit(lambda: initial_state(model, optimizer, config.seed))()
    step = jax.jit(make_train_step(model, optimizer, schedule, config.seed, 0.0), donate_argnums=0)
    batch = batch | {"stop_requested": jnp.zeros(1, jnp.int32)}
    for _ in track(range(steps), "fitting the network"):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    apply = jax.jit(lambda variables, images: model.apply(variables, normalise(images), train=False).logits)
    return apply(state.variables, batch["image"])


def fit_logits(shape: tuple[int, ...], labels: jax.Array, steps: int = 300) -> jax.Array:
    """Logits of a shape, fitted to the labels by Adam."""
    logits, optimizer = jnp.zeros(shape), optax.adam(0.3)

    @jax.jit
    def step(logits, state, labels):
        # The mean's gradient is as small as there are many pixels; Adam's own epsilon is not to matter.
        gradient = jax.grad(lambda values: labels.size * cross_entropy(values, labels))(logits)
        updates, state = optimizer.update(gradient, state)
        return logits + updates, state

    state = optimizer.init(logits)
    for _ in track(range(steps), "fitting free logits"):
        logits, state = step(logits, state, labels)
    return logits


def miou_of(logits: jax.Array, labels: jax.Array, num_classes: int) -> float:
    """mIoU of the resized logits' classes."""
    predictions = jnp.argmax(resize_bilinear(logits, labels.shape[1:]), axis=-1)
    return score(np.asarray(confusion_counts(labels, predictions, num_classes), np.int64)).miou


if __name__ == "__main__":
    main()
