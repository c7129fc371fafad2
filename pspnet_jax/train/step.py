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
from jax.stages import Wrapped
from ml_collections import ConfigDict

from pspnet_jax import models, parallel
from pspnet_jax.losses import Batch, Loss
from pspnet_jax.optimizers import Optimizer

Variables = dict[str, Any]  # params, batch_stats
Metrics = dict[str, Metric]
TermWeights = dict[str, jax.Array]  # the divisors of the loss terms' sums, f32[] each


class TrainState(flax.struct.PyTreeNode):
    """Everything needed to resume a run; all else follows from the config and the step."""

    step: jax.Array  # int32[], number of updates made
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Variables | None  # exponential moving average of params and batch_stats, or None if disabled

    @property
    def weights(self) -> Variables:
        """The trained variables: {"params", "batch_stats"}."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def variables(self) -> Variables:
        """The variables for evaluation: the moving average, if enabled, or else the weights."""
        return self.ema or self.weights


def new_state(config: ConfigDict, optimizer: Optimizer, variables: Variables) -> TrainState:
    """Returns the state before the first step, given the initial variables."""
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=optimizer.transformation.init(variables["params"]),
        ema=variables if config.optimizer.ema_decay else None,
        **variables,
    )


def random_key(seed: int) -> jax.Array:
    """Returns the random key of a seed. The generator is fixed, so JAX_DEFAULT_PRNG_IMPL cannot change a resumed run."""
    return jax.random.key(seed, impl="threefry2x32")


def make_init_state(
    config: ConfigDict, model: nn.Module, optimizer: Optimizer, mesh: Mesh, image_shape: tuple[int, ...]
) -> Callable[[], TrainState]:
    """Returns a compiled function that initializes the state from config.seed, replicated over the mesh.

    Args:
      config: fields used here: seed and optimizer.ema_decay.
      model: called with images f32[1, *image_shape] and train=False.
      optimizer: initializes the optimizer state.
      mesh: the devices.
      image_shape: (height, width, channels) of the training images.
    """

    def init() -> TrainState:
        variables = model.init(random_key(config.seed), jnp.zeros((1, *image_shape)), train=False)
        return new_state(config, optimizer, dict(variables))

    # Most of the time goes into compiling a random generator for each kernel; on CPUs, this is four times faster without
    # optimization.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=parallel.replicated(mesh), compiler_options=options)


class Aux(NamedTuple):
    """Auxiliary outputs of loss_fn."""

    batch_stats: Any
    weights: TermWeights
    means: dict[str, jax.Array]  # the loss and its terms
    metrics: Metrics


def make_train_step(config: ConfigDict, model: nn.Module, loss: Loss, optimizer: Optimizer, mesh: Mesh) -> Wrapped:
    """Returns the compiled train step: (state, batch) -> (state after one update, metrics). The state is donated.

    The batch is a dict of global arrays, sharded over the mesh along the first axis. The step normalizes "image",
    [N, H, W, C], calls the model with train=True, and passes its outputs to the loss (see `losses`). Devices that share
    images (see `parallel.make_mesh`) each compute a part of the rows.

    The metrics can be merged over steps. They are "loss", the mean of each loss term by name, the metrics of the loss,
    "gradient_norm", and the values of the optimizer's schedules.
    """

    def loss_fn(
        params: Any, batch_stats: Any, step: jax.Array, batch: Batch, key: jax.Array, weights: TermWeights | None = None
    ) -> tuple[jax.Array, Aux]:
        """`weights` are those of the whole batch, if `batch` is only a part of it."""
        outputs, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            parallel.shard_height(models.normalize(batch["image"], config.normalize), mesh),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        terms, metrics = loss(models.share_rows(outputs, mesh), batch, step)
        own = jax.lax.stop_gradient({name: term.weight for name, term in terms.items()})
        means = {name: term.mean((weights or own)[name]) for name, term in terms.items()}
        total = sum((term.scale * means[name] for name, term in terms.items()), jnp.zeros(()))
        return total, Aux(updates.get("batch_stats", {}), own, {"loss": total} | means, metrics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(random_key(config.seed), state.step)
        # Avoids a scan of length 1: on CPUs, XLA runs convolutions many times slower inside loops.
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
    """Adds up the gradients of the parts of a batch, one part after the other. BatchNorm uses the statistics of each part.

    The loss terms of every part are divided by the weights of the whole batch, which a first pass computes. If the weights
    depend only on the batch, as with cross-entropy, the compiler removes the model from this pass.
    """
    # [N, ...] -> [parts, N / parts, ...]; each part has examples from every device, so no example moves between devices
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    each = split, jax.random.split(key, parts)

    def part_weights(part: tuple[Batch, jax.Array]) -> TermWeights:
        return loss_fn(state.params, state.batch_stats, state.step, *part)[1].weights

    weights = jax.tree.map(lambda x: jnp.sum(x, 0), jax.lax.map(part_weights, each))

    def add_part(total: tuple[Any, Any], part: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], Aux]:
        grads, batch_stats = total
        new, aux = jax.grad(loss_fn, has_aux=True)(state.params, batch_stats, state.step, *part, weights)
        return (jax.tree.map(jnp.add, grads, new), aux.batch_stats), aux._replace(batch_stats=None)

    start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
    (grads, batch_stats), aux = jax.lax.scan(add_part, start, each)
    means = jax.tree.map(lambda x: jnp.sum(x, 0), aux.means)
    return grads, Aux(batch_stats, weights, means, {name: metric.reduce() for name, metric in aux.metrics.items()})
