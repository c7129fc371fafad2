"""Checkpoints of a run, written in the background by orbax, each with its config. The newest two and the best are kept.

`layout` describes their contents; `integrity` and `manifest` check them for damage; `scores` selects the best.
"""

import contextlib
import functools
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from pspnet_jax import config as configs
from pspnet_jax import files, parallel, peers
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.lock import locked
from pspnet_jax.train import integrity, layout, manifest
from pspnet_jax.train.integrity import Verdict
from pspnet_jax.train.scores import Scores
from pspnet_jax.train.step import TrainState, Variables

logger = logging.getLogger(__name__)


def _quiet_orbax() -> None:
    """Silences what orbax logs when it opens a directory only to read, and the tracebacks that it and its event loop log once
    per array for an error that they also raise."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR and not re.search("read.only=", str(record.msg))

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or is_news(record))
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: None if str(found.exc_value) == "Event loop is closed" else hook(found)


_quiet_orbax()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, except that it reads no scores: a damaged score written by version 0.1 would raise an error."""

    def metrics(self, step: int) -> Any:
        return None


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes; not if this one's part of a save has failed, because they wait for it elsewhere."""
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints, and their `scores`."""

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
        self._directory = files.absolute(workdir) / "checkpoints"
        if read_only and not files.is_there(self._directory):
            parent = self._directory.parent.parent  # its own, of a root directory
            hint = f"use {parent.parent}, which contains it" if parent.name == "checkpoints" else "train there first"
            raise MissingFileError(
                f"{workdir}: is not a run with checkpoints; {hint}, copy the run with its checkpoints/ directory, or choose "
                "another directory"
            )
        if not read_only and (odd := set(str(self._directory)) & set("[]\\")):
            raise UserError(f"{workdir}: orbax cannot write to a path that contains {' or '.join(sorted(odd))}; choose another")
        self._saving = 0  # the step being written, or 0
        self._failures = 0  # saves that have failed, one after the other
        self._read_only = read_only
        self._manager = self._open()
        if not read_only:
            self._announce(max(self.steps, default=0))
        self.scores = Scores(self._directory, self.steps)

    def _open(self) -> _Manager:
        """Returns a new orbax manager, after removing what killed processes and failed saves have left."""
        with self._writing():
            return _Manager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), _Best(self)]),
                    async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
                    cleanup_tmp_directories=not self._read_only,
                    create=not self._read_only,
                    read_only=self._read_only,
                ),
            )

    @property
    def steps(self) -> list[int]:
        """The saved steps, in increasing order, including one that is still being written."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        """Returns the directory of a checkpoint."""
        return self._directory / str(step)

    def reached_preemption(self, step: int) -> bool:
        """Returns whether any process of the job was asked to stop. For a given step, all processes get the same answer."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, config: ConfigDict, fingerprint: str = "") -> None:
        """Copies the state and writes it in the background. `fingerprint` identifies the training data.

        Raises:
          UserError: the checkpoint cannot be written.
        """
        trees = layout.items(state)
        documents = {"config": config.to_dict(), "data": {"step": step, "fingerprint": fingerprint}}
        contents = trees | {name: manifest.document(value) for name, value in documents.items()}
        self.save_failed(wait=True)  # the new save may succeed even if the last one failed
        documents[manifest.ITEM] = manifest.describe(contents) if jax.process_index() == 0 else {}  # the first one writes it
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in documents.items()}
        with self._writing():
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))
        if jax.process_count() > 1:
            threading.Thread(target=self._announce, args=[step], daemon=True).start()

    def save_failed(self, wait: bool = False) -> bool:
        """Returns whether the last save has failed in the background, and logs why. If `wait`, waits for the save to end.

        Raises:
          UserError: the save before has failed too, or this is one of several processes, which cannot save again on its own.
        """
        with self._writing():
            try:
                if wait or not self._manager.is_saving_in_progress():
                    self._manager.wait_until_finished()
                    if self._saving:
                        self._saving, self._failures = 0, 0
            except Exception as error:
                self._failures += 1
                if (cause := files.storage_error(error)) is None or self._failures > 1 or jax.process_count() > 1:
                    raise
                logger.warning("checkpoint %s could not be written (%s); saving again", self._saving, cause)
                self._saving = 0
                with contextlib.suppress(Exception):  # orbax would raise more errors of this save at the next one
                    self._manager.close()
                self._manager = self._open()
                return True
        return False

    def _announce(self, step: int) -> None:
        """Waits until a checkpoint is complete, and then names it in the advice to the user if another process dies."""
        with contextlib.suppress(Exception):  # `save_failed` reports it
            self._manager.wait_until_finished()
            peers.advise(f"start the same command on all hosts again, and training resumes from step {step}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds the newest complete checkpoint to the message of storage errors. Checkpoints with a final name are complete."""
        try:
            yield
        except Exception:
            try:
                complete = saved_steps(self._directory.parent)
            except Exception:  # storage is unavailable
                complete = []
            newest = f"the newest complete checkpoint is step {complete[-1]}" if complete else "there is no complete checkpoint"
            advice = f"{newest}; free some space or fix the cause, then run the same command to resume"
            with files.writing(self._directory, advice):
                raise

    def add_score(self, step: int, metrics: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """Writes the score of a checkpoint, see `Scores.add`, after waiting until the checkpoint is written."""
        with parallel.fail_together("writing the score"), self._writing():
            self._manager.wait_until_finished()
            self.scores.add(step, metrics, settings)

    def best(self) -> int | None:
        """Returns the step of the best checkpoint, see `Scores.best`; None if there are no scores."""
        return self.scores.best(self.steps)

    def read_config(self) -> tuple[ConfigDict, str] | None:
        """Returns the config and data fingerprint ("" if unknown) of the newest checkpoint whose config can be read, or None.

        Raises:
          UserError: storage is unavailable.
        """
        for step in reversed(self.steps):
            directory = self.path(step)
            read = functools.partial(layout.read_config, directory)
            if found := integrity.read_checked(directory, lambda: ["config"], read)[2]:
                return found
        return None

    def find(self, which: str) -> int:
        """Returns the step of a checkpoint, given "latest", "best" (by validation score) or a step number.

        Raises:
          MissingFileError: there is no such checkpoint; lists the existing ones.
        """
        steps = self.steps
        found = {"latest": max(steps, default=None), "best": self.best()} | {str(s): s for s in steps}
        if (step := found.get(which)) is None:
            others = sorted(path.name for path in self._directory.iterdir() if not path.name.isdigit())
            partial = f" (and {', '.join(others)}, left by an interrupted save or copy)" if others else ""
            complete = f"checkpoints {steps}" if steps else "no complete checkpoint"
            complete += ", of which none has a score" * (which == "best" and bool(steps))
            expected = "expected latest" + ", best" * (which != "best") + " or one of these"
            raise MissingFileError(f"checkpoint {which!r}: {self._directory} has {complete}{partial}; {expected}")
        return step

    def restore_newest(self, target: TrainState) -> TrainState | None:
        """Returns the newest usable state, the same in all processes, or None if there are no checkpoints.

        Newer ones that are damaged or not finite are logged and moved to set_aside/.

        Raises:
          UserError: no checkpoint is usable, one belongs to another network, or storage is unavailable.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps):
            read = functools.partial(_read, self.path(step), target)
            items = functools.partial(layout.item_names, self.path(step), target)
            verdict, problem, state = integrity.read_checked(self.path(step), items, read)
            if verdict is Verdict.GOOD:
                for bad, description in problems.items():
                    aside = self._set_aside(bad, description)
                    logger.warning(f"checkpoint {bad} {description}; moved to {aside}; using checkpoint {step}")
                return state
            if verdict is Verdict.OTHER_NETWORK:
                raise UserError(f"checkpoint {step} in {self._directory} {problem}; use the saved config, or another --workdir")
            problems[step] = problem
        if problems:
            listed = "; ".join(f"{step} {problem}" for step, problem in problems.items())
            raise UserError(
                f"no checkpoint in {self._directory} can be used ({listed}); delete the directory to start over, "
                "or choose another --workdir"
            )
        return None

    def _set_aside(self, step: int, description: str) -> epath.Path:
        aside = self._directory.parent / "set_aside" / str(step)
        with parallel.fail_together(f"setting aside checkpoint {step}, which {description},"), self._writing():
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                if files.is_remote(aside):
                    self.path(step).rename(aside)
                else:
                    shutil.move(self.path(step), aside)  # which may be on another disk
        self._manager.reload()
        self.scores.remove(step)
        return aside

    def close(self) -> None:
        """Waits until everything is written; raises UserError if the last checkpoint could not be."""
        with self._writing():
            self._manager.close()


def _read(directory: epath.Path, target: TrainState) -> TrainState:
    """Reads the state of a checkpoint whose config can be read, too."""
    layout.read_config(directory)
    return layout.read_state(directory, target)


class _Best:
    """Orbax preservation policy: keeps the best checkpoint, and those with unreadable scores, which may be the best."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = {self._checkpoints.best(), *self._checkpoints.scores.unreadable}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def saved_steps(workdir: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in increasing order."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def load(workdir: epath.PathLike, which: str | int, mesh: Mesh) -> tuple[ConfigDict, int, Variables]:
    """Returns the config, step and variables of a run's checkpoint `which` ("latest", "best" or a step), for evaluation.

    Raises:
      MissingFileError: there is no such run or checkpoint.
      UserError: the checkpoint is damaged, not finite, or inconsistent with its config; or storage is unavailable.
    """
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        step = checkpoints.find(str(which))
        directory = checkpoints.path(step)

        verdict, problem, read = integrity.read_checked(
            directory,
            lambda: ["config", layout.evaluated_item(directory)],
            lambda: (layout.read_config(directory)[0], layout.read_variables(directory, mesh)),
        )
    if verdict is not Verdict.GOOD or read is None:
        if str(which) != str(step) and not files.is_there(directory) and saved_steps(files.absolute(workdir)):
            return load(workdir, which, mesh)  # a run in progress has replaced it with a newer checkpoint
        raise UserError(
            f"checkpoint {step} in {workdir} {problem}; to evaluate, predict or export, choose another with --checkpoint; "
            f"to use init_from with the checkpoint before it, move {directory} away"
        )
    config, variables = read
    bias = variables["params"].get("classifier", {}).get("bias")
    if bias is not None and config.dataset.class_names and bias.shape[-1] != len(config.dataset.class_names):
        raise UserError(
            f"checkpoint {step} in {workdir} has {bias.shape[-1]} classes, but its config names "
            f"{len(config.dataset.class_names)}; choose another with --checkpoint"
        )
    return config, step, variables


def require_no_run(workdir: epath.PathLike) -> None:
    """Raises UserError if the directory already holds a run."""
    workdir = files.absolute(workdir)
    if (workdir / "config.json").exists() or saved_steps(workdir):
        raise UserError(f"{workdir}: already holds a run; choose another --workdir, or delete it")


def create_run(workdir: epath.PathLike, config: ConfigDict, state: TrainState) -> None:
    """Creates a run with the given state as checkpoint 0, for evaluation, prediction, export or further training.

    Raises:
      UserError: the directory already holds a run, is locked by another process, or cannot be written.
    """
    workdir = files.absolute(workdir)
    with locked(workdir):
        require_no_run(workdir)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            checkpoints.save(0, state, config)
        with files.writing(workdir, "free some space"):
            files.write_atomic(workdir / "config.json", configs.to_json(config))
