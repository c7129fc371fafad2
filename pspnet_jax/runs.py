"""The inputs of a job: a recipe with its data, or a run with one of its checkpoints."""

import argparse
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, files, losses, parallel, validation, weights
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.train import checkpoint, resume
from pspnet_jax.train.step import Variables

logger = logging.getLogger("pspnet_jax")


def from_recipe(arguments: argparse.Namespace, overrides: Sequence[str], num_devices: int = 0) -> ConfigDict:
    """Returns the recipe with the overrides of the command line, absolute paths, and its classes filled in."""
    if not arguments.config:
        raise UserError("--config is missing; name a recipe, such as --config configs/quickstart.py")
    config = configs.override(configs.load_recipe(arguments.config), overrides)
    validation.validate(config, num_devices)
    for warning in validation.unused_fields(config):
        logger.warning(warning)
    dataset = _absolute(config).dataset
    info = datasets.describe(dataset)
    dataset.class_names, dataset.colors = info.class_names, info.colors
    return config


def override_data(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config of a published network with the overrides, which may only say where the data is and how it is read."""
    changed = configs.override(config.copy_and_resolve_references(), overrides)
    allowed = ("dataset.root", "dataset.extra_root", "dataset.cache_dir", "eval.batch_size")
    if other := [change for change in resume.differences(config, changed) if not change.startswith(allowed)]:
        raise UserError(
            f"{'; '.join(other)}: --mode verify follows the publication, so that only {', '.join(allowed)} can be set; for "
            "anything else, use --mode import and --mode evaluate"
        )
    validation.validate(changed)
    return _absolute(changed)


def workdir_of(arguments: argparse.Namespace, name: str) -> epath.Path:
    return arguments.workdir or files.absolute(f"runs/{name}")


def _absolute(config: ConfigDict) -> ConfigDict:
    """Makes the paths in config.dataset absolute, in place."""
    dataset = config.dataset
    for field in ("root", "extra_root", "cache_dir"):
        dataset[field] = dataset[field] and str(files.user_path(dataset[field]))
    dataset.mixture = tuple((name, root and str(files.user_path(root)), *rest) for name, root, *rest in dataset.mixture)
    return config


def comparable(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that must be equal in all processes of a job, by name; paths may differ."""
    paths = ("init_from", "dataset.root", "dataset.extra_root", "dataset.cache_dir", "dataset.mixture")
    return {field: value for field, value in configs.leaves(config) if field not in paths}


def check_init_from(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes config.init_from absolute, and checks that it exists unless the run already has a checkpoint."""
    config.init_from = str(files.user_path(config.init_from))
    if checkpoint.exists(workdir):
        return
    path, _ = weights.split_entry(epath.Path(config.init_from))
    if not files.is_there(path):
        raise MissingFileError(f"init_from={path}: no such file or directory")
    if path.is_dir() and not weights.is_folder(path):
        with contextlib.closing(checkpoint.Checkpoints(path, read_only=True)) as checkpoints:
            checkpoints.find("latest")


def class_weights(config: ConfigDict, training: Sequence[Any]) -> tuple[float, ...]:
    """Returns config.loss.class_weights, or computes them from the pixels of the training data if class_weighting is set."""
    names, given = config.dataset.class_names, config.loss.class_weights
    if not config.loss.class_weighting:
        if len(given) not in (0, len(names)):
            raise UserError(f"loss.class_weights={given}: expected one weight for each of the {len(names)} classes")
        if zero := [name for name, weight in zip(names, given, strict=False) if weight == 0]:
            logger.warning(f"loss.class_weights: pixels of {', '.join(zero)} have weight 0 and are ignored")
        return given
    from pspnet_jax.data import survey

    counts = survey.class_pixels(config, training)
    found = losses.class_weights(config.loss.class_weighting, counts.pixels, counts.labeled)
    if given and not np.allclose(given, found, rtol=1e-3):  # a saved config has both, and they are equal
        raise UserError(f"loss.class_weights={given}: loss.class_weighting computes other values; set only one of the two")
    logger.info(f"class weights: {', '.join(f'{name} {weight:.3g}' for name, weight in zip(names, found, strict=True))}")
    return found


class Restored(NamedTuple):
    """A checkpoint and the config to use it with.

    Attributes:
      config: the saved config with the overrides of the command line.
      step: training step of the checkpoint.
      variables: the network's variables, replicated on all devices.
      workdir: directory of the run.
      saved: the config of the training run, without overrides.
    """

    config: ConfigDict
    step: int
    variables: Variables
    workdir: epath.Path
    saved: ConfigDict


def restore(arguments: argparse.Namespace, overrides: Sequence[str]) -> Restored:
    """Loads the checkpoint that the command line names, and applies the overrides to its config."""
    if not (arguments.workdir or arguments.config):
        raise UserError("--workdir is missing; name the directory of a training run")
    with parallel.fail_together("reading the recipe"):
        recipe = arguments.config and configs.load_recipe(arguments.config)
        workdir = workdir_of(arguments, recipe and recipe.name)
        steps = sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())
    parallel.require_same({"checkpoints in the workdir": steps})
    saved, step, variables = checkpoint.load(workdir, arguments.checkpoint or "latest", parallel.make_mesh())
    with parallel.fail_together("checking the config"):
        if recipe and (differing := resume.differences(recipe, saved)):
            logger.warning(f"the config saved with the checkpoint is used, not {arguments.config}: {'; '.join(differing)}")
        config = _absolute(configs.override(saved.copy_and_resolve_references(), overrides))
        validation.validate(config)
        _check_class_names(saved.dataset.class_names, config.dataset.class_names)
        changed = resume.differences(saved, config)
        if network := [c for c in changed if c.startswith(("model.", "normalize."))]:
            raise UserError(f"{'; '.join(network)}: the network cannot change after training; leave these fields out")
        if unused := [c for c in changed if not c.startswith(("dataset.", "eval."))]:
            logger.warning(f"{'; '.join(unused)}: only training uses these fields; they have no effect in this mode")
    if jax.process_count() > 1:
        parallel.require_same({"step": step, "weights": parallel.checksum(variables), **comparable(config)})
    return Restored(config, step, variables, workdir, saved)


def _check_class_names(saved: Sequence[str], given: Sequence[str]) -> None:
    """Refuses a wrong number or order of class names; renamed classes are allowed with a warning."""
    if len(given) != len(saved):
        raise UserError(f"dataset.class_names={given}: expected {len(saved)} names, one for each class of the network")
    renamed = [(label, old, new) for label, old, new in datasets.differing_classes(saved, given) if old != f"class {label}"]
    if not renamed:
        return
    label, old, new = renamed[0]
    if sorted(map(str.lower, saved)) == sorted(map(str.lower, given)):
        raise UserError(f"dataset.class_names: class {label} of the network is {old!r}, not {new!r}; keep its order")
    logger.warning(f"dataset.class_names: class {label} of the network was trained as {old!r}; it is now called {new!r}")
