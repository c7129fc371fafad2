"""Statistics of one image: everything that a report keeps of a prediction and its confidence but the pictures."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax import metrics
from pspnet_jax.analysis.regions import Regions, border_distances, find_regions, thicknesses, touching
from pspnet_jax.datasets import IGNORE

DISTANCES = (1, 2, 3, 5, 8, 12)  # pixels from a border of the truth
SIZES = (0, 64, 256, 1024, 4096, 16384, 65536, 262144)  # pixels of a region of the truth: lower ends of ranges
THICKNESSES = (0, 3, 6, 12, 24, 48, 96)  # pixels
LEVELS = 1500  # of confidence, whose sums are kept
ERRORS = 20  # pairs of classes of an image
PER_IMAGE = 5  # missed regions of a range of sizes, and mismatched regions
MIN_SHARE, MIN_BORDER = 1 / 1000, 3  # of a mismatched region: its share of the image, and the border in pixels that it shares
SUSPICIOUS = 2.0  # from this score on, see `cooccurrence.Cooccurrence.scores`


class Statistics(NamedTuple):
    """The statistics of one image, with K classes.

    Its pixels are counted by distance from a border of the truth, truth and prediction, in an array [len(DISTANCES) + 1, K, K].
    Its regions of the truth are counted by class and range, in arrays int64[K, ranges, 4]: their number, their pixels, their
    correct pixels, and how many have at least half of their pixels correct.
    """

    cells: np.ndarray  # int64[n], the indices of the counts of pixels that are not 0
    counts: np.ndarray  # int64[n], these counts
    levels: np.ndarray  # int64[2, LEVELS + 1], number of labeled pixels that are wrong and right, by confidence times LEVELS
    by_size: np.ndarray
    by_thickness: np.ndarray
    missed: list[dict[str, Any]]  # regions, see docs/report.md
    mismatched: list[dict[str, Any]]  # regions, see docs/report.md
    row: dict[str, Any]  # the image's entry in the document, without pictures


def analyze(
    name: str, truth: np.ndarray, prediction: np.ndarray, confidence: np.ndarray, num_classes: int, scores: np.ndarray | None
) -> Statistics:
    """Returns the statistics of an image.

    Args:
      name: of the image.
      truth, prediction: uint8[H, W] with values 0 to K-1 and, in the truth, 255.
      confidence: f32[H, W], the probability of the predicted class.
      num_classes: K.
      scores: float64[K, K], see `cooccurrence.Cooccurrence.scores`; without them, no region is mismatched.
    """
    labeled, correct = truth != IGNORE, truth == prediction
    distances, regions = border_distances(truth), find_regions(truth)
    bands = np.searchsorted(DISTANCES, distances[labeled])
    index = (bands * num_classes + truth[labeled]) * num_classes + prediction[labeled]
    cells = np.bincount(index, minlength=(len(DISTANCES) + 1) * num_classes**2)
    kept = np.flatnonzero(cells)
    level = np.rint(confidence[labeled] * LEVELS).astype(np.int64).clip(0, LEVELS)
    levels = np.bincount(level + (LEVELS + 1) * correct[labeled], minlength=2 * (LEVELS + 1)).reshape(2, -1)
    hits, thickness = regions.sum(correct).astype(np.int64), thicknesses(regions, distances)
    sizes = np.searchsorted(SIZES, regions.pixels, "right") - 1
    row = {
        "name": name,
        "height": truth.shape[0],
        "width": truth.shape[1],
        **_scores(cells.reshape(-1, num_classes, num_classes).sum(0)),
        "confidence": float(confidence.mean()),
        "smallest": int(regions.pixels[1:].min()) if len(regions) > 1 else None,
    }
    return Statistics(
        kept,
        cells[kept],
        levels,
        _by_range(regions, hits, sizes, len(SIZES), num_classes),
        _by_range(regions, hits, np.searchsorted(THICKNESSES, thickness, "right") - 1, len(THICKNESSES), num_classes),
        list(_missed(regions, hits, sizes, thickness, prediction)),
        [] if scores is None else list(_mismatched(truth, prediction, correct, scores)),
        row,
    )


def _scores(matrix: np.ndarray) -> dict[str, Any]:
    """Returns the scores of an image, its classes and its largest errors, given its confusion matrix."""
    found, errors = metrics.summarize(matrix), matrix.copy()
    np.fill_diagonal(errors, 0)
    largest = [divmod(int(cell), len(matrix)) for cell in np.argsort(-errors, axis=None, kind="stable")[:ERRORS]]
    labeled = int(matrix.sum())
    return {
        "mean_iou": found.mean_iou if labeled else None,
        "pixel_accuracy": found.pixel_accuracy if labeled else None,
        "labeled": labeled,
        "truth": np.flatnonzero(matrix.any(1)).tolist(),
        "predicted": np.flatnonzero(matrix.any(0)).tolist(),
        "errors": [[t, p, int(errors[t, p])] for t, p in largest if errors[t, p]],
    }


def _by_range(regions: Regions, hits: np.ndarray, ranges: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """Adds up the regions of each class and range, see `Statistics.by_size`."""
    index = (regions.classes.astype(np.int64) * count + ranges)[1:]
    columns = np.ones(len(regions)), regions.pixels, hits, 2 * hits >= regions.pixels
    sums = [np.bincount(index, column[1:], num_classes * count) for column in columns]
    return np.stack(sums, 1).astype(np.int64).reshape(num_classes, count, 4)


def _missed(
    regions: Regions, hits: np.ndarray, sizes: np.ndarray, thickness: np.ndarray, prediction: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yields the regions of the truth of which less than half is found: of each range of sizes, those that lose most pixels."""
    lost = regions.pixels - hits
    missed = np.flatnonzero(2 * hits[1:] < regions.pixels[1:]) + 1
    for size in np.unique(sizes[missed]):
        of_size = missed[sizes[missed] == size]
        for number in of_size[np.argsort(-lost[of_size], kind="stable")][:PER_IMAGE]:
            yield {
                "class": int(regions.classes[number]),
                "pixels": int(regions.pixels[number]),
                "thickness": float(thickness[number]),
                "box": regions.boxes[number].tolist(),
                "recall": hits[number] / int(regions.pixels[number]),
                "predicted": regions.most_frequent(number, prediction),
            }


def _mismatched(truth: np.ndarray, prediction: np.ndarray, correct: np.ndarray, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the regions of the prediction that are mostly wrong and touch a region with which they have a high score."""
    regions = find_regions(prediction)
    wrong = 2 * regions.sum(correct) < regions.sum(truth != IGNORE)
    wrong &= regions.pixels >= MIN_SHARE * truth.size
    if not wrong.any():
        return
    pairs, lengths = touching(regions.ids)
    of_pairs = scores[regions.classes[pairs[:, 0]], regions.classes[pairs[:, 1]]]
    kept = wrong[pairs[:, 0]] & (lengths >= MIN_BORDER) & (of_pairs >= SUSPICIOUS)
    pairs, lengths, of_pairs = pairs[kept], lengths[kept], of_pairs[kept]
    beside = {pairs[i, 0]: pairs[i, 1] for i in np.lexsort((lengths, of_pairs))}  # the last has the highest score
    for number in sorted(beside, key=lambda number: -regions.pixels[number])[:PER_IMAGE]:
        yield {
            "predicted": int(regions.classes[number]),
            "beside": int(regions.classes[beside[number]]),
            "truth": regions.most_frequent(number, truth),
            "pixels": int(regions.pixels[number]),
            "box": regions.boxes[number].tolist(),
        }
