"""The training loop: resume, step, log, evaluate, save, stop."""

import contextlib
import itertools
import logging
import numbers
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import DivergedError, UserError
from pspnet_jax.losses import Batch, Loss
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import resume
from pspnet_jax.train.checkpoint import SCORE, Checkpoints
from pspnet_jax.train.logs import TrainingLog, Writer
from pspnet_jax.train.step import Metrics, TrainState, Variables, make_train_step

logger = logging.getLogger(__name__)
HostBatch = Mapping[str, np.ndarray]
Evaluate = Callable[[Variables], tuple[Mapping[str, Any], Mapping[str, Any]]]


def fit(
    config: ConfigDict,
    *,
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    batches: Callable[[int], Iterable[HostBatch]],
    evaluate: Evaluate | None,
    workdir: epath.PathLike,
    examples_per_epoch: int = 0,
    writer: Callable[[str], Writer] | None = None,
    hooks: Sequence[Callable[[int], None]] = (),
) -> TrainState:
    """Trains to config.total_steps, from the newest checkpoint in workdir if there is one.

    Args:
      config: of which this uses seed, batch_size, total_steps, init_from, normalize, every, optimizer.accumulate and ema_decay,
        model.norm and eval.best_metric; all of it is saved, and compared when a run is resumed.
      model: a flax.linen module that is called with images f32[N, H, W, 3], normalized, and train; its state is in
        "batch_stats", and "dropout" is its random number.
      loss: of what the model returns in training, see `losses`.
      optimizer: see `optimizers`.
      batches: called with the number of steps already made; gives this process's batches from there on, dicts of arrays with
        the examples along the first axis; "image" is uint8[N, H, W, 3], all else is up to the loss.
      evaluate: called with {"params", "batch_stats"} every config.every.eval steps; returns metrics, which JSON can hold, among
        them the number config.eval.best_metric, and pictures by name; None: no evaluation.
      workdir: where checkpoints, metrics and pictures go.
      examples_per_epoch: examples after which the training data has been seen once, for the rates written then; 0: none.
      writer: such as clu.metric_writers.SummaryWriter; called with WORKDIR/tensorboard, it gets all numbers and pictures, too.
      hooks: called after each step with its number, such as those of clu.periodic_actions.

    Raises:
      UserError: the workdir holds a run of another model or other classes, or one that is further than total_steps; or a batch
        could not be made, when the steps before it are saved.
      DivergedError: the loss is not finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), when the state is saved.
    """
    workdir, mesh, total = files.absolute(workdir), parallel.make_mesh(), config.total_steps
    with contextlib.ExitStack() as closing:  # in reverse order: signals are caught until everything is written
        stop = closing.enter_context(contextlib.closing(StopSignal()))
        checkpoints = closing.enter_context(contextlib.closing(Checkpoints(workdir)))
        newest = checkpoints.steps[-1] if checkpoints.steps else 0
        feed = iter(batches(min(newest, total - 1)))
        if (first := next(feed, None)) is None:  # read before there is a state, for the images' shape
            raise UserError("there is no batch to train on")
        state = resume.start(config, model, optimizer, mesh, first["image"].shape[1:], checkpoints, workdir)
        start = int(state.step)
        if start == total:
            logger.info(f"{workdir} holds the finished run, step {start} of {total}; delete it to start over")
            return state
        _announce(config, state, mesh, workdir, start)
        log = closing.enter_context(contextlib.closing(TrainingLog(workdir, config, start, writer, examples_per_epoch)))
        train_step = make_train_step(config, model, loss, optimizer, mesh)
        feed = itertools.chain([first], feed) if start == newest else iter(batches(start))
        on_devices = closing.enter_context(contextlib.closing(parallel.to_devices(feed, mesh)))
        return _loop(config, state, train_step, log.stalls.timed(on_devices), evaluate, checkpoints, log, stop, hooks)


def _loop(
    config: ConfigDict,
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    evaluate: Evaluate | None,
    checkpoints: Checkpoints,
    log: TrainingLog,
    stop: "StopSignal",
    hooks: Sequence[Callable[[int], None]],
) -> TrainState:
    start, total, every = int(state.step), config.total_steps, config.every
    guard = NonFiniteGuard(checkpoints)
    for step in range(start + 1, total + 1):
        try:
            if (batch := next(batches, None)) is None:
                raise UserError(f"the batches ended after step {step - 1}, before total_steps={total}")
        except Exception:  # a wrong example must not cost the steps before it
            _save_all(checkpoints, guard, state, config)
            raise
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, batch)
        log.started(metrics)
        guard.see(step, metrics)
        stopping = step < total and stop.requested(checkpoints, step)
        log_due, save_due = due(step, every.log, total), stopping or due(step, every.save, total)
        evaluate_due = evaluate is not None and not stopping and due(step, every.eval, total)
        if log_due or save_due or evaluate_due:
            guard.finish()
        if log_due:
            log.interval(step)
        if step == start + 1:  # this one has compiled the step; the rates are those of the others
            jax.block_until_ready(metrics)
            log.restart_clocks(step)
        else:
            log.end_of_epoch(step)
        scores = _evaluate(evaluate, state, step, log, config.eval.best_metric) if evaluate_due else None
        if save_due or evaluate_due:
            checkpoints.save(step, state, config, scores)
        for hook in hooks:
            hook(step)
        if stopping:
            logger.warning(f"stopped by {stop.name}; step {step} is saved, the same command goes on from there")
            raise SystemExit(128 + stop.number)
    return state


def _save_all(checkpoints: Checkpoints, guard: "NonFiniteGuard", state: TrainState, config: ConfigDict) -> None:
    """Saves the steps made since the last checkpoint, if any; several processes cannot while one of them fails."""
    step = int(state.step)
    if step in (0, *checkpoints.steps) or jax.process_count() > 1:
        return
    guard.finish()
    checkpoints.save(step, state, config, None)
    logger.warning(f"step {step} is saved; the same command goes on from there")


def due(step: int, every: int, total: int) -> bool:
    """Whether something done each `every` steps (0: never) and at the end is due after `step` steps."""
    return step == total or (every > 0 and step % every == 0)


def _announce(config: ConfigDict, state: TrainState, mesh: Mesh, workdir: epath.Path, start: int) -> None:
    """Says what is about to run, and writes its config and the table of its parameters."""
    if jax.process_index() == 0:
        with files.atomic(workdir / "config.json") as path:
            path.write_text(configs.to_json(config))
        with files.atomic(workdir / "parameters.txt") as path:
            path.write_text(parameter_overview.get_parameter_overview(state.params, include_stats=False) + "\n")
    groups = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    logger.info(f"{sum(groups.values()):,} parameters: {', '.join(f'{k} {v:,}' for k, v in groups.items())}")
    device = mesh.devices.flat[0]
    logger.info(
        f"{mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es), {config.model.dtype}"
    )
    if config.model.norm == "frozen":
        logger.info("BatchNorm uses its running statistics and does not update them")
    elif (images := configs.bn_images(config)) < 16:
        logger.warning(
            f"BatchNorm sees {images} images; under 16 the result suffers: raise batch_size (the published runs had 16), or "
            "fine-tune with model.norm='frozen'"
        )
    else:
        logger.info(f"BatchNorm sees {images} images")
    logger.info(f"training from step {start} to {config.total_steps}; writing to {workdir}")


def _evaluate(evaluate: Evaluate | None, state: TrainState, step: int, log: TrainingLog, best_metric: str) -> dict[str, float]:
    """Evaluates and logs; returns the numbers to save with the checkpoint."""
    assert evaluate is not None
    began = time.perf_counter()
    metrics, pictures = evaluate(state.variables)
    log.evaluation(step, metrics, pictures, time.perf_counter() - began)
    found = {name: float(value) for name, value in metrics.items() if isinstance(value, numbers.Real | jax.Array)}
    if best_metric not in found:
        raise UserError(f"eval.best_metric={best_metric!r}: the evaluation has {', '.join(found)}; choose one of these")
    return {SCORE: found[best_metric], **found}


class NonFiniteGuard:
    """Stops a run whose loss or gradient is not finite, looking one step late so that the device never waits for it.

    A loss may be finite where its gradient is not, and the state after that step is lost.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None

    def see(self, step: int, metrics: Metrics) -> None:
        """Takes note of a step, and waits for the one before it."""
        self.finish()
        self._pending = step, metrics

    def finish(self) -> None:
        """Waits for the last step seen.

        Raises:
          DivergedError: names the step and the last good checkpoint.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = (float(jax.device_get(metrics[name]).compute()) for name in ("loss", "gradient_norm"))
        if not np.isfinite(loss + norm):
            steps = self._checkpoints.steps
            good = f"the last good checkpoint is that of step {steps[-1]}" if steps else "no checkpoint was saved before"
            raise DivergedError(
                f"the loss is {loss}, its gradient's norm {norm} at step {step}; {good}; try a lower optimizer.learning_rate, "
                "optimizer.warmup_steps or optimizer.clip_norm"
            )


class StopSignal:
    """Asks for a stop after SIGTERM or Ctrl-C; the second one ends the process. Several processes agree on the step."""

    def __init__(self) -> None:
        self.number = signal.SIGTERM
        self._received = False
        self._alone = jax.process_count() == 1  # else JAX catches SIGTERM
        can_catch = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGTERM, signal.SIGINT) if self._alone and can_catch else ()
        self._previous = {number: signal.signal(number, self._receive) for number in caught}

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _receive(self, number: int, _: Any) -> None:
        self.number, self._received = signal.Signals(number), True
        self.close()

    def requested(self, checkpoints: Checkpoints, step: int) -> bool:
        return self._received if self._alone else checkpoints.reached_preemption(step)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
