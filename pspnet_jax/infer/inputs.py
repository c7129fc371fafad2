"""Finds the images that --mode predict is given: a file, or a folder with all its subfolders."""

import logging
import os
from collections.abc import Iterator

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)
SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")
LISTED = 5  # names in a message about many


def find_images(source: epath.PathLike, flat: bool = False, output: epath.PathLike = "") -> dict[str, epath.Path]:
    """Returns an image, or those in a folder and its subfolders, by the name of their results, in order.

    Files that are left out, by their ending or because they are hidden, are named in the log.

    Args:
      source: the file or folder.
      flat: names are file names without ending; otherwise they are paths below the folder, "a/b" of a/b.png.
      output: where the results are to go; empty: not yet known.

    Raises:
      MissingFileError: there is no such file or folder, or no image in it.
      UserError: a folder cannot be read; the results would lie in the folder, and be taken for images by the next run; or two
        images have the same name but for their endings, so that their results would overwrite each other.
    """
    source = files.absolute(source)
    if not files.is_there(source):
        raise MissingFileError(f"--input {source}: no such file or folder")
    if not source.is_dir():
        return {source.stem: source}
    if output and f"{_real(files.absolute(output))}/".startswith(f"{_real(source)}/"):
        raise UserError(f"--output {output}: lies in --input {source}, whose images it would join; choose a folder elsewhere")
    images: list[epath.Path] = []
    others: list[epath.Path] = []
    for path in sorted(_files_below(source, set())):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        (others if hidden or path.suffix.lower() not in SUFFIXES else images).append(path)
    if others:
        named = ", ".join(str(path.relative_to(source)) for path in others[:LISTED]) + ", ..." * (len(others) > LISTED)
        logger.warning(f"--input {source}: {len(others)} file(s) left out, no images by their names or hidden: {named}")
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


def _files_below(folder: epath.Path, above: set[str]) -> Iterator[epath.Path]:
    if _real(folder) in above:
        return  # a link to a folder that it lies in
    try:
        paths = [(path, path.is_dir()) for path in folder.iterdir()]  # epath's rglob leaves links to folders out
    except OSError as error:
        raise UserError(f"--input: the folder {folder} cannot be read ({error}); make it readable, or move it away") from error
    for path, is_folder in paths:
        yield from _files_below(path, above | {_real(folder)}) if is_folder else [path]


def _real(path: epath.Path) -> str:
    """A local path without links; a remote one as it is."""
    return os.fspath(path) if "://" in os.fspath(path) else os.path.realpath(path)
