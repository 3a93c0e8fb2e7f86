"""The train step: random only by seed and step, taken as a whole or not at all, and averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.training.losses import cross_entropy
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import TrainState, initial_state, make_train_step

CLASSES = 3
SCHEDULE = poly_schedule(0.05, 0.9, 10)
OPTIMIZER = sgd(0.9, 1e-4, True, 0.1, 1.0, 1.0)


class Probe:
    """In the place of a network: logits are a parameter's, plus noise of the dropout key."""

    def __init__(self, auxiliary=False, root=False, statistic=jnp.mean):
        self.auxiliary, self.root, self.statistic = auxiliary, root, statistic

    def apply(self, variables, images, train, rngs, mutable):
        assert train and mutable == ["batch_stats"]
        head = variables["params"]["head"]
        logits = head["kernel"] + jax.random.normal(rngs["dropout"], (CLASSES,))
        if self.root:
            logits = logits.at[0].add(jnp.sqrt(head["edge"]))
        logits = jnp.broadcast_to(logits, (*images.shape[:3], CLASSES))
        mean = variables["batch_stats"]["mean"] + self.statistic(images)
        return SegmentationOutput(logits, 2 * logits if self.auxiliary else None), {"batch_stats": {"mean": mean}}


def probe_variables(kernel=(0.3, -0.2, 0.1)):
    params = {"head": {"kernel": jnp.array(kernel), "edge": jnp.zeros(())}}
    return {"params": params, "batch_stats": {"mean": jnp.zeros(())}}


def state_of(variables, averages=None, step=0, optimizer=OPTIMIZER):
    """As it would be after some steps, none of them skipped."""
    zero = np.int32(0)
    return TrainState(np.int32(step), variables, optimizer.init(variables["params"]), averages, zero, zero)


def probe_batch(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, (2, 4, 4)).astype(np.uint8)
    image = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
    return {"image": image, "label": label, "stop_requested": np.zeros(2, np.int32)}


def probe_noise(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (CLASSES,))


def probe_gradient(kernel, step):
    """Of the parameter, without weight decay."""
    logits = jnp.asarray(kernel) + probe_noise(step)
    label = probe_batch()["label"]
    return jax.grad(lambda x: cross_entropy(jnp.broadcast_to(x, (*label.shape, CLASSES)), label))(logits)


def take_step(probe=None, state=None, seed=0, weight=0.4, schedule=SCHEDULE, optimizer=OPTIMIZER, ema_decay=0.0):
    step = make_train_step(probe or Probe(), optimizer, schedule, seed, weight, ema_decay=ema_decay)
    return jax.jit(step)(state or state_of(probe_variables()), probe_batch())


def test_dropout_is_a_function_of_seed_and_step_alone():
    loss = {}
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        _, metrics = take_step(state=state_of(probe_variables(), step=step), seed=seed)
        loss.setdefault((seed, step), []).append(float(metrics["loss"]))
    assert loss[0, 0][0] == loss[0, 0][1]
    assert len({values[0] for values in loss.values()}) == 3


def test_the_loss_is_the_main_one_and_the_weighted_auxiliary_one():
    _, metrics = take_step(Probe(auxiliary=True), weight=0.25)
    assert metrics["loss"] == pytest.approx(metrics["main_loss"] + 0.25 * metrics["auxiliary_loss"])
    assert metrics["auxiliary_loss"] != metrics["main_loss"]
    _, without = take_step()
    assert "auxiliary_loss" not in without and without["loss"] == without["main_loss"]


def test_a_step_moves_parameters_against_the_gradient_and_takes_the_new_statistics():
    state, metrics = take_step(state=state_of(probe_variables(), step=4))
    kernel = np.array(probe_variables()["params"]["head"]["kernel"])
    gradient = probe_gradient(kernel, step=4)
    expected = kernel - 0.05 * 0.6**0.9 * (gradient + 1e-4 * kernel)
    np.testing.assert_allclose(state.variables["params"]["head"]["kernel"], expected, rtol=1e-6)
    assert metrics["gradient_norm"] == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-6)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert state.variables["batch_stats"]["mean"] == pytest.approx(
        ((probe_batch()["image"] / 255 - mean) / deviation).mean(), rel=1e-5
    )
    assert state.step == 5


def test_the_learning_rate_reported_is_the_one_of_the_step():
    state = state_of(probe_variables(), step=4)
    assert take_step(state=state)[1]["learning_rate"] == pytest.approx(0.05 * 0.6**0.9)


@pytest.mark.parametrize(("requests", "seen"), [([0, 0], 0), ([0, 1], 1), ([1, 0], 1)])
def test_a_stop_requested_of_one_device_is_seen_by_all(requests, seen):
    batch = probe_batch() | {"stop_requested": np.array(requests, np.int32)}
    _, metrics = make_train_step(Probe(), OPTIMIZER, SCHEDULE, 0, 0.4)(state_of(probe_variables()), batch)
    assert metrics["stop_requested"] == seen


# Steps that are not finite.

HUGE = 3e38  # Twice as much is infinite.
SIGN = optax.scale_by_sign()  # Of an infinite gradient, or momentum, it makes a direction of 1.
SIGN_OF_MOMENTUM = optax.chain(optax.trace(0.9), SIGN)


def averages_of(value):
    return jax.tree.map(lambda x: np.full_like(x, value), probe_variables())


def with_infinite_momentum():
    state = state_of(probe_variables(), optimizer=SIGN_OF_MOMENTUM)
    return state.replace(opt_state=jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), state.opt_state))


NOT_FINITE = {  # What `take_step` is given so that the named part of the step, and no other, is not finite.
    "loss": lambda: {"state": state_of(probe_variables((HUGE, -HUGE, 0.0)))},
    "gradient": lambda: {
        "probe": Probe(root=True),
        "state": state_of(probe_variables(), optimizer=SIGN),
        "optimizer": SIGN,
    },
    "parameters": lambda: {"schedule": lambda step: jnp.inf},
    "batch statistics": lambda: {"probe": Probe(statistic=lambda images: jnp.float32(jnp.inf))},
    "momentum": lambda: {"state": with_infinite_momentum(), "optimizer": SIGN_OF_MOMENTUM},
    "averages": lambda: {"state": state_of(probe_variables(), averages_of(np.nan)), "ema_decay": 0.5},
    "everything": lambda: {"state": state_of(probe_variables((np.nan, 0.0, 0.0)))},
}


def as_bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("part", NOT_FINITE)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(part):
    arguments = {"state": state_of(probe_variables())} | NOT_FINITE[part]()
    before = arguments["state"].replace(skipped=jnp.int32(5), skipped_in_a_row=jnp.int32(2))
    after, metrics = take_step(**arguments | {"state": before})
    assert not metrics["finite"]
    assert (after.step, after.skipped, after.skipped_in_a_row) == (1, 6, 3)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (6, 3)
    assert all(count.dtype == jnp.int32 for count in (after.step, after.skipped, after.skipped_in_a_row))
    counts = {"step": before.step, "skipped": before.skipped, "skipped_in_a_row": before.skipped_in_a_row}
    assert as_bits(after.replace(**counts)) == as_bits(before)


def test_a_loss_that_is_not_finite_has_finite_gradients_in_the_test_above():
    """As a gradient that is not finite has a finite loss: else they would not tell which of the two was looked at."""
    _, metrics = take_step(**NOT_FINITE["loss"]())
    assert np.isinf(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    _, metrics = take_step(**NOT_FINITE["gradient"]())
    assert np.isfinite(metrics["loss"]) and np.isinf(metrics["gradient_norm"])


def test_after_skipped_steps_training_goes_on_with_the_learning_rate_of_the_step():
    """Steps 1, 2 and 4 are skipped; the others are those of SGD without them."""
    bad, rates = {1, 2, 4}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]

    def schedule(step):
        return jnp.where(jnp.isin(step, jnp.array(sorted(bad))), jnp.nan, jnp.array(rates)[step])

    state = state_of(probe_variables())
    kernel, momentum, good = np.array(probe_variables()["params"]["head"]["kernel"]), 0.0, 0
    skipped = []
    for step, rate in enumerate(rates):
        state, metrics = take_step(state=state, schedule=schedule)
        skipped.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        if step not in bad:
            momentum = 0.9 * momentum + probe_gradient(kernel, step) + 1e-4 * kernel
            kernel = kernel - rate * momentum
            good += 1
        assert metrics["finite"] == (step not in bad) and state.step == step + 1
        np.testing.assert_allclose(state.variables["params"]["head"]["kernel"], kernel, rtol=1e-5)
    assert skipped == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    one = take_step()[0].variables["batch_stats"]["mean"]
    assert state.variables["batch_stats"]["mean"] == pytest.approx(good * float(one), rel=1e-6)


# Averages.


def test_averages_follow_parameters_and_statistics_slowly_once_the_start_is_past():
    """With TensorFlow's rule: 1/10, 2/11, 3/12, then the decay itself. Step 1 is skipped."""
    state = state_of(probe_variables(), averages_of(2.0))
    expected = state.averages
    for step, decay in enumerate([0.1, None, 3 / 12, 0.3, 0.3]):
        schedule = (lambda step: jnp.nan * step) if decay is None else SCHEDULE
        state, _ = take_step(state=state, schedule=schedule, ema_decay=0.3)
        if decay is not None:
            expected = jax.tree.map(lambda a, v, d=decay: d * a + (1 - d) * v, expected, state.variables)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.averages, expected)
        assert state.step == step + 1 and state.for_evaluation is state.averages
    assert {leaf.dtype for leaf in jax.tree.leaves(state.averages)} == {np.dtype(np.float32)}


def test_without_averages_there_are_no_arrays_for_them_and_variables_are_evaluated():
    fresh = initial_state(Linear(), OPTIMIZER, 0)
    assert fresh.averages is None and fresh.for_evaluation is fresh.variables
    parts = (fresh.variables, fresh.opt_state, fresh.step, fresh.skipped, fresh.skipped_in_a_row)
    assert len(jax.tree.leaves(fresh)) == len(jax.tree.leaves(parts))
    after, _ = take_step()
    assert after.averages is None and after.for_evaluation is after.variables


@pytest.mark.parametrize(("averages", "ema_decay"), [(None, 0.5), (averages_of(0.0), 0.0)])
def test_a_step_refuses_a_state_that_was_not_made_for_it(averages, ema_decay):
    with pytest.raises(ValueError, match="None"):
        take_step(state=state_of(probe_variables(), averages), ema_decay=ema_decay)


class Linear:
    """As much of a network as `initial_state` wants."""

    def init(self, keys, images, train):
        return probe_variables(kernel=jax.random.normal(keys["params"], (CLASSES,)))


@pytest.mark.parametrize("compiled", [False, True])
def test_averages_start_as_a_copy_of_the_variables_whose_memory_a_step_may_take(compiled):
    def start():
        return initial_state(Linear(), OPTIMIZER, 0, ema_decay=0.9)

    state = (jax.jit(start) if compiled else start)()
    assert as_bits(state.averages) == as_bits(state.variables)
    step = jax.jit(make_train_step(Probe(), OPTIMIZER, SCHEDULE, 0, 0.4, ema_decay=0.9), donate_argnums=0)
    after, metrics = step(state, probe_batch())
    assert metrics["finite"] and after.step == 1


# Beginning and saving.


@pytest.mark.parametrize(("averages", "more"), [(None, set()), (averages_of(7.0), {"averages"})])
def test_a_state_survives_the_way_through_its_trees(averages, more):
    state = state_of(probe_variables(), averages, step=3)
    state = state.replace(skipped=np.int32(2), skipped_in_a_row=np.int32(1))
    trees = state.to_trees()
    assert set(trees) == {"variables", "optimizer"} | more
    assert {"skipped", "skipped_in_a_row"} <= set(trees["optimizer"])
    again = TrainState.from_trees(trees)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert as_bits(again) == as_bits(state)


def test_the_first_state_is_a_function_of_the_seed_alone():
    first, again, other = (as_bits(initial_state(Linear(), OPTIMIZER, seed)) for seed in (5, 5, 6))
    assert first == again != other
