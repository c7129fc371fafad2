"""Checkpoints of a run, by orbax: the newest two and the best one are kept, written in the background, each with its config.

Layout: WORKDIR/checkpoints/STEP/{weights,ema,optimizer,config,data}, checksums.json, and score.json once it is scored.
Evaluation reads only the config and the weights, or their moving average. Version 0.1 had all but the config in STEP/state,
which is read as well.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.train import integrity
from pspnet_jax.train.integrity import Verdict
from pspnet_jax.train.lock import locked
from pspnet_jax.train.step import TrainState, Variables

logger = logging.getLogger(__name__)
T = TypeVar("T")
SCORE = "score"  # of the metrics beside a checkpoint, what decides which is best; version 0.1 had "mean_iou" alone
SETTINGS = "settings"  # of the evaluation; only scores with the same are compared
PAUSES = (1.0, 5.0, 15.0)  # seconds before a checkpoint that storage does not hand out is read again


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which reads no scores: those beside an older run's checkpoints may be damaged, and it would stop."""

    def metrics(self, step: int) -> Any:
        return None


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints.

    Attributes:
      steps: the steps saved, in order.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
        self._directory = files.absolute(workdir) / "checkpoints"
        if read_only and not self._directory.is_dir():
            raise MissingFileError(
                f"{workdir}: is no run with checkpoints; train there first, copy the run with its folder checkpoints/, or name "
                "another directory"
            )
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
        self._scores = {step: score for step in self.steps if (score := self._read_score(step))}

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether one of several processes was asked to stop; all get the same answer for a step."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, config: ConfigDict, fingerprint: str = "") -> None:
        """Copies the state and writes it in the background; `fingerprint` is that of the training data.

        Raises:
          UserError: this one or the one before it could not be written.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items |= {"config": ocp.args.JsonSave(config.to_dict()), "data": ocp.args.JsonSave({"fingerprint": fingerprint})}
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _write_checksums(self) -> None:
        """Called when all items are written, before the checkpoint gets its name."""
        if jax.process_index() == 0 and not files.is_remote(self._directory):
            for directory in self._directory.glob(f"{self._saving}.*-tmp*"):
                integrity.write_checksums(directory)

    @contextlib.contextmanager
    def _writing(self) -> Any:
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
        with self._writing():
            self._manager.wait_until_finished()
            self._scores[step] = json.loads(json.dumps({**metrics, SETTINGS: settings}))
            if jax.process_index() == 0 and (self._directory / str(step)).exists():
                with files.atomic(self._directory / str(step) / "score.json") as path:
                    path.write_text(json.dumps(self._scores[step]))

    def score(self, step: int) -> Mapping[str, Any] | None:
        """The metrics of a checkpoint with their `SETTINGS`; None: it was not scored."""
        return self._scores.get(step)

    def _read_score(self, step: int) -> dict[str, Any] | None:
        path, old = (self._directory / str(step) / name for name in ("score.json", "metrics/metrics"))
        try:
            path = path if path.exists() else old
            metrics = json.loads(path.read_text())
            return {**metrics, SCORE: float(metrics.get(SCORE, metrics.get("mean_iou", math.nan)))}
        except FileNotFoundError:
            return None
        except Exception:  # one damaged file must not keep the other checkpoints from being used
            logger.warning("the score of checkpoint %s cannot be read; it does not count for the best", step)
            return None

    def best(self) -> int | None:
        """The step with the largest score among those that were scored as the newest of them; None where none is."""
        scores = {step: score for step, score in self._scores.items() if step in self.steps and not math.isnan(score[SCORE])}
        if not scores:
            return None
        newest = scores[max(scores)].get(SETTINGS)
        return max((score[SCORE], step) for step, score in scores.items() if score.get(SETTINGS) == newest)[1]

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Reads one checkpoint into the target's shapes and shardings; each process by itself, so that none waits for another.

        Raises:
          OtherNetworkError: the arrays saved are others.
        """
        directory = self._directory / str(step)
        if (directory / "state").exists():
            parts = {"average" if name == "ema" else name: tree for name, tree in vars(target).items()}
            read = _read_tree(directory / "state", target.step.sharding, tuple(parts))
            old = jax.tree.unflatten(jax.tree.structure(parts), jax.tree.leaves(read))  # optax's empty states have changed
            return TrainState(ema=old.pop("average"), **old)
        targets, reader = _items(target), ocp.StandardCheckpointHandler()
        integrity.check_shapes(directory, targets)
        read = {k: reader.restore(directory / k, args=ocp.args.StandardRestore(tree)) for k, tree in targets.items()}
        number = jax.device_put(jax.numpy.int32(step), target.step.sharding)
        return TrainState(number, opt_state=read["optimizer"], ema=read.get("ema"), **read["weights"])

    def variables(self, step: int, mesh: Mesh) -> Variables:
        """Reads what evaluation uses, the moving average where there is one, onto every device of the mesh."""
        item, everywhere = self._evaluated_item(step), parallel.replicated(mesh)
        if item != "state":
            return _read_tree(self._directory / str(step) / item, everywhere)
        old = self._directory / str(step) / "state"
        return _read_tree(old, everywhere, ("average",)).get("average") or _read_tree(old, everywhere)

    def _evaluated_item(self, step: int) -> str:
        directory = self._directory / str(step)
        return next((item for item in ("state", "ema") if (directory / item).exists()), "weights")

    def config(self, step: int) -> ConfigDict:
        """The config that the checkpoint was trained with."""
        return configs.from_dict(_read_json(self._directory / str(step) / "config"))

    def origin(self) -> tuple[ConfigDict, str] | None:
        """The config of the newest checkpoint that tells it, and its training data's fingerprint; empty where it is not known.

        Raises:
          UserError: storage does not hand it out.
        """

        def read(directory: epath.Path) -> tuple[ConfigDict, str]:
            data = directory / "data"
            return configs.from_dict(_read_json(directory / "config")), _read_json(data)["fingerprint"] if data.exists() else ""

        for step in reversed(self.steps):
            _, _, found = self.attempt(step, ("config", "data"), functools.partial(read, self._directory / str(step)))
            if found:
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
            old = (self._directory / str(step) / "state").exists()
            items = ("state", "config") if old else (*_items(target), "config")
            verdict, reason, state = self.attempt(step, items, functools.partial(self.restore, step, target))
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

    def attempt(self, step: int, items: Sequence[str], read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
        """Reads and judges a checkpoint, together with the other processes; tries again where storage does not hand it out.

        Returns:
          the verdict of all processes, the reason as "is damaged (...)", and what `read` returned.

        Raises:
          UserError: storage does not hand it out.
        """
        for pause in (*PAUSES, None):
            own, reason, result = self._attempt(step, items, read)
            verdict = Verdict(parallel.agree(own))
            if verdict != own:
                reason = "was refused by another process of this job, which says why"
            if verdict is not Verdict.UNREACHABLE:
                return verdict, reason, result
            if pause is not None:
                logger.warning("checkpoint %s %s; trying again in %.0f s", step, reason, pause)
                time.sleep(pause)
        raise UserError(
            f"checkpoint {step} in {self._directory} {reason}; it may be all right, and nothing was changed: "
            "try again when the storage answers"
        )

    def _attempt(self, step: int, items: Sequence[str], read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
        directory, missing = self._directory / str(step), list[str]()
        try:
            missing, differing = integrity.problems(directory, items)
            if differing:
                return Verdict.DAMAGED, f"is damaged (other content than was saved: {_listed(differing)})", None
            result = read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # not the file's fault
        except Exception as error:  # whatever a damaged file makes orbax raise
            verdict = integrity.judge(error)
            if verdict is Verdict.DAMAGED and missing:
                return verdict, f"is damaged or incomplete (missing: {_listed(missing)})", None
            return verdict, f"{SAID[verdict]} ({integrity.reason(error)})", None
        if found := integrity.not_finite(result):
            return Verdict.NOT_FINITE, f"{SAID[Verdict.NOT_FINITE]} ({found})", result
        return Verdict.GOOD, "", result

    def _set_aside(self, step: int) -> epath.Path:
        aside = self._directory.parent / "set_aside" / str(step)
        if jax.process_index() == 0:
            with self._writing():
                aside.parent.mkdir(exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: it could not be.
        """
        with self._writing():
            self._manager.close()


SAID = {
    Verdict.NOT_FINITE: "is not finite",
    Verdict.DAMAGED: "is damaged",
    Verdict.OTHER_NETWORK: "holds another network",
    Verdict.UNREACHABLE: "could not be read",
}


class _Best:
    """Orbax's question of which checkpoints to keep, answered: the best one."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = self._checkpoints.best()
        return [checkpoint.step == best for checkpoint in checkpoints]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_json(path: epath.Path) -> Any:
    return ocp.JsonCheckpointHandler().restore(path)


def _items(state: TrainState) -> dict[str, Any]:
    return {"weights": state.weights, "optimizer": state.opt_state} | ({"ema": state.ema} if state.ema else {})


def _read_tree(path: epath.Path, sharding: Sharding, parts: Sequence[str] = ("params", "batch_stats")) -> Any:
    """Reads those parts of a saved tree that are not empty, whatever their shapes."""

    def target(saved: Any) -> Any:
        return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)

    reader = ocp.PyTreeCheckpointHandler()
    saved = reader.metadata(path).tree
    shapes = jax.tree.map(target, {name: saved[name] for name in parts if saved[name] is not None})
    if not shapes:
        return {}
    restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
    return reader.restore(path, args=ocp.args.PyTreeRestore(shapes, restore_args=restore_args, partial_restore=True))


def load(workdir: epath.PathLike, which: str, mesh: Mesh) -> tuple[ConfigDict, int, Variables]:
    """Reads a run's weights for evaluation: its config, the step found ("latest", "best" or a number), and its variables.

    Raises:
      MissingFileError: there is no such run or step.
      UserError: the checkpoint is damaged or not finite, has other classes than its config, or storage does not hand it out.
    """
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        step = checkpoints.find(which)
        verdict, reason, read = checkpoints.attempt(
            step,
            (checkpoints._evaluated_item(step), "config"),
            lambda: (checkpoints.config(step), checkpoints.variables(step, mesh)),
        )
        if verdict is not Verdict.GOOD or read is None:
            raise UserError(f"checkpoint {step} in {workdir} {reason}; choose another with --checkpoint")
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
        if (workdir / "config.json").exists() or any(workdir.glob("checkpoints/*")):
            raise UserError(f"{workdir}: holds a run already; choose another --workdir, or delete it")
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            checkpoints.save(0, state, config)
        with files.writing(workdir, "make room"), files.atomic(workdir / "config.json") as path:
            path.write_text(configs.to_json(config))
