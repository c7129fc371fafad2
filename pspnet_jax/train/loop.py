"""The training loop: resume, step, log, evaluate, save, stop."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, models, parallel
from pspnet_jax.infer.evaluate import Report
from pspnet_jax.train import checkpoint
from pspnet_jax.train.clock import DataWait
from pspnet_jax.train.logs import Recorder
from pspnet_jax.train.step import TrainState, Variables, init_state, make_train_step

logger = logging.getLogger(__name__)
Evaluate = Callable[[Variables], Report]


def fit(
    config: ConfigDict,
    batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
    evaluate: Evaluate | None,
    workdir: epath.PathLike,
    epoch: int = 0,
) -> TrainState:
    """Trains to config.total_steps, from the newest checkpoint in workdir if there is one.

    Args:
      config: a validated config whose dataset.class_names are filled in.
      batches: called with the number of steps already made; gives this process's batches from there on,
        {"image": uint8[N, H, W, 3], "label": uint8[N, H, W]}.
      evaluate: scores the variables on the validation split; None: no evaluation.
      workdir: where checkpoints, metrics and pictures go.
      epoch: examples after which the training split has been seen once, for the metrics written then; 0: none.

    Raises:
      ValueError: the workdir holds a run of another model or other classes, or one that is further than total_steps; or a batch
        could not be made, when the steps before it are saved.
      FloatingPointError: the loss is not finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), when the state is saved.
    """
    workdir = epath.Path(workdir).resolve()
    mesh = parallel.make_mesh()
    model = models.build(config.model, len(config.dataset.class_names))
    with contextlib.ExitStack() as closing:  # in reverse order: signals are caught until everything is written
        stop = StopSignal()
        closing.callback(stop.close)
        checkpoints = checkpoint.Checkpoints(workdir)
        closing.callback(checkpoints.close)
        state = _start(config, model, mesh, checkpoints, workdir)
        start, total, every = int(state.step), config.total_steps, config.every
        if start == total:
            logger.info(f"{workdir} holds the finished run, step {start} of {total}; delete it to start over")
            return state
        _announce(config, state, mesh, workdir, start)
        wait, watch = DataWait(), Watch(checkpoints)
        closing.callback(wait.close)
        recorder = Recorder(workdir, config, start, wait, epoch)
        closing.callback(recorder.close)
        train_step = make_train_step(config, model, mesh)
        global_batches = parallel.to_devices(wait.timed(batches(start)), mesh)
        global_batches = _or_save(global_batches, lambda: _save_all(checkpoints, watch, state, config))
        for step, batch in zip(range(start + 1, total + 1), global_batches, strict=False):
            state, scalars = train_step(state, batch)
            wait.started(scalars["loss"])
            watch.see(step, scalars)
            stopping = stop.requested(step) and step < total
            log, save = due(step, every.log, total), stopping or due(step, every.save, total)
            score = evaluate if due(step, every.eval, total) and not stopping else None
            if log or save or score:
                watch.finish()
            if log:
                recorder.train(step, scalars)
            if step == start + 1:  # this one has compiled the step; the rates are those of the others
                jax.block_until_ready(scalars)
                recorder.restart_clock(step)
            else:
                recorder.end_of_epoch(step)
            values = _evaluate(score, state, step, recorder) if score else None
            if save or score:
                checkpoints.save(step, state, config, values)
            if stopping:
                logger.warning(f"stopped by {stop.name}; step {step} is saved, the same command goes on from there")
                raise SystemExit(128 + stop.number)
        assert int(state.step) == total, f"the batches ended after step {state.step}, before {total}"
        return state


def _or_save(batches: Iterator[dict[str, jax.Array]], save: Callable[[], None]) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches; if one cannot be made, calls `save` before that ends the run."""
    try:
        yield from batches
    except ValueError:
        save()
        raise


def _save_all(checkpoints: checkpoint.Checkpoints, watch: "Watch", state: TrainState, config: ConfigDict) -> None:
    """Saves the steps made since the last checkpoint, if any; several processes cannot while one of them fails."""
    step = int(state.step)
    if step in (0, *checkpoints.steps) or jax.process_count() > 1:
        return
    watch.finish()
    checkpoints.save(step, state, config, None)
    logger.warning(f"step {step} is saved; the same command goes on from there")


def due(step: int, every: int, total: int) -> bool:
    """Whether something done each `every` steps (0: never) and at the end is due after `step` steps."""
    return step == total or (every > 0 and step % every == 0)


def _start(
    config: ConfigDict, model: models.PSPNet, mesh: Mesh, checkpoints: checkpoint.Checkpoints, workdir: epath.Path
) -> TrainState:
    if checkpoints.steps:
        checkpoint.check_resumable(configs.read(workdir / "config.json"), config)
        if checkpoints.steps[-1] > config.total_steps:
            raise ValueError(
                f"total_steps={config.total_steps}: the run in {workdir} is at step {checkpoints.steps[-1]} already"
            )
    state = checkpoints.restore_newest(checkpoint.abstract_state(config, model, mesh))
    if state is None:
        state = init_state(config, model, mesh)()
        if config.init_from:
            state = checkpoint.with_weights(state, checkpoint.initial_weights(config, model, mesh), config.init_from)
    if jax.process_index() == 0:
        with files.atomic(workdir / "config.json") as path:
            path.write_text(configs.to_json(config))
    return state


def _announce(config: ConfigDict, state: TrainState, mesh: Mesh, workdir: epath.Path, start: int) -> None:
    """Says what is about to run; the parameter table goes to a file."""
    if jax.process_index() == 0:
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
    else:
        images = configs.bn_images(config)
        advice = (
            "; under 16 the result suffers: raise batch_size (the published runs had 16), or fine-tune with model.norm='frozen'"
        )
        if images < 16:
            logger.warning(f"BatchNorm sees {images} images{advice}")
        else:
            logger.info(f"BatchNorm sees {images} images")
    logger.info(f"training from step {start} to {config.total_steps}; writing to {workdir}")


def _evaluate(evaluate: Evaluate, state: TrainState, step: int, recorder: Recorder) -> dict[str, float]:
    began = time.perf_counter()
    report = evaluate(state.variables)
    recorder.evaluation(step, report, time.perf_counter() - began)
    metrics = report.metrics
    names = ("mean_iou", "mean_accuracy", "pixel_accuracy")
    return {name: getattr(metrics, name) for name in names}


class Watch:
    """Stops a run whose loss or gradient is not finite, looking one step late so that the device never waits for it.

    A loss may be finite where its gradient is not, in float16 above all, and the state after that step is lost.
    """

    def __init__(self, checkpoints: checkpoint.Checkpoints):
        self._checkpoints = checkpoints
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def see(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        self.finish()
        self._pending = step, scalars

    def finish(self) -> None:
        """Waits for the last step seen.

        Raises:
          FloatingPointError: names the step and the last good checkpoint.
        """
        if self._pending is None:
            return
        (step, scalars), self._pending = self._pending, None
        loss, norm = float(scalars["loss"]), float(scalars["gradient_norm"])
        if not np.isfinite(loss + norm):
            steps = self._checkpoints.steps
            good = f"the last good checkpoint is that of step {steps[-1]}" if steps else "no checkpoint was saved before"
            raise FloatingPointError(
                f"the loss is {loss}, its gradient's norm {norm} at step {step}; {good}; try a lower optimizer.learning_rate, "
                "optimizer.warmup_steps or optimizer.clip_norm"
            )


class StopSignal:
    """Asks for a stop after SIGTERM or Ctrl-C; the second one ends the process. Several processes agree on the step."""

    def __init__(self) -> None:
        self.number = signal.SIGTERM
        self._received = False
        self._alone = jax.process_count() == 1  # else JAX catches SIGTERM
        caught = (signal.SIGTERM, signal.SIGINT) if self._alone else ()
        self._previous = {number: signal.signal(number, self._receive) for number in caught}

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _receive(self, number: int, _: Any) -> None:
        self.number, self._received = signal.Signals(number), True
        self.close()

    def requested(self, step: int) -> bool:
        return self._received if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
