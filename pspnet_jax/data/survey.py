"""Looks at every example of a split: what is wrong, which sizes there are, and how frequent the classes are."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from pspnet_jax.data.sources import Source
from pspnet_jax.progress import progress

THREADS = 8


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found in a split.

    Attributes:
      images: number of readable examples.
      sizes: how many of them have each (height, width).
      pixels: int64[K], of each class.
      ignored: number of pixels that do not count.
      present: int64[K], number of images that have the class.
      problems: one sentence for each example that cannot be used.
    """

    images: int
    sizes: Mapping[tuple[int, int], int]
    pixels: np.ndarray
    ignored: int
    present: np.ndarray
    problems: list[str]


def survey(source: Source, num_classes: int, title: str) -> Survey:
    """Loads every example of a source once, as training does, and counts its labels."""

    def look(index: int) -> tuple[tuple[int, int], np.ndarray] | str:
        try:
            _, label = source.load(tf.constant(index, tf.int64))
        except tf.errors.OpError as error:
            return _reason(source, index, error)
        height, width = label.shape
        return (height, width), np.bincount(label.numpy().ravel(), minlength=256)

    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    problems, total, present = [], np.zeros(256, np.int64), np.zeros(256, np.int64)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, progress(title, len(source)) as advance:
        for found in pool.map(look, range(len(source))):
            if isinstance(found, str):
                problems.append(found)
            else:
                sizes[found[0]] += 1
                total += found[1]
                present += found[1] > 0
            advance(1)
    return Survey(sizes.total(), sizes, total[:num_classes], int(total[255]), present[:num_classes], problems)


def _reason(source: Source, index: int, error: Exception) -> str:
    try:
        source.check(index)
    except ValueError as known:
        return str(known)
    return f"{source.names[index]}: cannot be loaded ({str(error).splitlines()[0]})"
