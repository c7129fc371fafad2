"""The train state and the train step: a pure function of state and batch, compiled for a mesh."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import losses, models, optimizers, parallel
from pspnet_jax.metrics import confusion_matrix

Batch = dict[str, jax.Array]  # image uint8[N, H, W, 3], label uint8[N, H, W]
Variables = dict[str, Any]  # params, batch_stats


class TrainState(flax.struct.PyTreeNode):
    """All that a run needs to go on: everything else follows from the config and the step."""

    step: jax.Array  # int32[], number of updates made
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    average: Variables | None  # exponential moving average of both, or None when it is off

    @property
    def variables(self) -> Variables:
        """What evaluation uses: the moving average when there is one."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(config: ConfigDict, model: models.PSPNet, mesh: Mesh) -> Callable[[], TrainState]:
    """Returns the compiled function that draws a fresh state, on every device of the mesh, from config.seed."""
    optimizer = optimizers.build(config.optimizer, config.total_steps)

    def init() -> TrainState:
        size = 8 * max(model.output_stride, 8)  # any size gives the same parameters
        variables = dict(model.init(jax.random.key(config.seed), jnp.zeros((1, size, size, 3)), train=False))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables["params"]),
            average=variables if config.optimizer.ema_decay else None,
        )

    # Most of the time goes into compiling one random generator a kernel; CPUs do it four times faster unoptimized.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=parallel.replicated(mesh), compiler_options=options)


def make_train_step(
    config: ConfigDict, model: models.PSPNet, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `train_step` for the mesh: the state on every device (and donated), the batch shared out.

    The step returns the next state and scalars: loss (main + weighted auxiliary), auxiliary_loss, gradient_norm,
    learning_rate, and confusion, int32[K, K], truth by prediction over the batch.
    """
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    schedule = optimizers.learning_rate(config.optimizer, config.total_steps)
    auxiliary_weight = losses.auxiliary_weight(config.loss, config.total_steps)
    parts = config.optimizer.accumulate

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        labeled = losses.count_labeled(batch["label"])
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_fn(params: Any, batch_stats: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            (logits, auxiliary), updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                models.normalize(part["image"], config.normalize),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            loss = losses.cross_entropy(logits, part["label"]) / labeled
            auxiliary_loss = 0.0 if auxiliary is None else losses.cross_entropy(auxiliary, part["label"]) / labeled
            loss += auxiliary_weight(state.step) * auxiliary_loss
            confusion = confusion_matrix(part["label"], jnp.argmax(logits, -1), model.num_classes)
            return loss, (updates["batch_stats"], {"loss": loss, "auxiliary_loss": auxiliary_loss, "confusion": confusion})

        gradient = jax.grad(loss_fn, has_aux=True)
        if parts == 1:  # not a scan of length 1: XLA runs convolutions inside loops many times slower on CPUs
            grads, (batch_stats, scalars) = gradient(state.params, state.batch_stats, batch, key)
        else:
            grads, batch_stats, scalars = _accumulated(gradient, state, _split(batch, parts), jax.random.split(key, parts))
        scalars |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = _averaged(state.average, {"params": params, "batch_stats": batch_stats}, config.optimizer.ema_decay)
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), scalars

    everywhere = parallel.replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, parallel.batch_sharding(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def _accumulated(gradient: Callable[..., Any], state: TrainState, parts: Batch, keys: jax.Array) -> tuple[Any, Any, Any]:
    """Sums gradients and scalars over the parts, one after the other; BatchNorm's statistics are each part's own."""

    def add_part(total: tuple[Any, Any], part_and_key: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], Any]:
        grads, batch_stats = total
        new, (batch_stats, scalars) = gradient(state.params, batch_stats, *part_and_key)
        return (jax.tree.map(jnp.add, grads, new), batch_stats), scalars

    start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
    (grads, batch_stats), scalars = jax.lax.scan(add_part, start, (parts, keys))
    return grads, batch_stats, jax.tree.map(lambda x: jnp.sum(x, 0), scalars)


def _split(batch: Batch, parts: int) -> Batch:
    """[N, ...] -> [parts, N / parts, ...], each part a share of every device's examples, so that none has to move."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _averaged(average: Variables | None, new: Variables, decay: float) -> Variables | None:
    return None if average is None else optax.incremental_update(new, average, 1 - decay)
