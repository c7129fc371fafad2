"""Finds the input images of --mode predict: one file, or all images in a folder and its subfolders."""

import logging
import os
from collections.abc import Iterator

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.image_files import SUFFIXES

logger = logging.getLogger(__name__)
MAX_LISTED = 5  # files named in a warning


def find_images(source: epath.PathLike, flat: bool = False, output: epath.PathLike = "") -> dict[str, epath.Path]:
    """Returns one image, or all images in a folder and its subfolders in sorted order, keyed by the names of their results.

    Logs a warning about the files it skips: those that are hidden or have no image extension.

    Args:
      source: the file or folder.
      flat: names are those of the files alone, such as "b" for a/b.png; otherwise, they are relative paths, such as "a/b".
      output: the folder for the results; "" skips the check that it lies outside the input.

    Raises:
      MissingFileError: the file or folder does not exist, or the folder has no images.
      UserError: a folder cannot be read; the output lies inside the input, where the next run would find its own results; or
        two images have the same result name, so that one result would overwrite the other.
    """
    source = files.absolute(source)
    if not files.is_there(source):
        raise MissingFileError(f"--input {source}: no such file or folder")
    if not source.is_dir():
        return {source.stem: source}
    if output and f"{_real(files.absolute(output))}/".startswith(f"{_real(source)}/"):
        raise UserError(
            f"--output {output}: lies inside --input {source}, so its results would become input images; choose another folder"
        )
    images: list[epath.Path] = []
    others: list[epath.Path] = []
    for path in sorted(_files_below(source, set())):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        (others if hidden or path.suffix.lower() not in SUFFIXES else images).append(path)
    if others:
        named = ", ".join(str(path.relative_to(source)) for path in others[:MAX_LISTED])
        named += ", ..." if len(others) > MAX_LISTED else ""
        logger.warning(f"--input {source}: skipped {len(others)} file(s), hidden or without an image extension: {named}")
    if not images:
        raise MissingFileError(f"--input {source}: no images in this folder; expected files ending in {', '.join(SUFFIXES)}")
    by_name: dict[str, epath.Path] = {}
    for path in images:
        name = path.stem if flat else os.fspath(path.relative_to(source).with_suffix(""))
        if name in by_name:
            both = " and ".join(str(p.relative_to(source)) for p in (by_name[name], path))
            raise UserError(f"--input {source}: {both} would both be written as {name}.png; rename one")
        by_name[name] = path
    return by_name


def _files_below(folder: epath.Path, ancestors: set[str]) -> Iterator[epath.Path]:
    if _real(folder) in ancestors:
        return  # a link to one of its own ancestors
    try:
        paths = [(path, path.is_dir()) for path in folder.iterdir()]  # epath's rglob does not follow links to folders
    except OSError as error:
        raise UserError(f"--input: the folder {folder} cannot be read ({error}); make it readable, or move it away") from error
    for path, is_folder in paths:
        yield from _files_below(path, ancestors | {_real(folder)}) if is_folder else [path]


def _real(path: epath.Path) -> str:
    """Resolves the links of a local path; returns a remote path unchanged."""
    return os.fspath(path) if "://" in os.fspath(path) else os.path.realpath(path)
