"""Optax optimizers with the poly schedule, a higher learning rate for the heads and selective weight decay.

The settings follow Zhao et al. 2017, section 5.1. Values that differ between parameters are given by rules: (pattern, value)
pairs over paths such as "backbone/stem_conv1/bn/scale". The first pattern that matches the whole path decides.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError
from pspnet_jax.models import FREEZE, STAGE_NAMES

Rules = Sequence[tuple[str, float]]


class Optimizer(NamedTuple):
    """An optimizer for `fit`."""

    transformation: optax.GradientTransformation  # turns gradients into updates
    schedules: Mapping[str, optax.Schedule]  # functions of the step, whose values are logged under these names


def build(optimizer: ConfigDict, total_steps: int) -> Optimizer:
    """Builds the optimizer of `config.optimizer`, which clips the gradient, then applies `optimizer.name`.

    Raises:
      UserError: optimizer.name is unknown.
    """
    if optimizer.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={optimizer.name!r}: expected one of {', '.join(OPTIMIZERS)}")
    schedule = learning_rate(optimizer, total_steps)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return Optimizer(optax.chain(clip, *OPTIMIZERS[optimizer.name](optimizer, schedule)), {"learning_rate": schedule})


def learning_rate(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """The backbone's learning rate at step s >= 0: (end + (base - end) (1 - s / total_steps)^power) min(1, (s + 1) / warmup).

    base, end and warmup are `learning_rate`, `end_rate` and `warmup_steps`.
    """
    poly = optax.polynomial_schedule(optimizer.learning_rate, optimizer.end_rate, optimizer.power, total_steps)
    if not optimizer.warmup_steps:
        return poly
    return lambda step: poly(step) * jnp.minimum(1.0, (step + 1) / optimizer.warmup_steps)


TRUSTED: Rules = ((r".*(bias|bn/scale)", 0.0), (".*", 1.0))  # 1 for the parameters to which LARS applies


def rate_rules(optimizer: ConfigDict) -> Rules:
    """Multipliers of the learning rate: `head_multiplier` outside the backbone; inside, `layer_decay` for layer4, its square
    for layer3, ..., its fifth power for the stem, and 0 for the stages that `freeze` names."""
    rates = {stage: optimizer.layer_decay ** (len(STAGE_NAMES) - i) for i, stage in enumerate(STAGE_NAMES)}
    rates |= dict.fromkeys(FREEZE[optimizer.freeze], 0.0)
    stages = tuple((f"backbone/{stage}_.*", rate) for stage, rate in rates.items())
    return (*stages, ("backbone/.*", 1.0), (".*", optimizer.head_multiplier))


def decay_rules(optimizer: ConfigDict) -> Rules:
    """1 for parameters with weight decay, 0 for those without: BatchNorm's scale and bias, unless `decay_norm` is set."""
    return ((r".*bn/(scale|bias)", float(optimizer.decay_norm)), (".*", 1.0))


def by_path(rules: Rules, params: Any) -> Any:
    """Returns a tree like `params` with the value that the rules give each parameter; raises UserError if they give none."""

    def value(path: tuple[Any, ...], _: Any) -> float:
        name = "/".join(path)
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                return value
        raise UserError(f"no rule covers the parameter {name}; the patterns are {', '.join(p for p, _ in rules)}")

    return traverse_util.path_aware_map(value, params)


def scale_by_rules(rules: Rules) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the value of its rule."""

    return optax.stateless(lambda updates, _: jax.tree.map(operator.mul, by_path(rules, updates), updates))


def add_decay(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the updates of the parameters whose decay rule is not 0."""
    return optax.add_decayed_weights(optimizer.weight_decay, _mask(decay_rules(optimizer)))


def _mask(rules: Rules) -> Callable[[optax.Params], Any]:
    """Returns a function that tells for which parameters the value of the rules is not 0."""
    return lambda params: jax.tree.map(bool, by_path(rules, params))


def _sgd(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """SGD as in torch and Caffe: v = momentum * v + gradient + decay; the update is -rate * v."""
    return [
        add_decay(optimizer),
        optax.trace(optimizer.momentum),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
    ]


def _adamw(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); `momentum` is beta 1."""
    return [
        optax.scale_by_adam(optimizer.momentum, optimizer.beta2),
        add_decay(optimizer),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
    ]


def _lars(optimizer: ConfigDict, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """Layer-wise learning rates for large batches (You et al. 2017); biases and BatchNorm's scales are updated as by SGD.

    The trust ratio of a bias that starts at 0 would be 1, a thousand times that of kernels.
    """
    trust_ratio = optax.scale_by_trust_ratio(trust_coefficient=optimizer.trust_coefficient)
    return [
        add_decay(optimizer),
        optax.masked(trust_ratio, _mask(TRUSTED)),
        scale_by_rules(rate_rules(optimizer)),
        optax.scale_by_learning_rate(schedule),
        optax.trace(optimizer.momentum),
    ]


OPTIMIZERS: dict[str, Callable[[ConfigDict, optax.Schedule], list[optax.GradientTransformation]]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
}
