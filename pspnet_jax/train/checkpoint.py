"""Checkpoints of a run, by orbax: the newest two and the best one are kept, written in the background, each with its config.

Layout: WORKDIR/config.json and WORKDIR/checkpoints/STEP/{weights,ema,optimizer,config}. Evaluation reads only the config and
the weights, or their moving average. Version 0.1 had all but the config in STEP/state, which is read as well.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.train.step import TrainState, Variables

logger = logging.getLogger(__name__)
SCORE = "score"  # of the saved metrics, the one that decides which checkpoint is best; version 0.1 had "mean_iou" alone


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which a damaged metrics file does not stop."""

    def metrics(self, step: int) -> Any:
        try:
            return super().metrics(step)
        except ValueError:  # not JSON: one damaged file must not keep the other checkpoints from being used
            logger.warning("the metrics of checkpoint %s cannot be read; it does not count for the best", step)
            return None


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints.

    Attributes:
      steps: the steps saved, in order.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
        self._directory = files.absolute(workdir) / "checkpoints"
        if read_only and not self._directory.exists():
            raise MissingFileError(f"{workdir}: is no run with checkpoints; train there first, or name another directory")

        def score(metrics: Mapping[str, float]) -> float:
            return metrics[SCORE] if SCORE in metrics else metrics["mean_iou"]

        policies = checkpoint_managers
        best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
                best_fn=score,
                cleanup_tmp_directories=not read_only,  # what a killed process left
                create=not read_only,
                read_only=read_only,
            ),
        )

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether one of several processes was asked to stop; all get the same answer for a step."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, config: ConfigDict, metrics: Mapping[str, float] | None) -> None:
        """Copies the state and writes it in the background; metrics, where the state was evaluated, hold its `SCORE`."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["config"] = ocp.args.JsonSave(config.to_dict())
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Reads one checkpoint into the target's shapes and shardings."""
        if (self._directory / str(step) / "state").exists():
            parts = {"average" if name == "ema" else name: tree for name, tree in vars(target).items()}
            read = _read_tree(self._directory / str(step) / "state", target.step.sharding, tuple(parts))
            old = jax.tree.unflatten(jax.tree.structure(parts), jax.tree.leaves(read))  # optax's empty states have changed
            return TrainState(ema=old.pop("average"), **old)
        read = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()})
        number = jax.device_put(jax.numpy.int32(step), target.step.sharding)
        return TrainState(number, opt_state=read["optimizer"], ema=read.get("ema"), **read["weights"])

    def variables(self, step: int, mesh: Mesh) -> Variables:
        """Reads what evaluation uses, the moving average where there is one, onto every device of the mesh."""
        directory, everywhere = self._directory / str(step), parallel.replicated(mesh)
        old = directory / "state"
        if not old.exists():
            ema = directory / "ema"
            return _read_tree(ema if ema.exists() else directory / "weights", everywhere)
        average = _read_tree(old, everywhere, ("average",)).get("average")
        return average or _read_tree(old, everywhere, ("params", "batch_stats"))

    def config(self, step: int) -> ConfigDict:
        """The config that the checkpoint was trained with."""
        return configs.from_dict(self._read(step, config=ocp.args.JsonRestore())["config"])

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def find(self, which: str) -> int:
        """The step of "latest", "best" (by validation mIoU) or a number.

        Raises:
          MissingFileError: there is none such; the ones there are, are listed.
        """
        steps = self.steps
        found = {"latest": max(steps, default=None), "best": self._manager.best_step()} | {str(s): s for s in steps}
        if found.get(which) is None:
            raise MissingFileError(
                f"--checkpoint {which}: {self._directory} has {steps or 'none'}; expected latest, best or one of them"
            )
        return found[which]

    def restore_newest(self, target: TrainState) -> TrainState | None:
        """Reads the newest readable checkpoint; newer ones are reported and moved out of the way. None: there is none at all.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state = self.restore(step, target)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # not the file's fault
            except Exception as error:  # whatever a damaged file makes orbax raise
                problems[step] = _reason(error)
                continue
            for unreadable, reason in problems.items():
                aside = self._set_aside(unreadable)
                logger.warning("checkpoint %s cannot be read (%s); moved to %s, using %s", unreadable, reason, aside, step)
            return state
        if problems:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in problems.items())
            raise UserError(
                f"no checkpoint in {self._directory} can be read ({reasons}); delete the directory to start over, "
                "or choose another --workdir"
            )
        return None

    def _set_aside(self, step: int) -> epath.Path:
        aside = self._directory.parent / "unreadable" / str(step)
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoint moved")
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    return {"weights": state.weights, "optimizer": state.opt_state} | ({"ema": state.ema} if state.ema else {})


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _read_tree(path: epath.Path, sharding: Sharding, parts: Sequence[str] = ("params", "batch_stats")) -> Any:
    """Reads those parts of a saved tree that are not empty, whatever their shapes."""

    def target(saved: Any) -> Any:
        return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)

    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        shapes = jax.tree.map(target, {name: saved[name] for name in parts if saved[name] is not None})
        if not shapes:
            return {}
        restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
        return reader.restore(path, args=ocp.args.PyTreeRestore(shapes, restore_args=restore_args, partial_restore=True))


def load(workdir: epath.PathLike, which: str, mesh: Mesh) -> tuple[ConfigDict, int, Variables]:
    """Reads a run's weights for evaluation: its config, the step found ("latest", "best" or a number), and its variables.

    Raises:
      MissingFileError: there is no such run or step.
      UserError: the checkpoint cannot be read.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.find(which)
    try:
        return checkpoints.config(step), step, checkpoints.variables(step, mesh)
    except Exception as error:  # whatever a damaged file makes orbax raise
        raise UserError(
            f"checkpoint {step} in {workdir} cannot be read ({_reason(error)}); choose another with --checkpoint"
        ) from error
    finally:
        checkpoints.close()


def write_weights(workdir: epath.PathLike, config: ConfigDict, state: TrainState) -> None:
    """Makes a run of complete weights alone, as checkpoint 0, to evaluate, predict with, export or train on.

    Raises:
      UserError: the directory holds a run already.
    """
    workdir = files.absolute(workdir)
    if (workdir / "config.json").exists() or any(workdir.glob("checkpoints/*")):
        raise UserError(f"{workdir}: holds a run already; choose another --workdir, or delete it")
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, state, config, None)
    checkpoints.close()
    with files.atomic(workdir / "config.json") as path:
        path.write_text(configs.to_json(config))
