"""The initial state of a run: its newest checkpoint, the weights of another run or file, or random weights."""

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
from pspnet_jax.image_files import RGB8
from pspnet_jax.models.pspnet import RESNET_FIELDS
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import checkpoint, scores
from pspnet_jax.train.step import TrainState, Variables, make_init_state

logger = logging.getLogger(__name__)
# Fields that must not change when a run is resumed, except for MAY_CHANGE, which does not affect the parameters' meaning.
MUST_MATCH = ("model.", "normalize.", "dataset.name", "dataset.image_dtype", "dataset.class_names", "optimizer.name")
MAY_CHANGE = ("model.dtype", "model.dropout", "model.norm", "model.factored_head", "model.remat")
# Fields that may differ from those of the run named by init_from.
MAY_DIFFER_AT_START = (*MAY_CHANGE, "model.auxiliary", "model.channels", "model.output_stride")


def initial_state(
    config: ConfigDict,
    model: nn.Module,
    optimizer: Optimizer,
    mesh: Mesh,
    image_shape: tuple[int, ...],
    checkpoints: checkpoint.Checkpoints,
    workdir: epath.Path,
    fingerprint: str = "",
) -> TrainState:
    """Returns the state of the newest checkpoint, or a new one with the weights of config.init_from, if set.

    Logs what has changed since the checkpoint: the config, the training data, or the evaluation settings.

    Raises:
      UserError: the run in workdir has an incompatible config or is beyond config.total_steps; see also `initial_weights`.
    """
    init = make_init_state(config, model, optimizer, mesh, image_shape)
    if checkpoints.steps:
        saved_config, saved_fingerprint = checkpoints.read_config() or (None, "")
        if saved_config:
            check_resumable(saved_config, config)
        if checkpoints.steps[-1] > config.total_steps:
            raise UserError(
                f"total_steps={config.total_steps}: the run in {workdir} is already at step {checkpoints.steps[-1]}"
            )
        everywhere = parallel.replicated(mesh)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init))
        state = checkpoints.restore_newest(target)
        assert state is not None, "there were checkpoints a moment ago"
        if saved_fingerprint and fingerprint and saved_fingerprint != fingerprint:
            logger.warning(
                f"training data has changed since step {state.step}: files were added, removed or modified (fingerprint "
                f"{saved_fingerprint} -> {fingerprint}); the next steps differ from those of an uninterrupted run"
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
    """Warns if new scores are not comparable with the saved ones."""
    scored = [score for step in checkpoints.steps if (score := checkpoints.scores.of(step))]
    if not scored:
        return
    before, now = scored[-1].get(scores.SETTINGS) or {}, evaluation_settings(config)
    if changed := [f"{k}: {before.get(k, 'unknown')!r} -> {v!r}" for k, v in now.items() if before.get(k) != v]:
        reason = "; ".join(changed) if before else "whose settings are unknown"
        logger.warning(
            f"new evaluations cannot be compared with earlier ones ({reason}); the best checkpoint is chosen among the new ones"
        )


def evaluation_settings(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings that comparable scores share: config.eval except its batch size, and the source of the data."""
    settings = {field: value for field, value in configs.leaves(config.eval, "eval.") if field != "eval.batch_size"}
    given = ("images", "labels", "split_file", "split_fraction", "split_seed", "label_map", "ignore_index")
    read_by = {field for field in given if config.dataset[field] != configs.base_config().dataset[field]}
    settings |= {f"dataset.{f}": config.dataset[f] for f in ("name", "root", "extra_root", "tfds_name", *sorted(read_by))}
    return json.loads(json.dumps(settings))


def initial_weights(config: ConfigDict, model: nn.Module, mesh: Mesh) -> tuple[Variables, Sequence[str]]:
    """Reads config.init_from: the variables of another run, or those of a third-party weight file that fit this model.

    Their class names, which are also returned, are empty if a file does not name them.

    Raises:
      MissingFileError: there is no such run or file.
      UserError: it cannot be read, belongs to another network, or was trained on differently normalized images.
    """
    folder = not weights.is_name(config.init_from) and epath.Path(config.init_from)
    if folder and folder.is_dir() and not weights.is_folder(folder):
        saved, step, variables = checkpoint.load(config.init_from, "latest", mesh)
        _check_compatible(saved, config, "head_conv" in variables["params"])
        logger.info("starting from the weights of %s, step %s", config.init_from, step)
        adapted = weights.adapt_channels(variables, config.model.channels, config.init_from, saved.normalize.order)
        return adapted, saved.dataset.class_names
    source = weights.inspect(config.init_from)
    if config.model.channels == 3:  # others are adapted
        same_type = config.dataset.image_dtype == RGB8.dtype  # images of another type have other statistics
        weights.check_normalize(config.normalize, source, ("mean", "std", "order") if same_type else ("order",))
    logger.info("starting from %s", "; ".join(filter(None, (str(source), source.entry_note))))
    return weights.load(config.init_from, model, partial=True), source.class_names


def _check_compatible(saved: ConfigDict, config: ConfigDict, has_head: bool) -> None:
    """Raises if a run's weights would have another meaning under this config, even if their shapes match.

    Without a head, as from --mode pretrain, only the fields of the backbone count.
    """
    free: tuple[str, ...] = MAY_DIFFER_AT_START
    if adapted := saved.model.channels != config.model.channels:
        free += ("normalize.order",)
    if adapted or saved.dataset.image_dtype != config.dataset.image_dtype:  # such images have other statistics
        free += ("normalize.mean", "normalize.std")
    for section in ("model", "normalize"):
        given = config[section]
        used = saved[section] if has_head or section != "model" else RESNET_FIELDS
        if fields := {k: saved[section][k] for k in used if saved[section][k] != given[k] and f"{section}.{k}" not in free}:
            raise UserError(f"init_from={config.init_from}: it has a different network; set {weights.flags(section, fields)}")


def match_classes(given: Variables, fresh: Variables | None, old: Sequence[str], new: Sequence[str], name: str) -> Variables:
    """Reorders the classifier rows of another run or file to match this run's classes by name, and logs the changes.

    Case and surrounding spaces in names are ignored.

    Args:
      given: variables of the other run or file.
      fresh: initial variables of this run, which provide the rows of classes missing in `given`. If None, rows are only
        reordered if both have the same set of classes.
      old: class names of `given`, in the order of its rows; empty if unknown.
      new: class names of this run.
      name: name of the other run or file, for messages.

    Returns:
      `given` with reordered classifiers, or without classifiers if it shares no class with this run.
    """
    keys = [[c.strip().lower() for c in names] for names in (old, new)]
    old_keys, new_keys = keys if all(len(set(k)) == len(k) for k in keys) else (list(old), list(new))
    if old_keys == new_keys or not new:
        return given
    flat, ours = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (given, fresh or given))
    paths = [path for path in flat if re.fullmatch(r"params/(.*_)?classifier/(kernel|bias)", path)]
    if any(all(re.fullmatch(r"class \d+", c) for c in names) for names in (old, new)):  # including empty lists of names
        if any(path in ours and flat[path].shape == ours[path].shape for path in paths):
            logger.warning("%s does not name its classes: the classifier rows are kept in their order", name)
        return given
    if fresh is None and sorted(old_keys) != sorted(new_keys):
        i = next(i for i, pair in enumerate(zip(old_keys, new_keys, strict=True)) if pair[0] != pair[1])
        logger.warning(
            f"{name} has different class names (class {i} is {old[i]!r} there, {new[i]!r} in this config): the classifier rows "
            "are kept in their order; if the order differs, set dataset.class_names to the names in that file"
        )
        return given
    rows = {i: old_keys.index(c) for i, c in enumerate(new_keys) if c in old_keys}
    for path in paths:
        saved, value = np.asarray(flat.pop(path)), np.array(ours.get(path, np.zeros(())))
        if rows and saved.shape == (*value.shape[:-1], len(old)) and value.shape[-1:] == (len(new),):
            value[..., list(rows)] = saved[..., list(rows.values())]
            flat[path] = value
    groups = {
        "kept": [new[i] for i, j in rows.items() if i == j],
        "moved": [f"{new[i]} ({j} -> {i})" for i, j in rows.items() if i != j],
        "initialized at random": [c for i, c in enumerate(new) if i not in rows],
        "dropped": [c for j, c in enumerate(old) if j not in rows.values()],
    }
    summary = "; ".join(f"{group}: {', '.join(classes)}" for group, classes in groups.items() if classes)
    logger.warning("%s has different classes; its classifier rows are matched by class name: %s", name, summary)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def with_weights(state: TrainState, given: Variables, name: str) -> TrainState:
    """Returns a new state with the given weights. Arrays that are missing or have another shape keep their initial values.

    Logs the modules that keep their initial values. `given` are all variables of a run, or those that a third-party file has,
    such as a backbone alone; `name` is that of the run or file, for messages.

    Raises:
      UserError: the backbones differ.
    """
    flat = flax.traverse_util.flatten_dict(given, sep="/")
    fresh = flax.traverse_util.flatten_dict(state.weights, sep="/")
    kept = [k for k, v in fresh.items() if k not in flat or flat[k].shape != v.shape]
    if other := [k for k in kept if "/backbone/" in k]:
        raise UserError(f"init_from={name}: it has a different backbone: {other[0]} is missing or has another shape")
    if kept:
        modules = dict.fromkeys(k.split("/")[1] for k in kept)
        logger.warning("missing in %s or of another shape, so initialized at random: %s", name, ", ".join(modules))
    placed = {k: v if k in kept else jax.device_put(flat[k], v.sharding) for k, v in fresh.items()}
    merged = flax.traverse_util.unflatten_dict(placed, sep="/")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, merged)
    return state.replace(**merged, ema=ema)


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """Returns the fields whose values differ, as "field: saved -> current"."""
    new = dict(configs.leaves(current))
    return [f"{f}: {old!r} -> {new.get(f)!r}" for f, old in configs.leaves(saved) if old != new.get(f)]


def check_resumable(saved: ConfigDict, current: ConfigDict) -> None:
    """Raises UserError, which lists the fields that differ, if the network or classes have changed; logs other changes."""
    changed = differences(saved, current)
    fatal = [c for c in changed if c.startswith(MUST_MATCH) and not c.startswith(MAY_CHANGE)]
    if (saved.optimizer.ema_decay > 0) != (current.optimizer.ema_decay > 0):
        fatal += [c for c in changed if c.startswith("optimizer.ema_decay")]
    if fatal:
        raise UserError(
            f"this workdir holds a run with another config ({'; '.join(fatal)}): use the saved values "
            "or another --workdir (--config.init_from=WORKDIR starts from its weights)"
        )
    if changed:
        logger.warning("resuming with a changed config: %s", "; ".join(changed))
