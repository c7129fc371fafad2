"""The training loop: resume, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import itertools
import json
import logging
import numbers
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
from pspnet_jax.errors import UserError
from pspnet_jax.lock import locked
from pspnet_jax.losses import Batch, Loss
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import resume
from pspnet_jax.train.checkpoint import SCORE, Checkpoints
from pspnet_jax.train.guard import NonFiniteGuard
from pspnet_jax.train.integrity import reason
from pspnet_jax.train.logs import TrainingLog, Writer
from pspnet_jax.train.step import Metrics, TrainState, Variables, make_train_step
from pspnet_jax.train.stop import Stopped, StopSignal

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
    fingerprint: str = "",
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
        the examples along the first axis; "image" is uint8[N, H, W, 3], N this process's share of config.batch_size,
        and "label", where there is one, of integers; all else is up to the loss. The first batch is checked.
      evaluate: called with {"params", "batch_stats"} every config.every.eval steps, when the state is saved; returns metrics,
        which JSON can hold, among them the number config.eval.best_metric, and pictures by name; None: no evaluation. A metric
        "data" names the data: only scores of the same are compared. What it raises is reported, and training goes on; several
        processes have to raise together.
      workdir: where checkpoints, metrics and pictures go.
      examples_per_epoch: examples after which the training data has been seen once, for the rates written then; 0: none.
      fingerprint: of the training data, saved with each checkpoint; when it has changed, a resumed run says so; empty: unknown.
      writer: such as clu.metric_writers.SummaryWriter; called with WORKDIR/tensorboard, it gets all numbers and pictures, too.
      hooks: called after each step with its number, such as those of clu.periodic_actions.

    Raises:
      UserError: the workdir holds a run of another model or other classes, or one that is further than total_steps; another
        training writes there, or it cannot be written; or a batch could not be made, when the steps before it are saved.
      DivergedError: the loss is not finite.
      SystemExit: after SIGTERM (143) or Ctrl-C (130), when the state is saved.
    """
    workdir, mesh, total = files.absolute(workdir), parallel.make_mesh(), config.total_steps
    if not -(2**31) <= config.seed < 2**32:  # JAX's keys take 32 bits, and no notice of the others
        raise UserError(f"seed={config.seed}: expected a whole number from {-(2**31)} to {2**32 - 1}")
    with contextlib.ExitStack() as closing:  # in reverse order: signals are caught until everything is written
        closing.enter_context(jax.enable_x64(False))  # whatever the shell says: a run is resumed as it began
        stop = closing.enter_context(contextlib.closing(StopSignal()))
        closing.enter_context(locked(workdir))
        checkpoints = closing.enter_context(contextlib.closing(Checkpoints(workdir)))
        newest = _newest(checkpoints, workdir)
        with parallel.together("looking at the workdir"):
            _refuse_others_files(workdir, newest)
        feed = iter(batches(min(newest, total - 1)))
        with parallel.together("reading the first batch"):
            first = _checked(config, next(feed, None))  # before there is a state, for the images' shape
        state = resume.start(config, model, optimizer, mesh, first["image"].shape[1:], checkpoints, workdir, fingerprint)
        start = int(state.step)
        unscored = evaluate is not None and _lacks_score(checkpoints, start)
        if start == total and not unscored:
            logger.info(f"{workdir} holds the finished run, step {start} of {total}; delete it to start over")
            return state
        if start < total:
            _announce(config, state, mesh, workdir, start)
        log = closing.enter_context(
            contextlib.closing(TrainingLog(workdir, config, start, writer, examples_per_epoch, unscored))
        )
        run = Run(config, workdir, checkpoints, log, stop, evaluate, fingerprint, hooks)
        if unscored:
            logger.info(f"step {start} was saved but not evaluated; this is done now")
            run.score(start, state)
        if start == total:
            run.exit_if_asked(start)
            return state
        train_step = make_train_step(config, model, loss, optimizer, mesh)
        feed = _alike(first, itertools.chain([first], feed) if start == newest else iter(batches(start)))
        on_devices = closing.enter_context(contextlib.closing(parallel.to_devices(feed, mesh)))
        return run.loop(state, train_step, log.stalls.timed(on_devices))


def _newest(checkpoints: Checkpoints, workdir: epath.Path) -> int:
    """The step of the newest checkpoint, the same one for all processes; 0: there is none."""
    newest = checkpoints.steps[-1] if checkpoints.steps else 0
    if (most := parallel.agree(newest)) != (least := -parallel.agree(-newest)):
        raise UserError(f"{workdir}: one process finds checkpoint {most} there, another {least}; all need the same directory")
    return newest


def _checked(config: ConfigDict, batch: HostBatch | None) -> HostBatch:
    """Returns the batch, unless there is none, or it would be trained on as something else or end in an error of JAX's."""
    if batch is None:
        raise UserError("there is no batch to train on")
    if not isinstance(batch, Mapping):
        raise UserError(f"the first batch is a {type(batch).__name__}; expected a dict of NumPy arrays")
    if "image" not in batch:
        raise UserError(f"the batches have {', '.join(batch)}; expected an array of the name image, too")
    size, share = np.shape(batch["image"])[1:3], config.batch_size // jax.process_count()
    for name in ("image", *batch):
        if not hasattr(batch[name], "dtype"):
            raise UserError(f"the first batch's {name} is a {type(batch[name]).__name__}; expected a NumPy array")
        array = np.asarray(batch[name])
        form, expected = f"is {array.dtype}{list(array.shape)}", ""
        if name == "image" and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3):
            expected = "uint8[N, H, W, 3], not normalized"
        elif name == "label" and not np.issubdtype(array.dtype, np.integer):
            expected = "integers"
        elif name == "label" and array.ndim == 3 and array.shape[1:] != size:
            expected = "[N, {}, {}], as the images are".format(*size)
        elif array.shape[:1] != (share,):
            expected = f"{share} examples along the first axis, this process's share of batch_size={config.batch_size}"
        if expected:
            raise UserError(f"the first batch's {name} {form}; expected {expected}")
    return batch


def _refuse_others_files(workdir: epath.Path, newest: int) -> None:
    """Refuses a workdir without checkpoints that has files of the names of ours, unless a run that was killed left them."""
    if newest:
        return
    path = workdir / "config.json"
    try:
        ours = not path.exists() or {"model", "total_steps", "every"} <= json.loads(path.read_text()).keys()
    except (ValueError, AttributeError):
        ours = False
    if not ours or (not path.exists() and (path := workdir / "parameters.txt").exists()):
        raise UserError(f"{path}: is there already, and no run of this program wrote it; choose another --workdir")


def _alike(first: HostBatch, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
    """Yields the batches, each after a look whether it has the first one's types and number of examples."""

    def kinds(batch: HostBatch) -> dict[str, str]:
        return {name: f"{array.dtype}[{len(array)}, ...]" for name, array in batch.items()}

    for batch in batches:
        if (found := kinds(batch)) != (expected := kinds(first)):
            raise UserError(f"a batch has {found}, but the first one had {expected}; all have to be alike")
        yield batch


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that has begun: `loop` makes its steps, and what it needs for this is here."""

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
        start, total, every, alone = int(state.step), self.config.total_steps, self.config.every, jax.process_count() == 1
        self.exit_if_asked(start)
        guard = NonFiniteGuard(self.checkpoints)
        for step in range(start + 1, total + 1):
            with self.saving_if_it_fails(state, guard):
                if (batch := next(batches, None)) is None:
                    raise UserError(f"the batches ended after step {step - 1}, before total_steps={total}")
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch)
            self.log.started(metrics)
            guard.see(step, metrics)
            stopping = step < total and self.stop.requested(self.checkpoints, step)
            log_due, save_due = due(step, every.log, total), stopping or due(step, every.save, total)
            score_due = self.evaluate is not None and not stopping and due(step, every.eval, total)
            if log_due or save_due or score_due:
                guard.finish()
            if log_due:
                self.log.interval(step)
            if step == start + 1:  # this one has compiled the step; the rates are those of the others
                jax.block_until_ready(metrics)
                self.log.restart_clocks(step)
                _write_description(self.config, state, self.workdir)
            else:
                self.log.end_of_epoch(step)
            if save_due or score_due or (log_due and alone and self.checkpoints.failed()):
                self.save(step, state)
            if score_due:
                self.score(step, state)
            with self.saving_if_it_fails(state, guard):
                for hook in self.hooks:
                    hook(step)
            if stopping or score_due:
                self.exit_if_asked(step)
        return state

    def save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, state, self.config, self.fingerprint)
        self.log.flush()

    @contextlib.contextmanager
    def saving_if_it_fails(self, state: TrainState, guard: NonFiniteGuard) -> Iterator[None]:
        """Saves the steps made, where the block fails: a wrong example must not cost those before it.

        Several processes cannot while one of them fails.
        """
        try:
            yield
        except Exception:
            if (step := int(state.step)) not in (0, *self.checkpoints.steps) and jax.process_count() == 1:
                guard.finish()
                self.save(step, state)
                logger.warning(f"step {step} is saved; the same command goes on from there")
            raise

    def exit_if_asked(self, step: int) -> None:
        if self.stop.requested(self.checkpoints, step):
            logger.warning(f"stopped by {self.stop.name}; step {step} is saved, the same command goes on from there")
            raise SystemExit(128 + self.stop.number)

    def score(self, step: int, state: TrainState) -> None:
        """Evaluates a state that is saved; what goes wrong is said, and a stop signal ends it."""
        assert self.evaluate is not None
        began, failure = time.perf_counter(), None
        try:
            with self.stop.interrupts():
                metrics, pictures = self.evaluate(state.variables)
                json.dumps(metrics, default=float)  # it has to be written, too
                found = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        except Stopped:
            return
        except Exception as error:  # an image, the devices' memory, a mistake in the evaluation: no step is lost for it
            failure = reason(error)
        seconds = time.perf_counter() - began
        if parallel.agree(failure is not None):
            told = f"step {step} could not be evaluated ({failure or 'by another process'}); it is saved"
            if step == self.config.total_steps:
                raise UserError(f"{told}, and the same command evaluates it again")
            logger.warning(f"{told}, training goes on")
            return self.log.pause(seconds)
        best_metric = self.config.eval.best_metric
        if best_metric not in found:
            raise UserError(f"eval.best_metric={best_metric!r}: the evaluation has {', '.join(found)}; choose one of these")
        self.log.pause(seconds)
        self.log.evaluation(step, metrics, pictures)  # first: what has no score is evaluated again
        if parallel.agree(self.checkpoints.failed(wait=True)):
            self.save(step, state)
        settings = resume.evaluation_settings(self.config) | {"data": metrics.get("data")}
        self.checkpoints.add_score(step, {SCORE: found[best_metric], **found}, settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, jax.Array | np.ndarray) and value.size == 1)


def due(step: int, every: int, total: int) -> bool:
    """Whether something done each `every` steps (0: never) and at the end is due after `step` steps."""
    return step == total or (every > 0 and step % every == 0)


def _lacks_score(checkpoints: Checkpoints, step: int) -> bool:
    """Whether the checkpoint of a step was to be evaluated, by the config of its own time, and was not."""
    if step == 0 or (origin := checkpoints.origin()) is None:
        return False
    config, _ = origin
    return bool(parallel.agree(due(step, config.every.eval, config.total_steps) and checkpoints.score(step) is None))


def _announce(config: ConfigDict, state: TrainState, mesh: Mesh, workdir: epath.Path, start: int) -> None:
    """Says what is about to run."""
    groups = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    logger.info(f"{sum(groups.values()):,} parameters: {', '.join(f'{k} {v:,}' for k, v in groups.items())}")
    device = mesh.devices.flat[0]
    logger.info(
        f"{mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es), {config.model.dtype}"
    )
    if config.model.norm == "frozen":
        logger.info("BatchNorm uses its running statistics and does not update them")
        if start == 0 and not config.init_from:
            logger.warning("they are those of a new network, mean 0 and variance 1: model.norm='frozen' is meant for init_from")
    elif (images := configs.bn_images(config)) < 16:
        logger.warning(
            f"BatchNorm sees {images} images; under 16 the result suffers: raise batch_size (the published runs had 16), or "
            "fine-tune with model.norm='frozen'"
        )
    else:
        logger.info(f"BatchNorm sees {images} images")
    logger.info(f"training from step {start} to {config.total_steps}; writing to {workdir}")


def _write_description(config: ConfigDict, state: TrainState, workdir: epath.Path) -> None:
    """Writes the config of a run that has made a step, and the table of its parameters."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    with parallel.together("writing config.json"), files.writing(workdir, "make room, or mend what is wrong"):
        for name, text in (("config.json", configs.to_json(config)), ("parameters.txt", f"{table}\n")):
            if jax.process_index() == 0:
                with files.atomic(workdir / name) as path:
                    path.write_text(text)
