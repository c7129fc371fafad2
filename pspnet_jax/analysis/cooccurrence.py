"""Which classes occur together, and side by side, in the training images: what makes a prediction suspicious."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.analysis.regions import fill_void, touching
from pspnet_jax.data import checks, sources, stamps
from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError
from pspnet_jax.large_files import strips
from pspnet_jax.progress import progress

logger = logging.getLogger("pspnet_jax")
FILE = "cooccurrence.json"  # in the run's directory
VERSION = 1  # of counting; counts of another version are not used


@dataclasses.dataclass(frozen=True)
class Cooccurrence:
    """Counts of training images, with K classes."""

    images: int  # their number
    together: np.ndarray  # int64[K, K], in how many both classes occur; on the diagonal, in how many a class occurs
    # int64[K, K], in how many two classes have adjacent pixels; void strips of up to ten pixels count as a border
    touching: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """In how many images each class occurs, int64[K]."""
        return np.diag(self.together)

    @property
    def expected(self) -> np.ndarray:
        """In how many images two classes would occur together if they were independent, float64[K, K]."""
        return np.outer(self.present, self.present) / max(1, self.images)

    @property
    def scores(self) -> np.ndarray:
        """How suspicious it is that two classes touch: log2((expected + 1) / (touching + 1)), float64[K, K].

        At 2, they touch about a quarter as often as they would occur together by chance; classes that are rare in training have
        scores near 0, as there is no evidence.
        """
        return np.log2((self.expected + 1) / (self.touching + 1))


def of_training(configs: Sequence[ConfigDict], workdir: epath.Path) -> Cooccurrence:
    """Counts the classes in the training labels of a run, or reads the counts that an earlier report left in its directory.

    Those are used if the data is the same, or not available any more. The data is that of the first config whose data can be
    opened.

    Raises:
      UserError: the training data cannot be read, and there are no earlier counts.
    """
    known, classes = files.read_json(workdir / FILE), list(configs[0].dataset.class_names)
    known = known if known.get("version") == VERSION and known.get("classes") == classes else {}
    try:
        opened = _open(configs)
        data = stamps.digest([(s.fingerprint, list(s.names), s.reading, _stats(s)) for s in opened])
        if known.get("data") == data:
            return _from_json(known)
        found = _count(opened)
    except UserError as error:
        if known:
            logger.warning(f"the training data cannot be read ({error}); its classes were counted by an earlier report")
            return _from_json(known)
        raise
    document = {"version": VERSION, "classes": classes, "data": data, "images": found.images}
    document |= {"together": found.together.tolist(), "touching": found.touching.tolist()}
    try:
        with files.writing(workdir / FILE, "the next report counts again"):
            files.write_atomic(workdir / FILE, json.dumps(document) + "\n")
    except UserError as error:
        logger.warning(str(error))
    return found


def _open(configs: Sequence[ConfigDict]) -> list[Any]:
    """Returns the opened parts of the training data of the first config with which that is possible."""
    for config in configs[:-1]:
        with contextlib.suppress(UserError):
            return _open([config])
    if len(configs) > 1:
        logger.warning(f"the run's training data cannot be read; classes are counted in {configs[-1].dataset.root} instead")
    parts = sources.training_parts(configs[-1].copy_and_resolve_references().dataset)
    return [sources.open_source(dataset, split, channels=configs[-1].model.channels) for dataset, split in parts]


def _stats(source: Any) -> list[tuple[int, ...]]:
    """Returns what changes with any of a source's files: an uncompressed label keeps its size when its classes change."""
    return stamps.stats(sorted({file for index in range(len(source)) for file in source.files(index)}))


def _from_json(document: dict[str, Any]) -> Cooccurrence:
    return Cooccurrence(document["images"], *(np.array(document[name], np.int64) for name in ("together", "touching")))


def _count(opened: Sequence[Any]) -> Cooccurrence:
    classes, images = opened[0].num_classes, sum(map(len, opened))
    together, beside = np.zeros((2, classes, classes), np.int64)
    with (
        progress("classes in the training images", images) as advance,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for source in opened:
            for present, pairs in pool.map(lambda index, source=source: _classes(source.read_label(index)), range(len(source))):
                together[np.ix_(present, present)] += 1
                beside[pairs[:, 0], pairs[:, 1]] += 1  # once, also for a pair that is repeated
                advance(1)
    return Cooccurrence(images, together, beside)


def _classes(label: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the classes in a label map, uint8[H, W] or a LargeTiff, and the pairs int64[n, 2] of those that touch."""
    pairs = np.concatenate([touching(fill_void(strip))[0] for strip in strips(label)])
    return np.flatnonzero(checks.histogram(label)[:IGNORE]), pairs[(pairs != IGNORE).all(1)]
