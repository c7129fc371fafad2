"""Optimizers with the poly schedule, faster heads and selective decay (Zhao et al. 2017, section 5.1), from optax's pieces.

What differs from parameter to parameter are rules: (pattern, value) pairs over paths such as "backbone/stem_conv1/bn/scale", of
which the first whose pattern matches the whole path counts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError

Rules = Sequence[tuple[str, float]]


class Optimizer(NamedTuple):
    """What `fit` trains with.

    Attributes:
      transformation: of gradients into updates.
      schedules: values by step, to be logged under these names.
    """

    transformation: optax.GradientTransformation
    schedules: Mapping[str, optax.Schedule]


def build(optimizer: ConfigDict, total_steps: int) -> Optimizer:
    """The optimizer of `config.optimizer`: the gradient is clipped, then `optimizer.name` makes an update of it.

    Raises:
      UserError: optimizer.name is unknown.
    """
    if optimizer.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={optimizer.name!r}: expected one of {', '.join(OPTIMIZERS)}")
    schedule = learning_rate(optimizer, total_steps)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return Optimizer(optax.chain(clip, *OPTIMIZERS[optimizer.name](optimizer, schedule)), {"learning_rate": schedule})


def learning_rate(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """The backbone's rate at step s = 0, 1, ...: base * (1 - s / total_steps)^power * min(1, (s + 1) / warmup_steps)."""
    poly = optax.polynomial_schedule(optimizer.learning_rate, 0.0, optimizer.power, total_steps)
    if not optimizer.warmup_steps:
        return poly
    return lambda step: poly(step) * jnp.minimum(1.0, (step + 1) / optimizer.warmup_steps)


def rate_rules(optimizer: ConfigDict) -> Rules:
    """Multipliers of the learning rate: `head_multiplier` for everything but the backbone."""
    return (("backbone/.*", 1.0), (".*", optimizer.head_multiplier))


def decay_rules(optimizer: ConfigDict) -> Rules:
    """Whether the weight decays, 1 or 0: not BatchNorm's scale and bias, unless `decay_norm` says so."""
    return ((r".*bn/(scale|bias)", float(optimizer.decay_norm)), (".*", 1.0))


def by_path(rules: Rules, params: Any) -> Any:
    """Returns the value of each parameter by the rules, in a tree like `params`.

    Raises:
      UserError: a parameter matches no rule.
    """

    def value(path: tuple[Any, ...], _: Any) -> float:
        name = "/".join(path)
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                return value
        raise UserError(f"no rule covers the parameter {name}; the patterns are {', '.join(p for p, _ in rules)}")

    return traverse_util.path_aware_map(value, params)


def scale_by_rules(rules: Rules) -> optax.GradientTransformation:
    """Multiplies each parameter's update by its value."""

    def scale(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        return jax.tree.map(lambda factor, update: factor * update, by_path(rules, updates), updates)

    return optax.stateless(scale)


def add_decay(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the updates of the parameters whose rule is not 0."""
    return optax.add_decayed_weights(optimizer.weight_decay, _decayed(optimizer))


def _decayed(optimizer: ConfigDict) -> Callable[[optax.Params], Any]:
    return lambda params: jax.tree.map(bool, by_path(decay_rules(optimizer), params))


def _sgd(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """As torch and Caffe define it: v = momentum * v + gradient + decay, and the parameter moves by -rate * v."""
    return [
        add_decay(optimizer),
        optax.trace(optimizer.momentum),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
    ]


def _adamw(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """Adam with the decay outside its moments (Loshchilov and Hutter 2019); `momentum` is its beta 1."""
    return [
        optax.scale_by_adam(optimizer.momentum, optimizer.beta2),
        add_decay(optimizer),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
    ]


def _lars(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """Layer-wise rates for large batches (You et al. 2017), by `trust_coefficient`; not for parameters without decay."""
    return [
        add_decay(optimizer),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=optimizer.trust_coefficient), _decayed(optimizer)),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
        optax.trace(optimizer.momentum),
    ]


OPTIMIZERS: dict[str, Callable[[ConfigDict, optax.Schedule], list[optax.GradientTransformation]]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
}
