"""The job of --mode check: reads all data of a recipe, lists problems, and writes statistics and pictures."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich
from etils import epath

from pspnet_jax import datasets, figures, files, runs
from pspnet_jax.errors import UserError, grouped
from pspnet_jax.infer import draw

logger = logging.getLogger("pspnet_jax")
PANELS = 12  # images of each split in the contact sheet


def check(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode check: reads all images and labels of a recipe, lists problems, and writes pictures of examples.

    With --write_statistics, it also writes the mean and standard deviation of each channel over the training data. With
    --input, it writes a recipe for a folder instead, see `describe`.
    """
    from pspnet_jax import describe
    from pspnet_jax.data import overlap, palettes, sources, survey

    if arguments.input:
        return describe.describe(arguments, overrides)
    config = runs.from_recipe(arguments, overrides)
    info = datasets.describe(config.dataset)
    output = arguments.output or runs.workdir_of(arguments, config.name) / "check"
    surveys, problems, pictures = [], [], {}
    training = list(sources.training_parts(config.dataset))
    parts = training.copy()
    if config.eval.split != config.dataset.train_split:
        parts.append((config.dataset, config.eval.split))
    for number, (dataset, split) in enumerate(parts):
        is_measured = arguments.write_statistics and number < len(training)
        try:
            found = survey.survey(dataset, split, info.num_classes, config.model.channels, is_measured)
        except UserError as error:  # the other splits are still checked
            problems.append(str(error))
            continue
        surveys.append(found)
        problems += found.problems
        logger.info(found)
        rich.print(found.table(info))
        name = split if dataset is config.dataset else f"mixture{number}_{split}"
        if examples := survey.samples(found, PANELS):
            pictures[f"{name}_images.png"] = draw.contact_sheet(examples, info)
            pictures[f"{name}_classes.png"] = figures.class_frequencies(found.pixels, info)
    opened, seen = [found.source for found in surveys], [found.palette for found in surveys]
    if len(opened) == len(parts):
        overlap.warn_shared(opened[: len(training)], opened[-1] if len(parts) > len(training) else opened[0])
    for step in (lambda: _write_pictures(pictures, output, opened), lambda: palettes.require_agreement(seen)):
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join((*grouped(problems), f"{len(problems)} problem(s) found")))
    if arguments.write_statistics:
        _write_statistics(np.sum([found.moments for found in surveys], 0), output / "statistics.json")


def _write_statistics(moments: np.ndarray, path: epath.Path) -> None:
    """Writes and logs the mean and standard deviation of each channel, given `Survey.moments` of the training data."""
    count, total, squares = moments
    found = {"mean": total / count, "std": np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))}
    values = {name: [float(f"{value:.6g}") for value in channels] for name, channels in found.items()}
    with files.writing(path.parent, "the statistics are missing"):
        files.write_atomic(path, json.dumps({"pixels": int(count[0]), **values}) + "\n")
    lines = "\n".join(f"config.normalize.{name} = {tuple(channels)}" for name, channels in values.items())
    logger.info(f"written to {path}; for the recipe:\n{lines}")


def _write_pictures(pictures: Mapping[str, Any], output: epath.Path, opened: Sequence[Any]) -> None:
    """Writes the pictures of --mode check, but never into the dataset or over the user's files."""
    from pspnet_jax.data import overlap

    overlap.refuse_inside(output, opened)
    with files.writing(output, "the pictures are missing"):
        for name, picture in pictures.items():
            draw.save_replacing_own(picture, output / name)
    logger.info(f"pictures of the labels and of the class frequencies are in {output}")
