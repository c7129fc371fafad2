"""--mode check --input DIR: from a folder that nobody has described to a recipe that trains on it."""

import argparse
import importlib.util
import logging
import pathlib
import re

import rich
from etils import epath
from rich.markup import escape
from rich.table import Table

from pspnet_jax import config as configs
from pspnet_jax import datasets, files
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.infer import draw

logger = logging.getLogger("pspnet_jax")
PANELS = 12  # images in the picture
ROWS = 12  # classes in the table


def describe(arguments: argparse.Namespace) -> None:
    """Says what the folder holds, and writes a recipe and a picture of its labels.

    Raises:
      UserError: there is no such folder, it has no pairs, or the recipe would replace another file.
    """
    from pspnet_jax.data import label_values, recipe_text, sources, survey, survey_folder

    root = epath.Path(arguments.input)
    if not root.is_dir():
        raise MissingFileError(f"--input {root}: no such directory; --mode check takes a folder of images and labels there")
    name = re.sub(r"\W+", "_", root.name).strip("_") or "folder"
    recipe = arguments.output or files.absolute(f"{name}.py" if importlib.util.find_spec(name) is None else f"{name}_recipe.py")
    if recipe.suffix != ".py":
        raise UserError(f"--output {recipe}: expected the name of a recipe, such as {name}.py")
    folder = survey_folder.list_folder(str(root))
    found = survey_folder.find(folder)
    fields, entries = recipe_text.lines(folder, found, name), label_values.entries(found.shares, folder.texts)
    table = Table("", "found", "remarks", show_lines=True)
    ...
