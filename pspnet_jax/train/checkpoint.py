"""Checkpoints of a run, by orbax: the newest two and the best one are kept, written in the background, each with its config.

What one holds, see `layout`; how it is judged, see `integrity`.
"""

import contextlib
import functools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.lock import locked
from pspnet_jax.train import integrity, layout
from pspnet_jax.train.integrity import Verdict
from pspnet_jax.train.step import TrainState, Variables

logger = logging.getLogger(__name__)
SCORE = "score"  # of the metrics beside a checkpoint, what decides which is best; version 0.1 had "mean_iou" alone
SETTINGS = "settings"  # of the evaluation; only scores with the same are compared


def _calm_orbax() -> None:
    """Keeps to one sentence what orbax raises, logs with a traceback, and lets a closed event loop repeat for each array."""
    logging.getLogger("absl").addFilter(lambda record: not ("orbax" in record.pathname and record.levelno >= logging.ERROR))
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: None if str(found.exc_value) == "Event loop is closed" else hook(found)


_calm_orbax()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which reads no scores: those beside an older run's checkpoints may be damaged, and it would stop."""

    def metrics(self, step: int) -> Any:
        return None


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints.

    Attributes:
      steps: the steps saved, in order.
      unreadable: those whose scores are there and cannot be read.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
        self._directory = files.absolute(workdir) / "checkpoints"
        if read_only and not files.is_there(self._directory):
            run = self._directory.parents[2]
            hint = f"it is part of the run {run}" if self._directory.parents[1].name == "checkpoints" else "train there first"
            raise MissingFileError(
                f"{workdir}: is no run with checkpoints; {hint}, copy the run with its folder checkpoints/, or name another "
                "directory"
            )
        if not read_only and (odd := set(str(self._directory)) & set("[]\\")):
            raise UserError(f"{workdir}: orbax cannot write below a name with {' or '.join(sorted(odd))}; choose another")
        self._saving = 0  # the step that is being written
        with self._writing():
            self._manager = _Manager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), _Best(self)]),
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
                    cleanup_tmp_directories=not read_only,  # what a killed process left
                    create=not read_only,
                    read_only=read_only,
                ),
            )
        self.unreadable = set[int]()
        self._scores = {step: score for step in self.steps if (score := self._read_score(step))}

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        """The directory of a checkpoint."""
        return self._directory / str(step)

    def reached_preemption(self, step: int) -> bool:
        """Whether one of several processes was asked to stop; all get the same answer for a step."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, config: ConfigDict, fingerprint: str = "") -> None:
        """Copies the state and writes it in the background; `fingerprint` is that of the training data.

        Raises:
          UserError: it cannot be written.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in layout.items(state).items()}
        items |= {
            "config": ocp.args.JsonSave(config.to_dict()),
            "data": ocp.args.JsonSave({"step": step, "fingerprint": fingerprint}),
        }
        self.failed(wait=True)  # this one may succeed all the same
        with self._writing():
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def failed(self, wait: bool = False) -> bool:
        """Whether the last save has failed in the background, which is said; `wait`: until it has ended."""
        try:
            if wait or not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()
        except Exception as error:
            if (why := files.storage_error(error)) is None:
                raise
            logger.warning("checkpoint %s could not be written (%s)", self._saving, why)
            return True
        return False

    def _write_checksums(self) -> None:
        """Called when all items are written, before the checkpoint gets its name."""
        if jax.process_index() == 0 and not files.is_remote(self._directory):
            for directory in self._directory.glob(f"{self._saving}.*-tmp*"):
                integrity.write_checksums(directory)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says of what cannot be written which checkpoints there are; orbax gives a checkpoint its name when it is complete."""
        try:
            complete = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())
        except Exception:  # there is none yet, or storage is out of reach
            complete = []
        kept = f"the newest complete one is that of step {complete[-1]}" if complete else "there is none complete yet"
        with files.writing(
            self._directory, f"{kept}; make room, or mend what is wrong, and the same command goes on from there"
        ):
            yield

    def add_score(self, step: int, metrics: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """Writes how a saved state was scored, when it is written itself.

        Args:
          step: of the checkpoint.
          metrics: numbers, `SCORE` among them: the larger, the better.
          settings: of the evaluation, which JSON can hold.
        """
        data = settings.get("data")
        with parallel.together("writing the score"), self._writing():
            self._manager.wait_until_finished()
            if self._scores and (self._scores[max(self._scores)].get(SETTINGS) or {}).get("data", data) != data:
                logger.warning(
                    "the evaluated data has changed: the best checkpoint is one of those scored from step %s on", step
                )
            self._scores[step] = json.loads(json.dumps({**metrics, SETTINGS: settings}))
            self.unreadable.discard(step)
            if jax.process_index() == 0 and self.path(step).exists():
                with files.atomic(self.path(step) / "score.json") as path:
                    path.write_text(json.dumps(self._scores[step]))

    def score(self, step: int) -> Mapping[str, Any] | None:
        """The metrics of a checkpoint with their `SETTINGS`; None: it was not scored."""
        return self._scores.get(step)

    def _read_score(self, step: int) -> dict[str, Any] | None:
        paths = [self.path(step) / name for name in ("score.json", "metrics/metrics")]
        try:
            path = next((path for path in paths if files.is_there(path)), None)
            if path is None:
                return None
            metrics = json.loads(path.read_text())
            if not isinstance(metrics.get(SETTINGS, {}), dict):
                raise ValueError(f"{SETTINGS} is no object")
            return {**metrics, SCORE: float(metrics.get(SCORE, metrics.get("mean_iou", math.nan)))}
        except Exception as error:  # one damaged file must not keep the other checkpoints from being used
            self.unreadable.add(step)
            logger.warning(
                "the score of checkpoint %s cannot be read (%s); it does not count for the best, and the checkpoint is kept",
                *(step, integrity.reason(error)),
            )
            return None

    def best(self) -> int | None:
        """The step with the largest score among those that were scored as the newest of them; None where none is."""
        scores = {step: score for step, score in self._scores.items() if step in self.steps and not math.isnan(score[SCORE])}
        if not scores:
            return None
        newest = scores[max(scores)].get(SETTINGS)
        return max((score[SCORE], step) for step, score in scores.items() if score.get(SETTINGS) == newest)[1]

    def origin(self) -> tuple[ConfigDict, str] | None:
        """The config of the newest checkpoint that tells it, and its training data's fingerprint; empty where it is not known.

        Raises:
          UserError: storage does not hand it out.
        """
        for step in reversed(self.steps):
            directory = self.path(step)
            if found := integrity.attempt(directory, lambda: ["config"], functools.partial(layout.read_origin, directory))[2]:
                return found
        return None

    def find(self, which: str) -> int:
        """The step of "latest", "best" (by the validation score) or a number.

        Raises:
          MissingFileError: there is none such; the ones there are, are listed.
        """
        steps = self.steps
        found = {"latest": max(steps, default=None), "best": self.best()} | {str(s): s for s in steps}
        if (step := found.get(which)) is None:
            others = sorted(path.name for path in self._directory.iterdir() if not path.name.isdigit())
            left = f" (and {', '.join(others)}, which an interrupted save or copy left)" if others else ""
            raise MissingFileError(
                f"--checkpoint {which}: {self._directory} has {steps or 'none'}{left}; expected latest, best or one of them"
            )
        return step

    def restore_newest(self, target: TrainState) -> TrainState | None:
        """Reads the newest good checkpoint; newer ones that are damaged or not finite are reported and moved out of the way.

        All processes act alike. None: there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints and none is good, one holds another network, or storage does not hand one out.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps):
            read = functools.partial(layout.read_state, self.path(step), target)
            items = functools.partial(layout.items_of, self.path(step), target)
            verdict, reason, state = integrity.attempt(self.path(step), items, read)
            if verdict is Verdict.GOOD:
                for bad, why in reasons.items():
                    logger.warning("checkpoint %s %s; moved to %s, using %s", bad, why, self._set_aside(bad), step)
                return state
            if verdict is Verdict.OTHER_NETWORK:
                raise UserError(f"checkpoint {step} in {self._directory} {reason}; use the saved config, or another --workdir")
            reasons[step] = reason
        if reasons:
            listed = "; ".join(f"{step} {reason}" for step, reason in reasons.items())
            raise UserError(
                f"no checkpoint in {self._directory} can be used ({listed}); delete the directory to start over, "
                "or choose another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> epath.Path:
        aside = self._directory.parent / "set_aside" / str(step)
        with parallel.together(f"setting checkpoint {step} aside"), self._writing():
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                self.path(step).rename(aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: it could not be.
        """
        with self._writing():
            self._manager.close()


class _Best:
    """Orbax's question of which checkpoints to keep, answered: the best one, and those that may be it."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = {self._checkpoints.best(), *self._checkpoints.unreadable}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def exists(workdir: epath.Path) -> bool:
    """Whether the directory has a complete checkpoint."""
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def load(workdir: epath.PathLike, which: str | int, mesh: Mesh) -> tuple[ConfigDict, int, Variables]:
    """Reads a run's weights for evaluation: its config, the step found ("latest", "best" or a number), and its variables.

    Raises:
      MissingFileError: there is no such run or step.
      UserError: the checkpoint is damaged or not finite, has other classes than its config, or storage does not hand it out.
    """
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        step = checkpoints.find(str(which))
        directory = checkpoints.path(step)

        def read_all() -> tuple[ConfigDict, Variables]:
            return layout.read_origin(directory)[0], layout.read_variables(directory, mesh)

        verdict, reason, read = integrity.attempt(directory, lambda: ["config", layout.evaluated_item(directory)], read_all)
    if verdict is not Verdict.GOOD or read is None:
        if str(which) != str(step) and not files.is_there(directory) and exists(files.absolute(workdir)):
            return load(workdir, which, mesh)  # a training has a newer one now
        raise UserError(
            f"checkpoint {step} in {workdir} {reason}; evaluate, predict and export take another with --checkpoint, and "
            f"init_from the one before it when {directory} is moved away"
        )
    config, variables = read
    bias = variables["params"].get("classifier", {}).get("bias")
    if bias is not None and config.dataset.class_names and bias.shape[-1] != len(config.dataset.class_names):
        raise UserError(
            f"checkpoint {step} in {workdir} tells {bias.shape[-1]} classes apart, but its config names "
            f"{len(config.dataset.class_names)}; choose another with --checkpoint"
        )
    return config, step, variables


def write_weights(workdir: epath.PathLike, config: ConfigDict, state: TrainState) -> None:
    """Makes a run of complete weights alone, as checkpoint 0, to evaluate, predict with, export or train on.

    Raises:
      UserError: the directory holds a run already, another process writes there, or nobody can.
    """
    workdir = files.absolute(workdir)
    with locked(workdir):
        if (workdir / "config.json").exists() or exists(workdir):
            raise UserError(f"{workdir}: holds a run already; choose another --workdir, or delete it")
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            checkpoints.save(0, state, config)
        with files.writing(workdir, "make room"), files.atomic(workdir / "config.json") as path:
            path.write_text(configs.to_json(config))
