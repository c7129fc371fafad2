"""The inputs of a job: a recipe with its data, or a run with one of its checkpoints."""

import argparse
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, files, label_maps, losses, models, parallel, report, validation, weights
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.train import checkpoint, resume
from pspnet_jax.train.step import Variables

logger = logging.getLogger("pspnet_jax")
Change = Callable[[ConfigDict], ConfigDict]  # sets fields of a config, given a copy, and returns it


def from_recipe(arguments: argparse.Namespace, overrides: Sequence[str], num_devices: int = 0) -> ConfigDict:
    """Returns the recipe with the overrides of the command line, see `prepare`."""
    if not arguments.config:
        raise UserError("--config is missing; name a recipe, such as --config quickstart")
    config = configs.override(configs.load_recipe(arguments.config), overrides)
    if arguments.write_statistics:  # they need not be known yet
        config.normalize.mean, config.normalize.std = ((1.0,) * config.model.channels for _ in range(2))
    return prepare(config, num_devices)


def prepare(config: ConfigDict, num_devices: int = 0) -> ConfigDict:
    """Validates a recipe's config, makes its paths absolute, and fills in its label map and classes, in place; returns it."""
    validation.validate(config, num_devices)
    for warning in validation.unused_fields(config):
        logger.warning(warning)
    dataset = _absolute(config).dataset
    if dataset.label_map.strip() and not dataset.label_map.lstrip().startswith("{"):
        dataset.label_map = str(label_maps.read(dataset))  # the CSV may move, and a mixture has other roots
    info = datasets.describe(dataset)
    dataset.class_names, dataset.colors = info.class_names, info.colors
    report.require_metric(config.eval.best_metric, info.class_names)
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


def build_model(config: ConfigDict, num_classes: int) -> models.PSPNet:
    """Builds the network to train on JAX's devices.

    On CPUs, `model.remat` is left out: XLA merges what would be computed again with what was computed before, and stores it.
    """
    model = config.model.copy_and_resolve_references()
    if jax.default_backend() == "cpu":
        model.remat = "none"
    return models.build(model, num_classes, config.optimizer.freeze)


def check_init_from(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes config.init_from absolute, and checks that it exists, or downloads it, unless the run already has a checkpoint."""
    if not weights.is_name(config.init_from):
        config.init_from = str(files.user_path(config.init_from))
    if checkpoint.saved_steps(workdir):
        return
    path, _ = weights.split_entry(epath.Path(weights.fetch(config.init_from)))
    if not files.is_there(path):
        raise MissingFileError(f"init_from={path}: no such file or directory; a repository on the hub is named hf://USER/REPO")
    if path.is_dir() and not weights.is_folder(path):
        with contextlib.closing(checkpoint.Checkpoints(path, read_only=True)) as checkpoints:
            checkpoints.find("latest")


# Names of ImageNet weights by stem and depth: timm's ResNet-S and -C, and torchvision's ResNets.
PRETRAINED = {
    "deep": ("hf://timm/resnet{}s.gluon_in1k", (50, 101, 152)),
    "deep32": ("hf://timm/resnet{}c.gluon_in1k", (50, 101, 152)),
    "conv7": ("hf://timm/resnet{}.tv_in1k", (18, 34, 50, 101, 152)),
}


def warn_of_random_weights(config: ConfigDict) -> None:
    """Says which flag gets weights like those that the published scores of a benchmark started from."""
    benchmark, model = config.dataset.name, config.model
    if benchmark == "tfds":
        benchmark = config.dataset.tfds_name.removeprefix("pspnet_")
    if benchmark not in datasets.COUNTS:
        return
    name, depths = PRETRAINED[model.stem]
    how = f"add --config.init_from={name.format(model.depth)}"
    if model.depth not in depths or model.width != 64:
        how = f"for such a backbone, see configs/imagenet.py:{model.depth} and --config.init_from"
    logger.warning(
        f"starting from random weights, but the published scores on {benchmark} are of networks that started from ImageNet "
        f"weights: {how}"
    )


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
    """A checkpoint and the config to use it with."""

    config: ConfigDict  # the saved config with the overrides of the command line
    step: int  # training step of the checkpoint
    variables: Variables  # of the network, replicated on all devices
    workdir: epath.Path  # directory of the run
    saved: ConfigDict  # the config of the training run, without overrides


def restore(arguments: argparse.Namespace, overrides: Sequence[str]) -> Restored:
    """Loads the checkpoint that the command line names, and applies the overrides to its config."""
    if not (arguments.workdir or arguments.config):
        raise UserError("--workdir is missing; name the directory of a training run")
    with parallel.fail_together("reading the recipe"):
        recipe = arguments.config and configs.load_recipe(arguments.config)
        workdir = workdir_of(arguments, recipe and recipe.name)

    def change(saved: ConfigDict) -> ConfigDict:
        if recipe and (differing := resume.differences(recipe, saved)):
            logger.warning(f"the config saved with the checkpoint is used, not {arguments.config}: {'; '.join(differing)}")
        return _absolute(configs.override(saved, overrides))

    return restore_run(workdir, arguments.checkpoint or "latest", change)


def restore_run(workdir: epath.Path, which: str, change: Change) -> Restored:
    """Loads a checkpoint of a run: "latest", "best" or a step number."""
    with parallel.fail_together("listing the checkpoints"):
        steps = checkpoint.saved_steps(workdir)
    parallel.require_same({"checkpoints in the workdir": steps})
    saved, step, variables = checkpoint.load(workdir, which, parallel.make_mesh())
    with parallel.fail_together("checking the config"):
        config = change(saved.copy_and_resolve_references())
        validation.validate(config)
        _check_class_names(saved.dataset.class_names, config.dataset.class_names)
        changed = resume.differences(saved, config)
        if network := [c for c in changed if c.startswith(("model.", "normalize.", "dataset.image_dtype"))]:
            raise UserError(f"{'; '.join(network)}: the network cannot change after training; leave these fields out")
        if unused := [
            c
            for c in changed
            if not c.startswith(("dataset.", "eval.", "parallel.spatial")) or c.startswith("eval.best_metric")
        ]:
            logger.warning(f"{'; '.join(unused)}: only training uses these fields; they have no effect in this mode")
    if jax.process_count() > 1:
        parallel.require_same({"step": step, "weights": parallel.checksum(variables), **comparable(config)})
    return Restored(config, step, variables, workdir, saved)


def read_weights(path: epath.PathLike, change: Change, recipe: ConfigDict | None = None) -> tuple[ConfigDict, Variables]:
    """Returns the config of a third-party network, changed, and its variables; logs what is assumed about it.

    The path is a file or a name, see `weights.inspect`. The classes, data and evaluation settings of the recipe replace those
    that follow from the file.
    """
    config, source = recipe.copy_and_resolve_references() if recipe else configs.base_config(), weights.inspect(path)
    weights.configure(config, source)
    config.name = weights.stem(path)
    if recipe:  # it overrides what the file says about its dataset
        config.name, config.dataset, config.eval = recipe.name, recipe.dataset, recipe.eval
    config = change(config)
    validation.validate(config)
    weights.check_normalize(config.normalize, source)
    info = datasets.describe(config.dataset)
    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    if config.dataset.name in datasets.tables():
        datasets.check_classes(config.dataset)
    variables = load_weights(source, config, info)
    logger.info("\n".join(filter(None, (str(source), weights.assumptions(config, source)))))
    return config, variables


def load_weights(source: weights.Source, config: ConfigDict, info: datasets.DatasetInfo) -> Variables:
    """Loads a segmentation network; if its file names the classes, they are put into the order of `info`."""
    variables = weights.load(source.path, models.build(config.model, info.num_classes))
    if not source.class_names:
        return variables
    return resume.match_classes(variables, None, source.class_names, info.class_names, source.path)


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
