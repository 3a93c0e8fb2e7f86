"""SGD, against PyTorch's and against its definition written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsnet_jax.training.optimizer import poly_schedule, sgd

PLAIN = {
    "momentum": 0.9,
    "weight_decay": 0.01,
    "decay_norm_and_bias": True,
    "backbone_lr_multiplier": 1.0,
    "head_lr_multiplier": 1.0,
    "offset_lr_multiplier": 1.0,
}


def parameters():
    """One of each kind, as a DSNet names them."""
    rng = np.random.default_rng(0)

    def conv(*shape):
        return {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[-1])}

    return {
        "backbone": {"stem": {"conv": conv(3, 3, 3, 4), "norm": {"scale": rng.normal(size=4)}}},
        "cgds": {"offset": conv(3, 3, 4, 18), "kernel": rng.normal(size=(3, 3, 4, 4))},
        "classifier": {"logits": conv(1, 1, 4, 2)},
    }


def train(schedule, settings, params, gradients):
    """Parameters after each step, taken as the train step does."""
    with jax.enable_x64(True):
        optimizer = sgd(**settings)
        params = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(params)
        steps = []
        for step, gradient in enumerate(gradients):
            direction, state = jax.jit(optimizer.update)(gradient, state, params)
            params = optax.apply_updates(params, optax.tree.scale(-schedule(step), direction))
            steps.append(jax.tree.map(np.asarray, params))
        return steps


def by_definition(lr_of_step, settings, params, gradients, rate_of, decays):
    """torch.optim.SGD: d = g + decay * p; m = momentum * m + d; p = p - lr * m. By path of the parameter."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    momenta = [0.0] * len(paths)
    values = [value for _, value in paths]
    steps = []
    for step, gradient in enumerate(gradients):
        for index, ((path, _), g) in enumerate(zip(paths, jax.tree.leaves(gradient), strict=True)):
            names = tuple(key.key for key in path)
            direction = g + settings["weight_decay"] * decays(names) * values[index]
            momenta[index] = settings["momentum"] * momenta[index] + direction
            values[index] = values[index] - lr_of_step(step) * rate_of(names) * momenta[index]
        steps.append(jax.tree.unflatten(structure, list(values)))
    return steps


def random_gradients(params, steps=4):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(steps)]


def assert_same(ours, theirs):
    """To the rounding of the schedule, which is float32."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours, theirs)


def test_steps_are_those_of_pytorch():
    """torch.optim.SGD(momentum=0.9, weight_decay=0.01) with lr 0.1 * (1 - step / 4) ** 0.9, and a fifth for the second
    parameter, which does not decay; computed with PyTorch 2 in float64."""
    expected = [
        [0.949, -1.898, 0.46],
        [0.8935405108314182, -2.057242349016086, 0.4476497678924229],
        [0.9655863874020458, -2.16233753826977, 0.4345741316494801],
    ]
    gradients = [([0.5, -1.0], [2.0]), ([0.25, 3.0], [-1.0]), ([-2.0, 0.125], [0.5])]
    settings = PLAIN | {"decay_norm_and_bias": False, "backbone_lr_multiplier": 0.2}
    steps = train(
        poly_schedule(0.1, 0.9, 4),
        settings,
        {"classifier": {"kernel": np.array([[1.0, -2.0]])}, "backbone": {"bias": np.array([0.5])}},
        [{"classifier": {"kernel": np.array([g])}, "backbone": {"bias": np.array(h)}} for g, h in gradients],
    )
    found = [[*step["classifier"]["kernel"][0], *step["backbone"]["bias"]] for step in steps]
    np.testing.assert_allclose(found, expected, atol=2e-8)  # The schedule is float32.


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_every_part_has_its_rate_and_decay(decay_norm_and_bias):
    settings = PLAIN | {
        "decay_norm_and_bias": decay_norm_and_bias,
        "backbone_lr_multiplier": 0.1,
        "head_lr_multiplier": 2.0,
        "offset_lr_multiplier": 0.3,
    }
    rates = {"backbone": 0.1, "cgds": 2.0, "classifier": 2.0}

    def rate_of(names):
        return 2.0 * 0.3 if names[:2] == ("cgds", "offset") else rates[names[0]]

    def decays(names):
        return decay_norm_and_bias or names[-1] == "kernel"

    params = parameters()
    gradients = random_gradients(params)
    found = train(poly_schedule(0.1, 0.9, 10), settings, params, gradients)
    expected = by_definition(lambda step: 0.1 * (1 - step / 10) ** 0.9, settings, params, gradients, rate_of, decays)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_a_rate_of_zero_freezes_a_part():
    params = parameters()
    (after,) = train(
        poly_schedule(0.1, 0.9, 10), PLAIN | {"backbone_lr_multiplier": 0.0}, params, random_gradients(params, 1)
    )
    assert_same(after["backbone"], params["backbone"])
    assert np.abs(after["cgds"]["kernel"] - params["cgds"]["kernel"]).min() > 0


def test_the_poly_schedule_goes_from_base_lr_to_zero():
    schedule = poly_schedule(0.01, 0.9, 1000)
    steps = [0, 1, 250, 500, 999, 1000, 1001]
    expected = [0.01 * max(0, 1 - step / 1000) ** 0.9 for step in steps]
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-6, atol=1e-9)
    assert schedule(1000) == 0


def test_the_first_step_has_base_lr():
    params = {"classifier": {"kernel": np.ones((1, 1))}}
    settings = PLAIN | {"weight_decay": 0.0}
    (after,) = train(poly_schedule(0.25, 0.9, 3), settings, params, [{"classifier": {"kernel": np.ones((1, 1))}}])
    assert after["classifier"]["kernel"] == 0.75


def test_the_optimizer_remembers_directions_and_counts_nothing():
    """A count of its own would fall behind the state's where a step is skipped."""
    params = parameters()
    state = sgd(**PLAIN).init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(params)]
