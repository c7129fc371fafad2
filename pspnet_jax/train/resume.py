"""Where a run starts: from its own past, which it has to fit, from the weights of another, or from random ones."""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import parallel, weights
from pspnet_jax.errors import UserError
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import checkpoint
from pspnet_jax.train.step import TrainState, Variables, init_state

logger = logging.getLogger(__name__)
# What a resumed run has to share with its past, and what of it may change, because the parameters mean the same.
MUST_MATCH = ("model.", "normalize.", "dataset.name", "dataset.class_names", "optimizer.name")
MAY_CHANGE = ("model.dtype", "model.dropout", "model.norm", "model.factored_head")
# The same for a run that starts from another's weights.
MAY_DIFFER_AT_START = (*MAY_CHANGE, "model.auxiliary", "model.output_stride")


def start(
    config: ConfigDict,
    model: nn.Module,
    optimizer: Optimizer,
    mesh: Mesh,
    image_shape: tuple[int, ...],
    checkpoints: checkpoint.Checkpoints,
    workdir: epath.Path,
    fingerprint: str = "",
) -> TrainState:
    """Returns the state of the newest checkpoint, or else a fresh one with the weights of config.init_from.

    Says what has changed since the checkpoint: the config, the training data, how it is evaluated.

    Raises:
      UserError: the run in workdir has another config, or is further than config.total_steps; see `initial_weights`.
    """
    init = init_state(config, model, optimizer, mesh, image_shape)
    if checkpoints.steps:
        if origin := checkpoints.origin():
            check_resumable(origin[0], config)
        if checkpoints.steps[-1] > config.total_steps:
            raise UserError(
                f"total_steps={config.total_steps}: the run in {workdir} is at step {checkpoints.steps[-1]} already"
            )
        everywhere = parallel.replicated(mesh)
        shapes = jax.eval_shape(init)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
        state = checkpoints.restore_newest(target)
        assert state is not None, "the checkpoints were there a moment ago"
        if origin and origin[1] and fingerprint and origin[1] != fingerprint:
            logger.warning(
                "training data changed since step %s: files were added, removed or altered (fingerprint %s -> %s); "
                "the steps from here on are not those of an uninterrupted run",
                int(state.step),
                origin[1],
                fingerprint,
            )
        _check_comparable(checkpoints, config)
        return state
    if not config.init_from:
        return init()
    given, names = initial_weights(config, model, mesh)
    fresh = init()
    given = match_classes(given, fresh.weights, names, config.dataset.class_names, config.init_from)
    return with_weights(fresh, given, config.init_from)


def _check_comparable(checkpoints: checkpoint.Checkpoints, config: ConfigDict) -> None:
    """Says where scores from here on cannot be compared with those before."""
    scored = [score for step in checkpoints.steps if (score := checkpoints.score(step))]
    if not scored:
        return
    before, now = scored[-1].get(checkpoint.SETTINGS) or {}, evaluation_settings(config)
    if changed := [f"{k}: {before.get(k, 'unknown')!r} -> {v!r}" for k, v in now.items() if before.get(k) != v]:
        logger.warning(
            "evaluations from here on cannot be compared with those before (%s); the best checkpoint is one of the new ones",
            "; ".join(changed) if before else "which do not say how they were made",
        )


def evaluation_settings(config: ConfigDict) -> dict[str, Any]:
    """What two scores have to share to be compared: all of config.eval but its batch size, and where the data is from."""
    settings = {field: value for field, value in configs.leaves(config.eval, "eval.") if field != "eval.batch_size"}
    settings |= {f"dataset.{field}": config.dataset[field] for field in ("name", "root", "extra_root", "tfds_name")}
    return json.loads(json.dumps(settings))


def initial_weights(config: ConfigDict, model: nn.Module, mesh: Mesh) -> tuple[Variables, Sequence[str]]:
    """Reads config.init_from: the variables of another run, or those that a file of others' weights has for this model.

    Returns:
      the variables, and the names of the classes that they tell apart; none where a file does not name them.

    Raises:
      MissingFileError: there is no such run or file.
      UserError: it cannot be read; or its network is another, or was trained on otherwise normalized images.
    """
    if epath.Path(config.init_from).is_dir():
        saved, step, variables = checkpoint.load(config.init_from, "latest", mesh)
        _check_same_function(saved, config)
        logger.info("starting from the weights of %s, step %s", config.init_from, step)
        return variables, saved.dataset.class_names
    source = weights.inspect(config.init_from)
    weights.check_normalize(config.normalize, source)
    logger.info("starting from %s", "; ".join(filter(None, (str(source), source.entry_note))))
    return weights.load(config.init_from, model, partial=True), source.class_names


def _check_same_function(saved: ConfigDict, config: ConfigDict) -> None:
    """Refuses to start a network from the weights of one that computes something else with them."""
    for section in ("model", "normalize"):
        given, free = config[section], MAY_DIFFER_AT_START
        if fields := {k: v for k, v in saved[section].items() if v != given[k] and f"{section}.{k}" not in free}:
            raise UserError(f"init_from={config.init_from}: its network is another one; set {weights.flags(section, fields)}")


def match_classes(given: Variables, fresh: Variables | None, old: Sequence[str], new: Sequence[str], name: str) -> Variables:
    """Puts the rows of the classifiers into the order of this run's classes, by their names, and says which those are.

    Names that differ in case or outer spaces alone are the same.

    Args:
      given: the variables of another run.
      fresh: this run's, which has the rows of the classes that the other does not know; None: unless both name the same
        classes, the rows stay where they are.
      old: the other's classes, in the order of its rows; none where it does not name them.
      new: this run's.
      name: of the other run.

    Returns:
      `given` with other classifiers; without them where no class is known.
    """
    keys = [[c.strip().lower() for c in names] for names in (old, new)]
    old_keys, new_keys = keys if all(len(set(k)) == len(k) for k in keys) else (list(old), list(new))
    if old_keys == new_keys or not new:
        return given
    flat, ours = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (given, fresh or given))
    paths = [path for path in flat if re.fullmatch(r"params/(.*_)?classifier/(kernel|bias)", path)]
    if any(all(re.fullmatch(r"class \d+", c) for c in names) for names in (old, new)):  # also where there is none
        if any(path in ours and flat[path].shape == ours[path].shape for path in paths):
            logger.warning("the classes of %s have no names: the classifier's rows are taken in their order", name)
        return given
    if fresh is None and sorted(old_keys) != sorted(new_keys):
        i = next(i for i, pair in enumerate(zip(old_keys, new_keys, strict=True)) if pair[0] != pair[1])
        logger.warning(
            "%s names its classes otherwise: class %s is %r there and %r here: the classifier's rows are taken by position; "
            "where the order differs, too, set dataset.class_names to the names there",
            *(name, i, old[i], new[i]),
        )
        return given
    rows = {i: old_keys.index(c) for i, c in enumerate(new_keys) if c in old_keys}
    for path in paths:
        theirs, value = np.asarray(flat.pop(path)), np.array(ours.get(path, np.zeros(())))
        if rows and theirs.shape == (*value.shape[:-1], len(old)) and value.shape[-1:] == (len(new),):
            value[..., list(rows)] = theirs[..., list(rows.values())]
            flat[path] = value
    groups = {
        "kept": [new[i] for i, j in rows.items() if i == j],
        "moved": [f"{new[i]} ({j} -> {i})" for i, j in rows.items() if i != j],
        "drawn at random": [c for i, c in enumerate(new) if i not in rows],
        "left out": [c for j, c in enumerate(old) if j not in rows.values()],
    }
    told = "; ".join(f"{what}: {', '.join(classes)}" for what, classes in groups.items() if classes)
    logger.warning("%s has other classes, and the classifier's rows go by their names: %s", name, told)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def with_weights(state: TrainState, given: Variables, name: str) -> TrainState:
    """Puts the weights of a network of the same backbone into a fresh state; what is absent or of another form stays fresh, and
    is named.

    Args:
      state: fresh.
      given: a run's variables, or a part of them as others' files have it.
      name: where they are from.

    Raises:
      UserError: the backbones differ.
    """
    flat = flax.traverse_util.flatten_dict(given, sep="/")
    fresh = flax.traverse_util.flatten_dict(state.weights, sep="/")
    kept = [k for k, v in fresh.items() if k not in flat or flat[k].shape != v.shape]
    if other := [k for k in kept if "/backbone/" in k]:
        raise UserError(f"init_from={name}: its backbone is another one: {other[0]} is not there, or has another shape")
    if kept:
        modules = dict.fromkeys(k.split("/")[1] for k in kept)
        logger.warning("not in %s, or of another form, and so drawn at random: %s", name, ", ".join(modules))
    placed = {k: v if k in kept else jax.device_put(flat[k], v.sharding) for k, v in fresh.items()}
    merged = flax.traverse_util.unflatten_dict(placed, sep="/")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, merged)
    return state.replace(**merged, ema=ema)


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """Every field whose value differs, as "field: saved -> current"."""
    new = dict(configs.leaves(current))
    return [f"{f}: {old!r} -> {new.get(f)!r}" for f, old in configs.leaves(saved) if old != new.get(f)]


def check_resumable(saved: ConfigDict, current: ConfigDict) -> None:
    """Refuses to go on with another network or other classes; says what else has changed.

    Raises:
      UserError: lists the fields that differ.
    """
    changed = differences(saved, current)
    fatal = [c for c in changed if c.startswith(MUST_MATCH) and not c.startswith(MAY_CHANGE)]
    if (saved.optimizer.ema_decay > 0) != (current.optimizer.ema_decay > 0):
        fatal += [c for c in changed if c.startswith("optimizer.ema_decay")]
    if fatal:
        raise UserError(
            f"this workdir holds a run with another config ({'; '.join(fatal)}): use the saved values, "
            "or another --workdir (--config.init_from=WORKDIR starts from its weights)"
        )
    if changed:
        logger.warning("resuming with a changed config: %s", "; ".join(changed))
