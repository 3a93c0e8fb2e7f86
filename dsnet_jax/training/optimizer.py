"""SGD as the paper trains: momentum, weight decay, poly schedule, a learning rate for each part."""

import jax
import optax


def poly_schedule(base_lr: float, poly_power: float, steps: int) -> optax.Schedule:
    """base_lr * (1 - step / steps) ** poly_power, by step; 0 from the last on."""
    return optax.polynomial_schedule(base_lr, 0.0, poly_power, steps)


def sgd(
    momentum: float,
    weight_decay: float,
    decay_norm_and_bias: bool,
    backbone_lr_multiplier: float,
    head_lr_multiplier: float,
    offset_lr_multiplier: float,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as `torch.optim.SGD` defines it: the momentum holds gradients, not steps.

    It gives the direction, of which the train step goes the learning rate's multiple, downhill. It counts no steps of
    its own: the rate is a function of the state's, also after steps that were skipped.

    Args:
      momentum: share of the old direction that stays.
      weight_decay: added to the gradient, times the parameter.
      decay_norm_and_bias: False leaves batch normalisation's parameters and all biases out of weight decay.
      backbone_lr_multiplier: on the learning rate of `params["backbone"]`.
      head_lr_multiplier: on the learning rate of everything else.
      offset_lr_multiplier: on top of it, for the convolution that predicts the offsets.
    """

    def multiplier(path: tuple[jax.tree_util.DictKey, ...]) -> float:
        names = [key.key for key in path]
        if names[0] == "backbone":
            return backbone_lr_multiplier
        return head_lr_multiplier * (offset_lr_multiplier if "offset" in names else 1.0)

    def scale_parts(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, update: multiplier(path) * update, updates)

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: decay_norm_and_bias or p.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(momentum),
        optax.stateless(scale_parts),
    )
