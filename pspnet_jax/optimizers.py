"""SGD as torch and Caffe define it, with the poly schedule and the faster heads (Zhao et al. 2017, section 5.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """The backbone's rate at step s = 0, 1, ...: base * (1 - s / total_steps)^power * min(1, (s + 1) / warmup_steps)."""
    poly = optax.polynomial_schedule(optimizer.learning_rate, 0.0, optimizer.power, total_steps)
    if not optimizer.warmup_steps:
        return poly
    return lambda step: poly(step) * jnp.minimum(1.0, (step + 1) / optimizer.warmup_steps)


def build(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """The update of `config.optimizer`, in this order.

    The gradient is clipped, weight_decay * parameter is added to it, v = momentum * v + gradient, and the parameter moves by
    -rate * v, where the rate of everything but the backbone is head_multiplier times the schedule's.
    """
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity(),
        optax.add_decayed_weights(optimizer.weight_decay, _everything if optimizer.decay_norm else _outside_norm),
        optax.trace(optimizer.momentum),
        optax.masked(optax.scale(optimizer.head_multiplier), _outside_backbone),
        optax.scale_by_learning_rate(learning_rate(optimizer, total_steps)),
    )


def _everything(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda _: True, params)  # a mask, so that the state has one form whatever decay_norm says


def _outside_backbone(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "backbone", params)


def _outside_norm(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-2].key.endswith("bn"), params)
