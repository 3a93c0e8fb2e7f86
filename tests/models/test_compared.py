"""Every network that DSNet is compared with: padding changes nothing, and gradients reach everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.ops import Extent
from dsnet_jax.variants import VARIANTS, vary

CANVAS_HW, SIZE_HW = (96, 128), (67, 93)
# One for each part; the others are put together from the same ones, or are DSNet and FCN, which have their own tests.
NAMES = ("nonlocal", "regular", "pspnet", "dcnv2", "dynamic_filter", "deeplabv3plus")


@pytest.fixture(params=NAMES)
def network(request, monkeypatch, four_convolutions):
    monkeypatch.setitem(RESNETS, "resnet18", four_convolutions)
    config = vary(default_config(), request.param)
    config.model.update(backbone="resnet18", width=8, deep_supervision=False)
    if config.model.name != "pspnet":
        config.model.atrous_rates = (1, 2)
    return build_model(config.model, num_classes=4)


@pytest.fixture
def variables(network, random_variables):
    """Random, and such that points lie far from their positions."""
    variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=True)
    params = variables["params"]
    offset = params.get("cgds", params.get("deformable", {})).get("offset")
    if offset is not None:
        offset["kernel"] *= 0.3
        offset["bias"] = np.random.default_rng(1).uniform(-4, 4, offset["bias"].shape).astype(np.float32)
    return variables


def test_logits_on_a_canvas_are_those_of_the_bare_image(network, variables):
    image = np.random.default_rng(0).standard_normal((1, *SIZE_HW, 3)).astype(np.float32)
    canvas = np.full((2, *CANVAS_HW, 3), np.nan, np.float32)
    canvas[0, : SIZE_HW[0], : SIZE_HW[1]] = image
    canvas[1] = 1  # Another size in the same batch.
    extent = Extent(jnp.array([SIZE_HW, CANVAS_HW]), CANVAS_HW)
    apply = jax.jit(lambda images, extent: network.apply(variables, images, extent, train=False))
    bare, padded = apply(image, None), apply(canvas, extent)
    height, width = bare.logits.shape[1:3]
    valid = padded.logits[:1, :height, :width]
    np.testing.assert_allclose(valid, bare.logits, rtol=0, atol=1e-4 * np.std(bare.logits))
    if bare.offsets is not None:
        np.testing.assert_allclose(padded.offsets[:1, :height, :width], bare.offsets, rtol=0, atol=1e-3)
        assert np.std(bare.offsets, axis=(1, 2)).mean() > 0.1
    assert not np.isnan(padded.logits).any()


def test_gradients_are_finite_and_reach_every_parameter(network, variables):
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)

    def loss(params):
        state = variables | {"params": params}
        rngs = {"dropout": jax.random.key(0)}
        output, updated = network.apply(state, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return jnp.mean(output.logits**3), updated["batch_stats"]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    norms = {jax.tree_util.keystr(path): float(jnp.linalg.norm(leaf)) for path, leaf in leaves_of(gradient)}
    assert all(np.isfinite(norm) for norm in norms.values())
    assert {name for name, norm in norms.items() if norm < 1e-7} == set()
    pairs = zip(leaves_of(variables["batch_stats"]), leaves_of(statistics), strict=True)
    assert [path for (path, old), (_, new) in pairs if np.allclose(old, new)] == []


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_every_variant_differs_from_dsnet_by_what_it_says_and_builds():
    for name, changes in VARIANTS.items():
        config = vary(default_config(), name)
        build_model(config.model, 4)
        changed = {field: value for field, value in changes.items() if default_config()[field] != value}
        assert changed == changes and all(config[field] == value for field, value in changes.items()), name
