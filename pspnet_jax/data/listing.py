"""Lists the files of a dataset, in a local directory or a bucket, and reads its text files."""

import contextlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence

import tensorflow as tf

from pspnet_jax.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)
MAX_LISTED = 3  # files in a warning
ANY_NAME = re.compile(r"(?P<name>.+)\.[^./]+")


def read_lines(file: str) -> list[str]:
    """Returns the lines of a UTF-8 text that are not blank."""
    if not tf.io.gfile.exists(file):
        raise MissingFileError(f"{file}: no such file; it should list the image names of a split")
    try:
        with tf.io.gfile.GFile(file) as lines:
            text = lines.read().removeprefix("\ufeff")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return [line for line in text.splitlines() if line.strip()]


def with_names(pattern: str) -> str:
    """Returns a regular expression of a pattern's paths, whose {name}, {tail} and * `re.escape` has escaped."""
    pattern = re.sub(r"\\\.\\\*$", r"\\.[^./]+", pattern).replace(r"\*", "[^/]*")
    return pattern.replace(r"\{name\}", "(?P<name>.+)").replace(r"\{tail\}", "(?P<tail>.*)")


def name_of(found: re.Match[str]) -> str:
    """Returns the name of a file that `with_names` has matched, which a word may divide: um_road_1 has the name um_1."""
    return found["name"] + found.groupdict().get("tail", "")


def find(directory: str, extensions: Sequence[str], pattern: re.Pattern[str] = ANY_NAME) -> tuple[dict[str, str], list[str]]:
    """Lists the files below a directory whose paths in it match a pattern.

    Args:
      directory: local or in a bucket.
      extensions: in lower case; their case in the files does not matter.
      pattern: see `with_names`.

    Returns:
      {name: full path} of the files, and the full paths of the images that do not match or have other extensions.

    Raises:
      UserError: there is no such directory, or two files have the same name.
    """
    if not tf.io.gfile.isdir(directory):
        parent = os.path.dirname(directory)
        siblings = ", ".join(sorted(tf.io.gfile.listdir(parent))[:8]) if tf.io.gfile.isdir(parent) else ""
        raise MissingFileError(f"{directory}: no such directory" + (f"; {parent} contains {siblings}" if siblings else ""))
    found: dict[str, str] = {}
    others = []
    for path in walk(directory):
        below = unicodedata.normalize("NFC", path[len(directory) + 1 :])  # macOS decomposes accented characters
        extension, matched = os.path.splitext(below)[1].lower(), pattern.fullmatch(below)
        if extension not in extensions or not matched:
            others.append(path)
            continue
        if (other := found.setdefault(name_of(matched), path)) != path:
            raise UserError(f"{path} and {other}: two files of the same name, so their label is ambiguous; remove one")
    return found, others


def warn_of_others(directory: str, others: Sequence[str], why: str) -> None:
    """Logs a warning about files in a directory that are not used."""
    if others:
        logger.warning(
            f"{directory}: {len(others):,} files are ignored because they {why}: "
            f"{', '.join(others[:MAX_LISTED])}{', ...' if len(others) > MAX_LISTED else ''}"
        )


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Lists folders without a word about files that are not used."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def walk(directory: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the files below a directory, except hidden ones; `above` are the real paths of its parent directories.

    In a bucket, a name with a "." and without a trailing "/" is assumed to be a file. Asking the server about each would take
    minutes.
    """
    remote = "://" in directory
    if not remote:
        if (real := os.path.realpath(directory)) in above:
            raise UserError(f"{directory}: links to one of its parent directories; remove the link")
        above = (*above, real)
    try:
        entries = tf.io.gfile.listdir(directory)
    except UnicodeDecodeError as error:
        name = error.object.decode(errors="backslashreplace")
        raise UserError(f"{directory}: contains {name}, whose name is not UTF-8; rename it") from error
    for entry in entries:
        path = f"{directory}/{entry.rstrip('/')}"
        if entry.startswith("."):
            continue
        if entry.endswith("/") or (("." not in entry or not remote) and tf.io.gfile.isdir(path)):
            yield from walk(path, above)
        else:
            yield path
