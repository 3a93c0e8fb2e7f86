"""The train step: the same on one device and on eight, random only by seed and step, and what it reports."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from dsnet_jax import parallel
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.training.losses import cross_entropy
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import TrainState, initial_state, make_train_step, offset_metrics

CLASSES, BATCH, STEPS = 3, 8, 3
SCHEDULE = poly_schedule(0.05, 0.9, 10)
OPTIMIZER = sgd(SCHEDULE, 0.9, 1e-4, True, 0.1, 1.0, 1.0)


@pytest.fixture(scope="module")
def network(tiny_backbone):
    """Called with the type of its computation, gives a network."""
    return lambda dtype: DSNet(tiny_backbone(dtype=dtype), CLASSES, width=8, dtype=dtype)


@pytest.fixture(scope="module")
def random_state(network, random_variables):
    """Called with a type, gives a state of the network in which the points have moved already."""

    def draw(dtype):
        variables = random_variables(network(jnp.float32), np.zeros((1, 64, 64, 3), np.float32), train=True)
        variables = jax.tree.map(lambda x: x.astype(dtype), variables)
        return TrainState(np.int32(0), variables, OPTIMIZER.init(variables["params"]))

    return draw


def random_batches():
    """Three batches; images have very different numbers of labelled pixels, one of them none."""
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(STEPS):
        label = rng.integers(0, CLASSES, (BATCH, 32, 32), np.uint8)
        for index in range(BATCH):
            label[index, 4 * index + 4 :] = 255
        label[3] = 255
        batches.append({"image": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8), "label": label})
    return batches


@contextlib.contextmanager
def compiled_quickly():
    """Without most optimisations, where the exact program does not matter."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def compile_and_run(model, state, device_count):
    """The state after some steps, the metrics of each, and the text of the compiled program."""
    mesh = jax.make_mesh((device_count,), (parallel.AXIS,), (AxisType.Auto,), devices=jax.devices()[:device_count])
    state = jax.device_put(state, parallel.replicated(mesh))
    batches = [parallel.put_batch(mesh, batch) for batch in random_batches()]
    function = jax.jit(
        make_train_step(model, OPTIMIZER, SCHEDULE, seed=0, deep_supervision_weight=0.4),
        in_shardings=(parallel.replicated(mesh), parallel.split_by_batch(mesh)),
        out_shardings=parallel.replicated(mesh),
    )
    compiled = function.lower(state, batches[0]).compile()
    metrics = []
    for batch in batches:
        state, scalars = compiled(state, batch)
        metrics.append(jax.device_get(scalars))
    return jax.device_get(state), metrics, compiled.as_text()


@pytest.fixture(scope="module")
def eight_devices(network, random_state):
    """In float32, as it is used."""
    return compile_and_run(network(jnp.float32), random_state(np.float32), 8)


def assert_equal_by_leaf(ours, theirs, tolerance):
    """Each leaf's largest difference, relative to its largest value."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference, size = np.abs(a - b).max(), np.abs(b).max()
        assert difference <= tolerance * size, f"{jax.tree_util.keystr(path)}: {difference} of {size}"


def test_in_float64_one_and_eight_devices_agree_to_1e9(network, random_state):
    """Loss, gradients (the momentum has their sum), parameters and batch statistics of three steps."""
    with jax.enable_x64(True), compiled_quickly():
        state = random_state(np.float64)
        one, eight = (compile_and_run(network(jnp.float64), state, devices) for devices in (1, 8))
    assert one[0].variables["params"]["cgds"]["kernel"].dtype == np.float64
    assert_equal_by_leaf(eight[0], one[0], 1e-9)
    assert_equal_by_leaf(eight[1], one[1], 1e-9)


def test_in_float32_one_and_eight_devices_agree_to_1e3(eight_devices, network, random_state):
    with compiled_quickly():
        state, metrics, _ = compile_and_run(network(jnp.float32), random_state(np.float32), 1)
    assert_equal_by_leaf(eight_devices[0], state, 1e-3)
    assert_equal_by_leaf(eight_devices[1], metrics, 1e-3)


def test_the_program_of_eight_devices_reduces_and_gathers_nothing(eight_devices):
    """An all-gather would be a feature map, or a batch, copied to every device."""
    text = eight_devices[2]
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_float64_network_computes_nothing_in_float32(network, random_state):
    """Of the scope of the network and of its gradient: only what it is compared by is precise throughout."""

    def float32_operations(jaxpr, scope=""):
        for equation in jaxpr.eqns:
            inner = f"{scope}/{equation.source_info.name_stack}"
            if "DSNet" in inner and any(getattr(v.aval, "dtype", None) == jnp.float32 for v in equation.outvars):
                yield f"{inner}: {equation.primitive}"
            for program in jaxprs_in_params(equation.params):
                yield from float32_operations(program, inner)

    with jax.enable_x64(True):
        step = make_train_step(network(jnp.float64), OPTIMIZER, SCHEDULE, 0, 0.4)
        program = jax.make_jaxpr(step)(random_state(np.float64), random_batches()[0])
        assert list(float32_operations(program.jaxpr)) == []


class Probe:
    """In the place of a network: logits are a parameter's, plus noise of the dropout key."""

    def __init__(self, auxiliary=False, offsets=None):
        self.auxiliary, self.offsets = auxiliary, offsets

    def apply(self, variables, images, train, rngs, mutable):
        assert train and mutable == ["batch_stats"]
        noise = jax.random.normal(rngs["dropout"], (CLASSES,))
        logits = jnp.broadcast_to(variables["params"]["head"]["kernel"] + noise, (*images.shape[:3], CLASSES))
        mean = variables["batch_stats"]["mean"] + jnp.mean(images)
        output = SegmentationOutput(logits, 2 * logits if self.auxiliary else None, self.offsets)
        return output, {"batch_stats": {"mean": mean}}


def probe_state(step=0):
    params = {"head": {"kernel": jnp.array([0.3, -0.2, 0.1])}}
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(())}}
    return TrainState(jnp.int32(step), variables, OPTIMIZER.init(params))


def probe_batch(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, (2, 4, 4)).astype(np.uint8)
    return {"image": rng.integers(0, 256, (2, 4, 4, 3), np.uint8), "label": label}


def take_step(probe, state, seed=0, weight=0.4):
    return make_train_step(probe, OPTIMIZER, SCHEDULE, seed, weight)(state, probe_batch())


def test_dropout_is_a_function_of_seed_and_step_alone():
    loss = {}
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        loss.setdefault((seed, step), []).append(float(take_step(Probe(), probe_state(step), seed)[1]["loss"]))
    assert loss[0, 0][0] == loss[0, 0][1]
    assert len({values[0] for values in loss.values()}) == 3


def test_the_loss_is_the_main_one_and_the_weighted_auxiliary_one():
    _, metrics = take_step(Probe(auxiliary=True), probe_state(), weight=0.25)
    assert metrics["loss"] == pytest.approx(metrics["main_loss"] + 0.25 * metrics["auxiliary_loss"])
    assert metrics["auxiliary_loss"] != metrics["main_loss"]
    _, without = take_step(Probe(), probe_state())
    assert "auxiliary_loss" not in without and without["loss"] == without["main_loss"]


def test_a_step_moves_parameters_against_the_gradient_and_takes_the_new_statistics():
    state, metrics = take_step(Probe(), probe_state(step=4))
    batch = probe_batch()
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 4), (CLASSES,))
    kernel = probe_state().variables["params"]["head"]["kernel"]
    gradient = jax.grad(lambda k: cross_entropy(jnp.broadcast_to(k + noise, (2, 4, 4, CLASSES)), batch["label"]))(
        kernel
    )
    expected = kernel - 0.05 * (gradient + 1e-4 * kernel)  # The optimizer counts its own steps, and has taken none.
    np.testing.assert_allclose(state.variables["params"]["head"]["kernel"], expected, rtol=1e-6)
    assert metrics["gradient_norm"] == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-6)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert state.variables["batch_stats"]["mean"] == pytest.approx(
        ((batch["image"] / 255 - mean) / deviation).mean(), rel=1e-5
    )
    assert state.step == 5


def test_the_learning_rate_reported_is_the_one_of_the_step():
    assert take_step(Probe(), probe_state(step=4))[1]["learning_rate"] == pytest.approx(0.05 * 0.6**0.9)


def test_offsets_are_measured_in_pixels_and_points_outside_counted():
    """A map of 2x3 cells sampled at one point each: (y, x) plus the offset."""
    offsets = np.zeros((1, 2, 3, 1, 2), np.float32)
    offsets[0, 0, 0, 0] = (-0.5, 0)  # Above the map.
    offsets[0, 1, 2, 0] = (-3, 4)  # Above it and right of it.
    offsets[0, 1, 1, 0] = (0, 1)  # On the last cell's centre.
    metrics = offset_metrics(SegmentationOutput(None, None, jnp.asarray(offsets)))
    assert metrics["offset_mean"] == pytest.approx((0.5 + 5 + 1) / 6)
    assert metrics["offset_max"] == 5
    assert metrics["offset_outside"] == pytest.approx(2 / 6)


def test_without_offsets_the_points_outside_are_those_of_the_border():
    """Of the nine points of each cell of a 2x3 map, those of the 3x3 grid that leave it."""
    metrics = offset_metrics(SegmentationOutput(None, None, jnp.zeros((1, 2, 3, 9, 2))))
    inside = sum(
        0 <= y + dy < 2 and 0 <= x + dx < 3 for y in (0, 1) for x in (0, 1, 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    )
    assert metrics["offset_outside"] == pytest.approx(1 - inside / 54)
    assert metrics["offset_mean"] == metrics["offset_max"] == 0


def test_a_network_without_offsets_reports_none():
    assert offset_metrics(SegmentationOutput(None)) == {}


def test_the_metrics_of_a_dsnet_are_complete(eight_devices):
    _, metrics, _ = eight_devices
    names = {"loss", "main_loss", "auxiliary_loss", "learning_rate", "gradient_norm", "finite"}
    assert set(metrics[0]) == names | {"offset_mean", "offset_max", "offset_outside"}
    assert all(np.isfinite(list(scalars.values())).all() for scalars in metrics)
    assert metrics[0]["offset_mean"] > 0.01  # The points had moved, so gathering is tested too.


def test_a_state_survives_the_way_through_its_trees():
    state = probe_state(step=3)
    again = TrainState.from_trees(state.to_trees())
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert again.step == 3 and set(state.to_trees()) == {"variables", "optimizer"}


def test_the_first_state_is_a_function_of_the_seed_alone(network):
    key_of = {}

    class Spy:
        def init(self, keys, images, train):
            assert train  # Deep supervision has parameters only then.
            key_of[len(key_of)] = jax.random.key_data(keys["params"])
            return {"params": {"backbone": {}}, "batch_stats": {}}

    for seed in (5, 5, 6):
        initial_state(Spy(), OPTIMIZER, seed)
    assert (key_of[0] == key_of[1]).all() and (key_of[0] != key_of[2]).any()
    assert "auxiliary" in jax.eval_shape(lambda: initial_state(network(jnp.float32), OPTIMIZER, 0)).variables["params"]
