"""The step of a config: each of its fields reaches what it is meant for."""

import flax.linen as nn
import jax
import numpy as np

from dsnet_jax.config import default_config
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.program import step_of
from dsnet_jax.training.step import initial_state, make_train_step

FIELDS = {
    "optimizer": {
        "base_lr": 0.3,
        "poly_power": 0.5,
        "momentum": 0.4,
        "weight_decay": 0.02,
        "decay_norm_and_bias": False,
        "backbone_lr_multiplier": 0.6,
        "head_lr_multiplier": 0.7,
        "offset_lr_multiplier": 0.8,
    },
    "model": {"deep_supervision_weight": 0.25},
    "training": {"accumulation_steps": 2, "ema_decay": 0.15},
}


class Small(nn.Module):
    """With a part for each rate, weights and biases, statistics, dropout and an auxiliary head."""

    @nn.compact
    def __call__(self, images, extent=None, *, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="backbone")(images))
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4, name="offset")(x))
        return SegmentationOutput(nn.Dense(3, name="head")(x), nn.Dense(3, name="auxiliary")(x))


def batch_of(seed):
    rng = np.random.default_rng(seed)
    image, label = rng.integers(0, 256, (4, 8, 8, 3), np.uint8), rng.integers(0, 3, (4, 8, 8)).astype(np.uint8)
    return {"image": image, "label": label, "stop_requested": np.zeros(1, np.int32)}


def after_three_steps(fresh_state, step):
    state = fresh_state()
    for seed in range(3):
        state, _ = jax.jit(step)(state, batch_of(seed))
    return jax.tree.leaves(state.to_trees())


def test_a_step_is_that_of_its_config():
    config = default_config()
    config.seed = 3
    for part, fields in FIELDS.items():
        config[part].update(fields)
    of_config = after_three_steps(*step_of(config, Small(), 5))

    model, optimizer = Small(), sgd(0.4, 0.02, False, 0.6, 0.7, 0.8)
    step = make_train_step(model, optimizer, poly_schedule(0.3, 0.5, 5), 3, 0.25, 2, 0.15)
    expected = after_three_steps(lambda: initial_state(model, optimizer, 3, 0.15), step)
    for found, wanted in zip(of_config, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
