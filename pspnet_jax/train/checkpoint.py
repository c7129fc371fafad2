"""Checkpoints of a run, by orbax: the newest two and the best one are kept, written in the background, each with its config.

Layout: WORKDIR/config.json and WORKDIR/checkpoints/STEP/{state,config}.
"""

import logging
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from pspnet_jax import config as configs
from pspnet_jax import files, models, optimizers, parallel, weights
from pspnet_jax.train.step import TrainState, Variables, init_state

logger = logging.getLogger(__name__)
BEST_METRIC = "mean_iou"
# What a resumed run has to share with its past, and what of it may change, because the parameters mean the same.
FIXED = ("model.", "normalize.", "dataset.name", "dataset.class_names")
FREE = ("model.dtype", "model.dropout", "model.norm", "model.factored_head")
FREE_AT_START = (*FREE, "model.auxiliary", "model.output_stride")  # the same of a run that starts from another's weights


def abstract_state(config: ConfigDict, model: models.PSPNet, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the config's train state: any number of devices restores into it."""
    everywhere = parallel.replicated(mesh)
    shapes = jax.eval_shape(init_state(config, model, mesh))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)


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
        self._directory = epath.Path(workdir).resolve() / "checkpoints"
        if read_only and not self._directory.exists():
            raise FileNotFoundError(f"{workdir}: is no run with checkpoints; train there first, or name another directory")
        policies = checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda metrics: metrics[BEST_METRIC], n=1, keep_checkpoints_without_metrics=False)
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
                best_fn=lambda metrics: metrics[BEST_METRIC],
                cleanup_tmp_directories=not read_only,  # what a killed process left
                create=not read_only,
                read_only=read_only,
            ),
        )

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, config: ConfigDict, metrics: Mapping[str, float] | None) -> None:
        """Copies the state and writes it in the background; metrics, where the state was evaluated, decide which is best."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config.to_dict()))
        self._manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Reads one checkpoint into the target's shapes and shardings (see `abstract_state`)."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return self._manager.restore(step, args=items)["state"]

    def config(self, step: int) -> ConfigDict:
        """The config that the checkpoint was trained with."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        return configs.from_dict(self._manager.restore(step, args=items)["config"])

    def find(self, which: str) -> int:
        """The step of "latest", "best" (by validation mIoU) or a number.

        Raises:
          FileNotFoundError: there is none such; the ones there are, are listed.
        """
        steps = self.steps
        found = {"latest": max(steps, default=None), "best": self._manager.best_step()} | {str(s): s for s in steps}
        if found.get(which) is None:
            raise FileNotFoundError(
                f"--checkpoint {which}: {self._directory} has {steps or 'none'}; expected latest, best or one of them"
            )
        return found[which]

    def restore_newest(self, target: TrainState) -> TrainState | None:
        """Reads the newest readable checkpoint; newer ones are reported and moved out of the way. None: there is none at all.

        Raises:
          ValueError: there are checkpoints, and none of them can be read.
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
            raise ValueError(
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


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def load(workdir: epath.PathLike, which: str, mesh: Mesh) -> tuple[ConfigDict, int, Variables]:
    """Reads a run's weights for evaluation: its config, the step found ("latest", "best" or a number), and its variables.

    Raises:
      FileNotFoundError: there is no such run or step.
      ValueError: the checkpoint cannot be read.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.find(which)
    try:
        config = checkpoints.config(step)
        model = models.build(config.model, len(config.dataset.class_names))
        state = checkpoints.restore(step, abstract_state(config, model, mesh))
    except Exception as error:  # whatever a damaged file makes orbax raise
        raise ValueError(
            f"checkpoint {step} in {workdir} cannot be read ({_reason(error)}); choose another with --checkpoint"
        ) from error
    finally:
        checkpoints.close()
    return config, step, state.variables


def initial_weights(config: ConfigDict, model: models.PSPNet, mesh: Mesh) -> Variables:
    """Reads config.init_from: the variables of another run, or those that a file of others' weights has for this model.

    Raises:
      FileNotFoundError: there is no such run or file.
      ValueError: it cannot be read; or its network is another, or was trained on otherwise normalized images.
    """
    if epath.Path(config.init_from).is_dir():
        saved, step, variables = load(config.init_from, "latest", mesh)
        _check_same_function(saved, config)
        logger.info("starting from the weights of %s, step %s", config.init_from, step)
        return variables
    source = weights.inspect(config.init_from)
    weights.check_normalize(config.normalize, source)
    logger.info("starting from %s", source)
    return weights.load(config.init_from, model, partial=True)


def _check_same_function(saved: ConfigDict, config: ConfigDict) -> None:
    """Refuses to start a network from the weights of one that computes something else with them."""
    for section in ("model", "normalize"):
        fields = {k: v for k, v in saved[section].items() if v != config[section][k] and f"{section}.{k}" not in FREE_AT_START}
        if fields:
            raise ValueError(f"init_from={config.init_from}: its network is another one; set {weights.flags(section, fields)}")


def with_weights(state: TrainState, given: Variables, name: str) -> TrainState:
    """Puts the weights of a network of the same backbone into a fresh state; what is absent or of another form stays fresh, and
    is named.

    Args:
      state: fresh.
      given: a run's variables, or a part of them as others' files have it.
      name: where they are from.
    """
    flat = flax.traverse_util.flatten_dict(given, sep="/")
    fresh = flax.traverse_util.flatten_dict({"params": state.params, "batch_stats": state.batch_stats}, sep="/")
    kept = [k for k, v in fresh.items() if k not in flat or flat[k].shape != v.shape]
    assert not any("/backbone/" in k for k in kept), "the networks were compared before"
    if kept:
        modules = dict.fromkeys(k.split("/")[1] for k in kept)
        logger.warning("not in %s, or of another form, and so drawn at random: %s", name, ", ".join(modules))
    placed = {k: v if k in kept else jax.device_put(flat[k], v.sharding) for k, v in fresh.items()}
    merged = flax.traverse_util.unflatten_dict(placed, sep="/")
    average = None if state.average is None else jax.tree.map(jnp.copy, merged)
    return state.replace(params=merged["params"], batch_stats=merged["batch_stats"], average=average)


def write_weights(workdir: epath.PathLike, config: ConfigDict, variables: Variables, mesh: Mesh) -> None:
    """Makes a run of complete weights alone, as checkpoint 0, to evaluate, predict with, export or train on.

    Raises:
      ValueError: the directory holds a run already.
    """
    workdir = epath.Path(workdir)
    if (workdir / "config.json").exists() or any(workdir.glob("checkpoints/*")):
        raise ValueError(f"{workdir}: holds a run already; choose another --workdir, or delete it")
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        average=variables if config.optimizer.ema_decay else None,
    )
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, jax.device_put(state, parallel.replicated(mesh)), config, None)
    checkpoints.close()
    with files.atomic(workdir / "config.json") as path:
        path.write_text(configs.to_json(config))


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """Every field whose value differs, as "field: saved -> current"."""
    new = dict(configs.leaves(current))
    return [f"{f}: {old!r} -> {new.get(f)!r}" for f, old in configs.leaves(saved) if old != new.get(f)]


def check_resumable(saved: ConfigDict, current: ConfigDict) -> None:
    """Refuses to go on with another network or other classes; says what else has changed.

    Raises:
      ValueError: lists the fields that differ.
    """
    changed = differences(saved, current)
    fatal = [c for c in changed if c.startswith(FIXED) and not c.startswith(FREE)]
    if (saved.optimizer.ema_decay > 0) != (current.optimizer.ema_decay > 0):
        fatal += [c for c in changed if c.startswith("optimizer.ema_decay")]
    if fatal:
        raise ValueError(
            f"this workdir holds a run with another config ({'; '.join(fatal)}): use the saved values, "
            "or another --workdir (--config.init_from=WORKDIR starts from its weights)"
        )
    if changed:
        logger.warning("resuming with a changed config: %s", "; ".join(changed))
