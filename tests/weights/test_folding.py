import jax
import numpy as np
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.models.resnet import RESNETS, Bottleneck, ResNet
from dsnet_jax.weights.folding import fold_batch_norm

CHANGES = {
    "dsnet": {},
    "nonlocal": {"sampling": "nonlocal", "guide": "pyramid"},
    "dynamic_filter": {"name": "dynamic_filter"},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_folded_network_gives_the_same_logits_and_its_norms_only_add(
    changes, tiny_backbone, random_variables, monkeypatch
):
    monkeypatch.setitem(RESNETS, "resnet18", tiny_backbone)
    config = default_config()
    config.model.update(backbone="resnet18", width=8, deep_supervision=False, **changes)
    network = build_model(config.model, 3)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    variables = random_variables(network, images, train=False)
    before = jax.tree.map(np.copy, variables)
    folded = fold_batch_norm(variables)

    run = jax.jit(lambda variables: network.apply(variables, images, train=False).logits)
    expected, found = run(variables), run(folded)
    assert np.abs(expected - found).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    _check_that_norms_only_add(folded)


def _check_that_norms_only_add(folded):
    for path, leaf in jax.tree_util.tree_leaves_with_path(folded["batch_stats"]):
        expected = {"mean": 0.0, "var": np.float32(1 - 1e-5)}[path[-1].key]
        assert (leaf == expected).all(), path
    scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(folded["params"]) if path[-1].key == "scale"]
    assert scales and all((scale == 1).all() for scale in scales)


@pytest.mark.parametrize("name", ["deeplabv3plus", "dcnv2", "fcn"])
def test_every_norm_of_bottlenecks_and_of_training_s_second_head_is_folded(name, monkeypatch):
    monkeypatch.setitem(RESNETS, "resnet50", lambda **options: ResNet((1, 1, 1, 1), Bottleneck, **options))
    config = default_config()
    config.model.update(name=name, width=8)
    network = build_model(config.model, 3)
    shapes = jax.eval_shape(lambda: initial_variables(network))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    assert "auxiliary" in variables["params"]
    _check_that_norms_only_add(fold_batch_norm(variables))


def test_a_norm_behind_nothing_that_is_known_is_refused():
    one = np.ones(1, np.float32)
    variables = {
        "params": {"head": {"norm": {"scale": one, "bias": one}}},
        "batch_stats": {"head": {"norm": {"mean": one, "var": one}}},
    }
    with pytest.raises(ValueError, match="/head/norm: of conv, project, generate, kernel none is beside it"):
        fold_batch_norm(variables)
