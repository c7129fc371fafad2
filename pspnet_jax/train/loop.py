"""The training loop: resume, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError, first_line
from pspnet_jax.lock import locked
from pspnet_jax.losses import Batch, Loss
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import batch_checks, resume
from pspnet_jax.train.batch_checks import HostBatch
from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.guard import NonFiniteGuard
from pspnet_jax.train.logs import TrainingLog, Writer, numbers_in
from pspnet_jax.train.scores import SCORE
from pspnet_jax.train.step import Metrics, TrainState, Variables, make_train_step
from pspnet_jax.train.stop import Stopped, StopSignal

logger = logging.getLogger(__name__)
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
    fingerprint: str = "",
    writer: Callable[[str], Writer] | None = None,
    hooks: Sequence[Callable[[int], None]] = (),
) -> TrainState:
    """Trains until config.total_steps, resuming from the newest checkpoint in workdir, if there is one.

    Args:
      config: fields used here: seed, batch_size, total_steps, patience, track, init_from, normalize, every, parallel,
        optimizer.accumulate, optimizer.ema_decay, dataset.image_dtype, model.channels, model.norm, model.dtype and
        eval.best_metric. The whole config is saved, and compared when a run is resumed.
      model: Flax module, called with normalized images f32[N, H, W, 3] and `train`. It may have variables in "batch_stats" and
        use the random stream "dropout".
      loss: function of the model's training outputs, see `losses`.
      optimizer: see `optimizers`.
      batches: called with the number of steps already made; returns this process's batches from then on. A batch is a dict of
        arrays with examples along the first axis: "image" is uint8[N, H, W, 3], or as dataset.image_dtype and model.channels
        say, where N is this process's share of config.batch_size (see `parallel.data_share`); "label", if present, has
        integers; other arrays are for the loss. The first batch is checked.
      evaluate: called with {"params", "batch_stats"} every config.every.eval steps, after the state is saved. Returns
        metrics and pictures, both by name. The metrics must be serializable as JSON and include a number named
        config.eval.best_metric, or have a list "classes" with a dict for each class, whose fractions can be named like
        "iou/road". Two scores are compared only if their metric "data", which identifies the data, is the same.
        Exceptions are logged, and training goes on; if one process raises, all must. None: no evaluation and no curves.
      workdir: directory for checkpoints, metrics and pictures.
      examples_per_epoch: number of training examples in an epoch, after which rates are written; 0: never.
      fingerprint: identifies the training data. It is saved with each checkpoint, and a resumed run warns if it has changed.
        Empty: unknown.
      writer: such as clu.metric_writers.SummaryWriter, called with WORKDIR/tensorboard; gets all numbers and pictures.
      hooks: called after each step with its number, such as those of clu.periodic_actions.

    Raises:
      UserError: the workdir holds a run with another model or classes, or beyond total_steps; it is locked by another process
        or cannot be written; or a batch could not be made, in which case the state before it is saved.
      DivergedError: the loss or gradient is not finite.
      SystemExit: SIGTERM (143) or Ctrl-C (130) was received, and the state is saved.
    """
    workdir, total = files.absolute(workdir), config.total_steps
    mesh = parallel.make_mesh(spatial=config.parallel.spatial)
    if not -(2**31) <= config.seed < 2**32:  # JAX's keys ignore all but 32 bits
        raise UserError(f"seed={config.seed}: expected a whole number from {-(2**31)} to {2**32 - 1}")
    with contextlib.ExitStack() as closing:  # closes in reverse order, so signals are caught until everything is written
        closing.enter_context(jax.enable_x64(False))  # a resumed run needs the precision that it began with
        stop = closing.enter_context(contextlib.closing(StopSignal()))
        closing.enter_context(locked(workdir))
        checkpoints = closing.enter_context(contextlib.closing(Checkpoints(workdir)))
        newest = _newest_step(checkpoints, workdir)
        with parallel.fail_together("checking the workdir"):
            _refuse_foreign_files(workdir, newest)
        feed = iter(batches(min(newest, total - 1)))
        with parallel.fail_together("reading the first batch"):
            # read before the state is made, which depends on the images' shape
            first = batch_checks.check_first(config, mesh, next(feed, None))
        began = time.perf_counter()
        state = resume.initial_state(
            config, model, optimizer, mesh, first["image"].shape[1:], checkpoints, workdir, fingerprint
        )
        logger.info(f"the state was {'restored' if newest else 'initialized'} in {time.perf_counter() - began:.1f} s")
        start = int(state.step)
        unscored = evaluate is not None and _lacks_score(checkpoints, start)
        if start == total and not unscored:
            logger.info(f"{workdir} holds a finished run, step {start} of {total}; delete it to start over")
            return state
        if not unscored and _should_stop_early(config, checkpoints):
            return state
        if start < total:
            _log_summary(config, state, mesh, workdir, start)
        log = closing.enter_context(
            contextlib.closing(TrainingLog(workdir, config, start, writer, examples_per_epoch, unscored))
        )
        run = Run(config, workdir, checkpoints, log, stop, evaluate, fingerprint, hooks)
        if unscored:
            logger.info(f"step {start} was saved but not evaluated; evaluating it now")
            run.score(start, state)
        if start == total or _should_stop_early(config, checkpoints):
            run.exit_if_requested(start)
            return state
        train_step = make_train_step(config, model, loss, optimizer, mesh)
        feed = batch_checks.check_rest(first, itertools.chain([first], feed) if start == newest else iter(batches(start)))
        on_devices = closing.enter_context(contextlib.closing(parallel.to_devices(feed, mesh)))
        return run.loop(state, train_step, log.stalls.timed(on_devices))


def _newest_step(checkpoints: Checkpoints, workdir: epath.Path) -> int:
    """Returns the step of the newest checkpoint, after checking that all processes see the same; 0 if there is none."""
    newest = checkpoints.steps[-1] if checkpoints.steps else 0
    if (most := parallel.max_over_processes(newest)) != (least := -parallel.max_over_processes(-newest)):
        raise UserError(
            f"{workdir}: the newest checkpoint is step {most} in one process and step {least} in another; all processes need "
            "to share the same directory"
        )
    return newest


def _refuse_foreign_files(workdir: epath.Path, newest: int) -> None:
    """Refuses a workdir that has no checkpoints, but files that a run would overwrite and that no earlier run wrote."""
    if newest:
        return
    path = workdir / "config.json"
    try:
        ours = not path.exists() or {"model", "total_steps", "every"} <= json.loads(path.read_text()).keys()
    except (ValueError, AttributeError):
        ours = False
    if not ours or (not path.exists() and (path := workdir / "parameters.txt").exists()):
        raise UserError(f"{path}: already exists and was not written by this program; choose another --workdir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that has started: the training loop and the objects that it uses."""

    config: ConfigDict
    workdir: epath.Path
    checkpoints: Checkpoints
    log: TrainingLog
    stop: StopSignal
    evaluate: Evaluate | None
    fingerprint: str
    hooks: Sequence[Callable[[int], None]]

    def loop(
        self,
        state: TrainState,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
        batches: Iterator[Batch],
    ) -> TrainState:
        start, total, every = int(state.step), self.config.total_steps, self.config.every
        self.exit_if_requested(start)
        guard = NonFiniteGuard(self.checkpoints)
        began = time.perf_counter()
        for step in range(start + 1, total + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with self.save_on_failure(state, guard):
                    if (batch := next(batches, None)) is None:
                        raise UserError(f"the batches ended after step {step - 1}, before total_steps={total}")
                state, metrics = train_step(state, batch)
                self.log.add_step(metrics)
                guard.record(step, metrics)  # waits for the step before this one
            stopping = step < total and self.stop.requested(self.checkpoints, step)
            log_due = due(step, every.log, total)
            save_due = self.checkpoints.save_failed() or stopping or due(step, every.save, total)
            score_due = self.evaluate is not None and not stopping and due(step, every.eval, total)
            if log_due or save_due or score_due:
                guard.finish()
            if log_due:
                self.log.log_progress(step)
            if step == start + 1:  # this step included compilation, so it is excluded from the rates
                jax.block_until_ready(metrics)
                logger.info(f"the first step, with compilation, took {time.perf_counter() - began:.1f} s")
                self.log.restart_clocks(step)
                _write_description(self.config, state, self.workdir)
            else:
                self.log.end_of_epoch(step)
            if save_due or score_due:
                self.save(step, state)
            if score_due:
                self.score(step, state)
            with self.save_on_failure(state, guard):
                for hook in self.hooks:
                    hook(step)
            if stopping or score_due:
                self.exit_if_requested(step)
            if score_due and step < total and _should_stop_early(self.config, self.checkpoints):
                break
        return state

    def save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, state, self.config, self.fingerprint)
        self.log.flush()

    @contextlib.contextmanager
    def save_on_failure(self, state: TrainState, guard: NonFiniteGuard) -> Iterator[None]:
        """Saves the state if the block fails, so that a bad example does not cost the progress made before it.

        With several processes nothing is saved, because saving needs all of them.
        """
        try:
            yield
        except Exception:
            if (step := int(state.step)) not in (0, *self.checkpoints.steps) and jax.process_count() == 1:
                guard.finish()
                self.save(step, state)
                logger.warning(f"step {step} is saved; run the same command to resume")
            raise

    def exit_if_requested(self, step: int) -> None:
        if self.stop.requested(self.checkpoints, step):
            saved = f"step {step} is saved" if step in self.checkpoints.steps else "nothing is saved yet"
            logger.warning(f"stopped by {self.stop.name}; {saved}; run the same command to resume")
            raise SystemExit(128 + self.stop.number)

    def score(self, step: int, state: TrainState) -> None:
        """Evaluates a saved state. Failures are logged, and a stop signal ends the evaluation."""
        assert self.evaluate is not None
        began, failure = time.perf_counter(), None
        try:
            with self.stop.interrupts():
                metrics, pictures = self.evaluate(state.variables)
                json.dumps(metrics, default=float)  # fails here if the metrics cannot be serialized
                found = numbers_in(metrics)
        except Stopped:
            return
        except Exception as error:  # such as a bad image, too little memory, or a bug: training goes on
            failure = first_line(error)
        if parallel.max_over_processes(failure is not None):
            problem = f"step {step} could not be evaluated ({failure or 'in another process'}), but it is saved"
            if step == self.config.total_steps:
                raise UserError(f"{problem}; run the same command to evaluate it again")
            logger.warning(f"{problem}, and training goes on")
            return self.log.exclude_time(time.perf_counter() - began)
        best_metric = self.config.eval.best_metric
        if best_metric not in found:
            raise UserError(f"eval.best_metric={best_metric!r}: the evaluation has {', '.join(found)}; choose one of these")
        if math.isnan(found[best_metric]):
            logger.warning(
                f"eval.best_metric={best_metric!r} has no value at step {step}, because its denominator is 0 (is the class in "
                "the validation labels?): this checkpoint cannot become the best"
            )
        # Logged before the score is saved: a run that is killed in between repeats the evaluation when it is resumed.
        self.log.log_evaluation(step, metrics, pictures)
        self.log.exclude_time(time.perf_counter() - began)
        if self.checkpoints.save_failed(wait=True):
            self.save(step, state)
        settings = resume.evaluation_settings(self.config) | {"data": metrics.get("data")}
        self.checkpoints.add_score(step, {SCORE: found[best_metric], **found}, settings)


def due(step: int, every: int, total: int) -> bool:
    """Returns whether an action is due after `step` steps, if it is done every `every` steps (0: never) and at the end."""
    return step == total or (every > 0 and step % every == 0)


def _should_stop_early(config: ConfigDict, checkpoints: Checkpoints) -> bool:
    """Returns whether the last config.patience evaluations brought no better checkpoint, in all processes, and logs it.

    This depends only on the saved scores, so that a resumed run stops at the same step as one without interruption.
    """
    settings = resume.evaluation_settings(config)
    limit, stale = config.patience * config.every.eval, checkpoints.scores.steps_since_best(checkpoints.steps, settings)
    if not limit or not parallel.max_over_processes(stale >= limit):
        return False
    logger.info(
        f"stopped early: the best {config.eval.best_metric} is that of {stale} steps ago, with patience={config.patience} and "
        f"every.eval={config.every.eval}; step {checkpoints.steps[-1]} is saved, and the same command with a larger patience "
        "resumes"
    )
    return True


def _lacks_score(checkpoints: Checkpoints, step: int) -> bool:
    """Returns whether a checkpoint has no score although, by its own config, it should have been evaluated."""
    if step == 0 or (saved := checkpoints.read_config()) is None:
        return False
    config, _ = saved
    lacks_score = due(step, config.every.eval, config.total_steps) and checkpoints.scores.of(step) is None
    return bool(parallel.max_over_processes(lacks_score))


def _log_summary(config: ConfigDict, state: TrainState, mesh: Mesh, workdir: epath.Path, start: int) -> None:
    """Logs the number of parameters, the devices and the BatchNorm setting."""
    groups = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    logger.info(f"{sum(groups.values()):,} parameters: {', '.join(f'{k} {v:,}' for k, v in groups.items())}")
    device = mesh.devices.flat[0]
    logger.info(
        f"{mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es), {config.model.dtype}"
    )
    if config.model.norm == "frozen":
        logger.info("BatchNorm uses its running statistics and does not update them")
        if start == 0 and not config.init_from:
            logger.warning(
                "the running statistics have their initial values, mean 0 and variance 1; use model.norm='frozen' only with "
                "init_from"
            )
    elif (images := configs.bn_images(config)) < 16:
        logger.warning(
            f"BatchNorm sees {images} images, and fewer than 16 give worse results: raise batch_size (the published runs had "
            "16) or fine-tune with model.norm='frozen'"
        )
    else:
        logger.info(f"BatchNorm sees {images} images")
    logger.info(f"training from step {start} to {config.total_steps}; writing to {workdir}")


def _write_description(config: ConfigDict, state: TrainState, workdir: epath.Path) -> None:
    """Writes config.json and the table of parameters. Called once a step has succeeded, so a failed start changes neither."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    with parallel.fail_together("writing config.json"), files.writing(workdir, "free some space or fix the cause"):
        if jax.process_index() == 0:
            files.write_atomic(workdir / "config.json", configs.to_json(config))
            files.write_atomic(workdir / "parameters.txt", f"{table}\n")
