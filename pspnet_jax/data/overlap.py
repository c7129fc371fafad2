"""Detects training images in the evaluation split, and output paths among the data files."""

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
PART = 2**16  # bytes at the start and at the end of a file that identify it among files of its size
Key = tuple[object, ...]


def warn_shared(training: Sequence[Source], evaluation: Source) -> int:
    """Warns if images of the evaluation split are training images too.

    Two files are the same image if their paths are equal, or if their sizes and their first and last 64 KiB are equal.
    Examples without image files are the same if their names and sources are equal.

    Returns:
      The number of shared images.
    """
    training_names = {key: name for source in training for name, key in _keys(source, [evaluation])}
    shared = [(name, training_names[key]) for name, key in _keys(evaluation, training) if key in training_names]
    if shared:
        name, other = shared[0]
        alias = "" if name == other else f" (called {other} in training)"
        logger.warning(
            f"{len(shared):,} of {len(evaluation):,} evaluation images are also training images, the first is {name}{alias}: "
            "the score does not measure generalization"
        )
    return len(shared)


def refuse_inside(path: epath.Path, sources: Sequence[Source]) -> None:
    """Raises a UserError if an output path is inside a directory of the data."""
    for directory in {os.path.dirname(file) for source in sources for i in range(len(source)) for file in source.files(i)}:
        if f"{path}/".startswith(f"{directory}/"):
            raise UserError(f"{path}: is inside {directory}, which holds images or labels; choose another directory")


def _keys(source: Source, others: Sequence[Source]) -> Iterator[tuple[str, Key]]:
    """Yields each example's name and a key that equal examples share; examples that cannot match may be omitted."""
    if source.image_sizes is None:
        yield from ((name, (source.files(index) or source, name)) for index, name in enumerate(source.names))
        return
    others = [other for other in others if other.image_sizes]
    sizes = {size for other in others for size in other.image_sizes or ()}
    files = {other.files(index)[0] for other in others for index in range(len(other))}
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
    except tf.errors.OpError:  # reported when the image is read
        return file
