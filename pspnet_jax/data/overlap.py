"""Images that are scored although they were trained on, and files that would be written among the images."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf
from etils import epath

from pspnet_jax.data import stamps
from pspnet_jax.data.reader import Source
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
PART = 2**16  # bytes at the start and the end of an image that tell it from others of its size
Key = tuple[object, ...]


def warn_shared(training: Sequence[Source], evaluation: Source) -> int:
    """Says in a warning how many images of the evaluated split are training images as well, and which is the first.

    Files are the same image if they are one file, or if their bytes are alike: their number, the first and the last 64 KiB.
    Examples without files of their own are the same if their name is, and what they come from.

    Returns:
      the number.
    """
    theirs = {key: name for source in training for name, key in _keys(source, [evaluation])}
    shared = [(name, theirs[key]) for name, key in _keys(evaluation, training) if key in theirs]
    if shared:
        name, other = shared[0]
        same = "" if name == other else f" (there {other})"
        logger.warning(
            f"{len(shared):,} of the {len(evaluation):,} images that are scored are in the training data as well, the first of "
            f"them {name}{same}: the score says nothing about new images"
        )
    return len(shared)


def refuse_inside(path: epath.Path, training: Sequence[Source]) -> None:
    """Refuses to write among the files that are read.

    Raises:
      UserError: names the directory.
    """
    for directory in {os.path.dirname(file) for source in training for i in range(len(source)) for file in source.files(i)}:
        if f"{path}/".startswith(f"{directory}/"):
            raise UserError(f"{path}: lies among the images and labels in {directory}; choose a directory elsewhere")


def _keys(source: Source, others: Sequence[Source]) -> Iterator[tuple[str, Key]]:
    """Yields the name of each example, and what it has in common with the same one elsewhere; not all that cannot match."""
    if source.image_sizes is None:
        yield from ((name, (source.files(index) or source, name)) for index, name in enumerate(source.names))
        return
    there = [other for other in others if other.image_sizes]
    sizes = {size for other in there for size in other.image_sizes or ()}
    files = {other.files(index)[0] for other in there for index in range(len(other))}
    candidates = [(index, size) for index, size in enumerate(source.image_sizes) if size in sizes]

    def key(candidate: tuple[int, int]) -> str:
        file = source.files(candidate[0])[0]
        return file if file in files else _digest(file, candidate[1])

    with ThreadPoolExecutor(stamps.THREADS) as pool:
        for (index, _), found in zip(candidates, pool.map(key, candidates), strict=True):
            yield source.names[index], (found,)


def _digest(file: str, size: int) -> str:
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            start = stream.read(PART)
            stream.seek(max(0, size - PART))
            return hashlib.sha256(start + stream.read()).hexdigest() + str(size)
    except tf.errors.OpError:  # whoever reads it says so
        return file
