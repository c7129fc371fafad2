"""The train state and the train step: a pure function of state and batch, compiled for a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average, LastValue, Metric
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import models, parallel
from pspnet_jax.losses import Batch, Loss
from pspnet_jax.optimizers import Optimizer

Variables = dict[str, Any]  # params, batch_stats
Metrics = dict[str, Metric]
TermWeights = dict[str, jax.Array]  # what the sums of the loss's terms are divided by, f32[] each


class TrainState(flax.struct.PyTreeNode):
    """All that a run needs to go on: everything else follows from the config and the step."""

    step: jax.Array  # int32[], number of updates made
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Variables | None  # exponential moving average of both, or None when it is off

    @property
    def weights(self) -> Variables:
        """What is trained: {"params", "batch_stats"}."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def variables(self) -> Variables:
        """What evaluation uses: the moving average when there is one."""
        return self.ema or self.weights


def new_state(config: ConfigDict, optimizer: Optimizer, variables: Variables) -> TrainState:
    """The state before the first step, given the initial weights."""
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=optimizer.transformation.init(variables["params"]),
        ema=variables if config.optimizer.ema_decay else None,
        **variables,
    )


def random_key(seed: int) -> jax.Array:
    """The key of a seed, of the generator that a resumed run has, too, whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl="threefry2x32")


def init_state(
    config: ConfigDict, model: nn.Module, optimizer: Optimizer, mesh: Mesh, image_shape: tuple[int, ...]
) -> Callable[[], TrainState]:
    """Returns the compiled function that draws a fresh state, on every device of the mesh, from config.seed.

    Args:
      config: of which seed and optimizer.ema_decay are used.
      model: called with images f32[1, *image_shape] and train=False.
      optimizer: whose state it gets.
      mesh: the devices.
      image_shape: (height, width, channels) of the batches' images.
    """

    def init() -> TrainState:
        variables = model.init(random_key(config.seed), jnp.zeros((1, *image_shape)), train=False)
        return new_state(config, optimizer, dict(variables))

    # Most of the time goes into compiling one random generator a kernel; CPUs do it four times faster unoptimized.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=parallel.replicated(mesh), compiler_options=options)


class Aux(NamedTuple):
    """What loss_fn returns beside the loss."""

    batch_stats: Any
    weights: TermWeights
    means: dict[str, jax.Array]  # the loss and its terms
    metrics: Metrics


def make_train_step(
    config: ConfigDict, model: nn.Module, loss: Loss, optimizer: Optimizer, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled step: (state, batch) -> (state after one update, metrics). The state is donated.

    The batch is a dict of arrays whose leading axis is the global batch, sharded over the mesh; "image", uint8[N, H, W, 3], is
    normalized here. The model is called with train=True, and the loss gets what it returns (see `losses`).

    Returns:
      metrics that merge over steps: "loss", the mean of each term of the loss by its name, the metrics of the loss,
      "gradient_norm", and the values of the optimizer's schedules.
    """

    def loss_fn(
        params: Any, batch_stats: Any, step: jax.Array, batch: Batch, key: jax.Array, weights: TermWeights | None = None
    ) -> tuple[jax.Array, Aux]:
        """`weights` are those of the whole batch, of which this may be a part."""
        outputs, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            models.normalize(batch["image"], config.normalize),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        terms, metrics = loss(outputs, batch, step)
        own = jax.lax.stop_gradient({name: term.weight for name, term in terms.items()})
        means = {name: term.mean((weights or own)[name]) for name, term in terms.items()}
        total = sum((term.scale * means[name] for name, term in terms.items()), jnp.zeros(()))
        return total, Aux(updates.get("batch_stats", {}), own, {"loss": total} | means, metrics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(random_key(config.seed), state.step)
        # Without parts there is no scan of length 1: XLA runs convolutions inside loops many times slower on CPUs.
        if config.optimizer.accumulate == 1:
            grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, state.batch_stats, state.step, batch, key)
        else:
            grads, aux = _accumulated(loss_fn, state, batch, key, config.optimizer.accumulate)
        updates, opt_state = optimizer.transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = {"params": params, "batch_stats": aux.batch_stats}
        ema = state.ema and optax.incremental_update(new, state.ema, 1 - config.optimizer.ema_decay)
        means = aux.means | {"gradient_norm": optax.tree.norm(grads)}
        metrics = {name: Average(value, jnp.ones((), jnp.int32)) for name, value in means.items()} | aux.metrics
        metrics |= {name: LastValue(jnp.asarray(schedule(state.step))) for name, schedule in optimizer.schedules.items()}
        return TrainState(state.step + 1, params, aux.batch_stats, opt_state, ema), metrics

    everywhere, shared = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(train_step, in_shardings=(everywhere, shared), out_shardings=everywhere, donate_argnums=0)


def _accumulated(
    loss_fn: Callable[..., tuple[jax.Array, Aux]], state: TrainState, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, Aux]:
    """Adds up the gradients of the parts, one after the other; BatchNorm's statistics are each part's own.

    Every part is divided by the weights of the whole batch, which a first pass finds out; where they follow from the batch
    alone, as with cross-entropy, nothing of the model remains of that pass when it is compiled.
    """
    # [N, ...] -> [parts, N / parts, ...], each part a share of every device's examples, so that none has to move
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    each = split, jax.random.split(key, parts)

    def weigh(part: tuple[Batch, jax.Array]) -> TermWeights:
        return loss_fn(state.params, state.batch_stats, state.step, *part)[1].weights

    weights = jax.tree.map(lambda x: jnp.sum(x, 0), jax.lax.map(weigh, each))

    def add_part(total: tuple[Any, Any], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], Aux]:
        grads, batch_stats = total
        new, aux = jax.grad(loss_fn, has_aux=True)(state.params, batch_stats, state.step, *part, weights)
        return (jax.tree.map(jnp.add, grads, new), aux.batch_stats), aux._replace(batch_stats=None)

    start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
    (grads, batch_stats), aux = jax.lax.scan(add_part, start, each)
    means = jax.tree.map(lambda x: jnp.sum(x, 0), aux.means)
    return grads, Aux(batch_stats, weights, means, {name: metric.reduce() for name, metric in aux.metrics.items()})
