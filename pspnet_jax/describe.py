"""--mode check --input DIR: from a folder that nobody has described to a recipe that trains on it."""

import argparse
import importlib.util
import logging
import os
import re
from collections.abc import Sequence

import rich
from rich.markup import escape
from rich.table import Column, Table

from pspnet_jax import config as configs
from pspnet_jax import datasets, files
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.infer import draw

logger = logging.getLogger("pspnet_jax")
FOUND = ("dataset", "eval.split", "model.channels", "normalize", "augment")  # fields that the table shows
PANELS = 12  # images in the picture
ROWS = 20  # classes in the table


def _hides_a_module(name: str) -> bool:
    """Returns whether `python -m` would import a NAME.py in the current directory instead of a module of this name."""
    found = importlib.util.find_spec(name)
    own = os.path.join(os.getcwd(), f"{name}.py")  # the recipe of an earlier check
    return found is not None and found.origin not in (None, own)


def describe(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Says what a folder holds, and writes a recipe and a picture of its labels.

    Raises:
      UserError: there is no such folder, it has no pairs, or a file of the recipe's name exists.
    """
    from pspnet_jax.data import label_values, recipe_text, sources, survey, survey_folder

    if arguments.config or overrides:
        raise UserError("--mode check takes a folder (--input) or a recipe (--config, with its fields), not both")
    root = files.user_path(arguments.input)
    if root.is_file():
        raise UserError(f"--input {root}: is a file; --mode check takes a folder of images and labels, so unpack an archive")
    if not root.is_dir():
        raise MissingFileError(f"--input {root}: no such directory; --mode check takes a folder of images and labels")
    name = re.sub(r"\W+", "_", root.name).strip("_") or "folder"
    recipe = arguments.output or files.absolute(f"{name}_recipe.py" if _hides_a_module(name) else f"{name}.py")
    folder = survey_folder.list_folder(str(root))
    found = survey_folder.find(folder)
    if os.fspath(recipe.parent) in {os.path.dirname(file) for pair in found.pairs for file in pair}:
        raise UserError(f"{recipe.parent}: holds the images or labels; choose --output DIR/{name}.py, with another directory")
    fields, entries = recipe_text.lines(folder, found, name), label_values.entries(found.values, folder.texts)
    text = recipe_text.render(folder, found, fields, entries, str(recipe))
    if recipe.suffix != ".py" or (recipe.exists() and recipe.read_text() != text):
        raise UserError(f"--output {recipe}: exists, or does not end in .py; choose another name, such as {name}_2.py")
    table = Table(*(Column(title, overflow="fold") for title in ("", "found", "remarks")))
    for field, value, remark in (line for line in fields if line[0].startswith(FOUND)):
        table.add_row(field, escape(str(value)), escape(remark))
    for key, class_name, remark in entries[:ROWS]:
        table.add_row(f"label {key}", escape(class_name or "ignored"), escape(remark))
    if len(entries) > ROWS:
        table.add_row("labels", f"{len(entries) - ROWS} more", "see the recipe")
    rich.print(table)
    with files.writing(recipe, "choose another --output"):
        files.write_atomic(recipe, text)
    logger.info(f"the recipe is {recipe}; check the lines with GUESS, then run python -m pspnet_jax.main --config {recipe}")
    config = configs.load_recipe(str(recipe))
    try:
        skip = config.dataset.on_error == "skip"
        source = sources.open_source(config.dataset, config.dataset.train_split, skip, config.model.channels)
        pairs = set(found.pairs)
        labeled = [i for i in range(len(source)) if tuple(source.files(i)) in pairs]
        examples = survey.pictured(source, label_values.sample(labeled, PANELS))
    except UserError as error:
        raise UserError(f"{error}; {recipe} is written, but cannot train as the files are") from error
    picture = recipe.with_suffix(".png")
    draw.save_replacing_own(draw.contact_sheet(examples, datasets.describe(config.dataset)), picture)
    logger.info(f"{picture} shows the labels over the images")
