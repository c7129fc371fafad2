"""Sums of the statistics of many images, and what is kept of each: the memory for pixels does not grow with their number."""

import collections
import heapq
import itertools
from typing import Any

import numpy as np

from pspnet_jax.analysis.image import DISTANCES, LEVELS, SIZES, THICKNESSES, Statistics

PER_PAIR, PER_SIZE = 20, 40  # mismatched regions of a pair of classes, missed regions of a range of sizes


class Totals:
    """Statistics of a split, with K classes: sums over its images, see `Statistics`, and what is kept of each."""

    def __init__(self, num_classes: int, images: int):
        self.num_classes = num_classes
        self.matrices = np.zeros((len(DISTANCES) + 1, num_classes, num_classes), np.int64)  # by distance from a border
        self.levels = np.zeros((2, LEVELS + 1), np.int64)
        self.by_size = np.zeros((num_classes, len(SIZES), 4), np.int64)
        self.by_thickness = np.zeros((num_classes, len(THICKNESSES), 4), np.int64)
        self.missed, self.mismatched = Ranked(PER_SIZE), Ranked(PER_PAIR)  # regions, each with its image
        self.rows: list[dict[str, Any]] = [{} for _ in range(images)]  # the entry of each image in the document
        self._cells: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64),) * 2 for _ in range(images)]

    def add(self, index: int, found: Statistics) -> None:
        """Adds an image, given its index."""
        self.matrices.ravel()[found.cells] += found.counts
        self.levels += found.levels
        self.by_size += found.by_size
        self.by_thickness += found.by_thickness
        for region in found.missed:
            size = np.searchsorted(SIZES, region["pixels"], "right")
            self.missed.add(size, region["pixels"] * (1 - region["recall"]), {"image": index, **region})
        for region in found.mismatched:
            self.mismatched.add((region["predicted"], region["beside"]), region["pixels"], {"image": index, **region})
        self.rows[index] = found.row
        cells, first = np.unique(found.cells % self.num_classes**2, return_inverse=True)
        self._cells[index] = cells.astype(np.int32), np.bincount(first, found.counts).astype(np.int32)

    @property
    def matrix(self) -> np.ndarray:
        """The confusion matrix of all images, int64[K, K]."""
        return self.matrices.sum(0)

    def sparse_matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns image, cell (truth * K + prediction) and value of each nonzero element of the confusion matrices."""
        images = np.repeat(np.arange(len(self._cells)), [len(cells) for cells, _ in self._cells])
        cells, counts = (np.concatenate([entry[i] for entry in self._cells]) for i in (0, 1))
        return images, cells, counts

    def per_image(self) -> np.ndarray:
        """Returns the number of pixels of each class that are correct, in the truth, and predicted: float64[N, 3, K]."""
        images, cells, counts = self.sparse_matrices()
        truth, predicted = np.divmod(cells, self.num_classes)
        found = []
        for classes, weights in ((truth, counts * (truth == predicted)), (truth, counts), (predicted, counts)):
            sums = np.bincount(images * self.num_classes + classes, weights, len(self.rows) * self.num_classes)
            found.append(sums.reshape(-1, self.num_classes))
        return np.stack(found, 1)


class Ranked:
    """The highest-ranked items of each group, at most `limit` each; of equal ranks, the first."""

    def __init__(self, limit: int):
        self._limit, self._order = limit, itertools.count()
        self._groups = collections.defaultdict[Any, list[tuple[float, int, dict[str, Any]]]](list)

    def add(self, group: Any, rank: float, item: dict[str, Any]) -> None:
        heap = self._groups[group]
        heapq.heappush(heap, (rank, -next(self._order), item))
        if len(heap) > self._limit:
            heapq.heappop(heap)

    def groups(self) -> dict[Any, list[dict[str, Any]]]:
        """Returns the items of each group, the highest rank first."""
        return {group: [item for *_, item in sorted(heap, reverse=True)] for group, heap in sorted(self._groups.items())}
