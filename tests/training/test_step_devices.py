"""The train step of a DSNet on one device and on eight: the same, micro-batches included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import TrainState, initial_state, make_train_step

CLASSES, BATCH, STEPS = 3, 16, 3
SCHEDULE = poly_schedule(0.05, 0.9, 10)
OPTIMIZER = sgd(0.9, 1e-4, True, 0.1, 1.0, 1.0)


def network(backbone, dtype):
    return DSNet(backbone(dtype=dtype), CLASSES, width=8, dtype=dtype)


@pytest.fixture(scope="module")
def random_state(random_variables):
    """Called with a backbone and a type, gives a state of the network in which the points have moved already."""

    def draw(backbone, dtype):
        variables = random_variables(network(backbone, jnp.float32), np.zeros((1, 64, 64, 3), np.float32), train=True)
        variables = jax.tree.map(lambda x: x.astype(dtype), variables)
        return TrainState(np.int32(0), variables, OPTIMIZER.init(variables["params"]), None, np.int32(0), np.int32(0))

    return draw


def random_batches():
    """Three batches; images have very different numbers of labelled pixels, some of them none."""
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(STEPS):
        label = rng.integers(0, CLASSES, (BATCH, 32, 32), np.uint8)
        for index in range(BATCH):
            label[index, 2 * index + 2 :] = 255
        label[3] = 255
        image = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
        batches.append({"image": image, "label": label, "stop_requested": np.zeros(8, np.int32)})
    return batches


def compile_and_run(model, state, device_count, accumulation_steps=1):
    """The state after some steps, and the metrics of each."""
    mesh = parallel.mesh_over(jax.devices()[:device_count])
    state = jax.device_put(state, parallel.replicated(mesh))
    step = jax.jit(
        make_train_step(model, OPTIMIZER, SCHEDULE, 0, 0.4, accumulation_steps),
        in_shardings=(parallel.replicated(mesh), parallel.split_by_batch(mesh)),
        out_shardings=parallel.replicated(mesh),
    )
    metrics = []
    for batch in random_batches():
        state, scalars = step(state, parallel.put_batch(mesh, batch))
        metrics.append(jax.device_get(scalars))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def eight_devices(tiny_backbone, random_state):
    """In float32, as it is used."""
    return compile_and_run(network(tiny_backbone, jnp.float32), random_state(tiny_backbone, np.float32), 8)


def assert_equal_by_leaf(ours, theirs, tolerance):
    """Each leaf's largest difference, relative to its largest value."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference, size = np.abs(a - b).max(), np.abs(b).max()
        assert difference <= tolerance * size, f"{jax.tree_util.keystr(path)}: {difference} of {size}"


@pytest.mark.parametrize(("backbone", "accumulation_steps"), [("tiny_backbone", 1), ("four_convolutions", 2)])
def test_in_float64_one_and_eight_devices_agree_to_1e9(backbone, accumulation_steps, random_state, request):
    """Loss, gradients (the momentum has their sum), parameters and batch statistics of three steps.

    Micro-batches are normalised each by itself, so that those of one device and of eight have the same images.
    """
    backbone = request.getfixturevalue(backbone)
    with jax.enable_x64(True):
        state, model = random_state(backbone, np.float64), network(backbone, jnp.float64)
        one, eight = (compile_and_run(model, state, count, accumulation_steps) for count in (1, 8))
    assert one[0].variables["params"]["cgds"]["kernel"].dtype == np.float64
    assert one[0].skipped == 0
    assert_equal_by_leaf(eight[0], one[0], 1e-9)
    assert_equal_by_leaf(eight[1], one[1], 1e-9)


def test_in_float32_one_and_eight_devices_agree_to_1e3(eight_devices, tiny_backbone, random_state):
    state, metrics = compile_and_run(network(tiny_backbone, jnp.float32), random_state(tiny_backbone, np.float32), 1)
    assert_equal_by_leaf(eight_devices[0], state, 1e-3)
    assert_equal_by_leaf(eight_devices[1], metrics, 1e-3)


def test_in_bfloat16_the_state_is_float32_and_goes_where_float32_takes_it(eight_devices, tiny_backbone, random_state):
    """Up to the kinks of ReLU and of bilinear sampling, which rounding passes now and then.

    Rounding what float32 gives the layers to bfloat16 turns the gradient of this network of noise by as much (0.93 to
    0.99 is the cosine of its parts).
    """
    state, metrics = compile_and_run(network(tiny_backbone, jnp.bfloat16), random_state(tiny_backbone, np.float32), 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32), np.dtype(np.int32)}
    states = (state, eight_devices[0])
    gradients, expected = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(s.opt_state)]) for s in states)
    assert gradients @ expected / np.linalg.norm(gradients) / np.linalg.norm(expected) > 0.94
    assert np.linalg.norm(gradients) == pytest.approx(np.linalg.norm(expected), rel=0.05)
    for ours, theirs in zip(metrics, eight_devices[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


def test_the_metrics_of_a_dsnet_are_complete(eight_devices):
    _, metrics = eight_devices
    assert set(metrics[0]) == {
        *("loss", "main_loss", "auxiliary_loss", "learning_rate", "gradient_norm"),
        *("offset_mean", "offset_max", "offset_outside"),
        *("finite", "skipped", "skipped_in_a_row", "stop_requested"),
    }
    assert all(np.isfinite(list(scalars.values())).all() and scalars["finite"] for scalars in metrics)
    assert metrics[0]["offset_mean"] > 0.01  # The points had moved, so gathering is tested too.


def test_the_first_state_has_the_parameters_of_deep_supervision(tiny_backbone):
    state = jax.eval_shape(lambda: initial_state(network(tiny_backbone, jnp.float32), OPTIMIZER, 0))
    assert "auxiliary" in state.variables["params"]
