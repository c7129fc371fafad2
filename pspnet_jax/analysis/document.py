"""The report as one JSON document of plain values, described in docs/report.md."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax import metrics
from pspnet_jax.analysis import bootstrap
from pspnet_jax.analysis.cooccurrence import Cooccurrence
from pspnet_jax.analysis.image import DISTANCES, LEVELS, SIZES, THICKNESSES
from pspnet_jax.analysis.totals import Totals
from pspnet_jax.report import OF_ALL_CLASSES, Report, or_none

SCHEMA = 1
PAIRS, IMAGES, REGIONS = 50, 12, 200  # confusions, their images, and mismatched regions that are listed
CHANGED = 100  # images that got better, and worse
BINS = 15  # of confidence, as in Guo et al., On Calibration of Modern Neural Networks (ICML 2017)
OF_A_CLASS = ("iou", "precision", "recall", "f1")


class Scored(NamedTuple):
    """The results of a run on a split."""

    report: Report  # its scores, those of --mode evaluate
    totals: Totals  # its statistics

    def values(self) -> dict[str, Any]:
        """Returns the scores of all images by the names of `bootstrap.scores`: numbers, and float64[K] for those of classes."""
        found = self.report.metrics
        values = {name: getattr(found, name) for name in OF_ALL_CLASSES}
        return values | {name: getattr(found, "accuracy" if name == "recall" else name) for name in OF_A_CLASS}


def describe(scored: Scored, training: Cooccurrence | None) -> dict[str, Any]:
    """Returns the part of the document that follows from a run's results and, if known, the counts of its training images."""
    totals, info = scored.totals, scored.report.info
    counts = totals.per_image()
    values, sampled = scored.values(), bootstrap.samples(counts)
    present = (counts[:, 1] > 0).sum(0)
    classes: list[dict[str, Any]] = [
        {name: bootstrap.figure(values[name][k], sampled[name][:, k]) for name in OF_A_CLASS}
        | {"pixels": int(scored.report.pixels[k]), "images": int(present[k])}
        | {"training_images": None if training is None else int(training.present[k])}
        for k in range(info.num_classes)
    ]
    return {
        "bootstrap": {"samples": bootstrap.SAMPLES, "level": bootstrap.LEVEL, "seed": bootstrap.SEED},
        "summary": {name: bootstrap.figure(values[name], sampled[name]) for name in OF_ALL_CLASSES},
        "classes": classes,
        "confusion_matrix": totals.matrix.tolist(),
        "mismatched": [] if training is None else _mismatched(totals, training),
        "confusions": _confusions(totals),
        "confusion_pairs": _confusion_pairs(totals),
        "inconspicuous": _inconspicuous(totals),
        "boundary": _boundary(totals.matrices),
        "calibration": _calibration(totals.levels),
        "images": totals.rows,
    }


def compare(scored: Scored, other: Scored) -> dict[str, Any]:
    """Returns what another run's results on the same images add to the document: "against", but for its title and run."""
    counts = [one.totals.per_image() for one in (scored, other)]
    runs = [(one.values(), bootstrap.samples(found)) for one, found in zip((scored, other), counts, strict=True)]
    count, having = len(counts[0]), np.count_nonzero(np.add(*counts).any(1), axis=0)  # images; those in which a class occurs

    def compared(name: str, k: Any = ()) -> dict[str, Any]:
        (value, sampled), (others, sampled_others) = ((np.asarray(run[name])[k], drawn[name].T[k]) for run, drawn in runs)
        return bootstrap.compare(value, others, sampled, sampled_others, count if k == () else having[k])

    mine, others = scored.totals.rows, other.totals.rows
    differences = [_difference(row["mean_iou"], theirs["mean_iou"]) for row, theirs in zip(mine, others, strict=True)]
    changed = {i: difference for i, difference in enumerate(differences) if difference}
    order = sorted(changed, key=changed.__getitem__)
    return {
        "summary": {name: compared(name) for name in OF_ALL_CLASSES},
        "classes": [{name: compared(name, k) for name in OF_A_CLASS} for k in range(scored.totals.num_classes)],
        "images": [
            {name: row[name] for name in ("mean_iou", "pixel_accuracy", "confidence")} | {"difference": difference}
            for row, difference in zip(others, differences, strict=True)
        ],
        "better": [i for i in order[::-1] if changed[i] > 0][:CHANGED],
        "worse": [i for i in order if changed[i] < 0][:CHANGED],
    }


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _mismatched(totals: Totals, training: Cooccurrence) -> list[dict[str, Any]]:
    """Returns the mismatched regions, the most suspicious pair of classes first, and of each pair the largest region."""
    groups, found = totals.mismatched.groups(), []
    for pair in sorted(groups, key=lambda pair: -training.scores[pair]):
        predicted, beside = pair
        evidence = {
            "together": int(training.together[pair]),
            "touching": int(training.touching[pair]),
            "predicted_images": int(training.present[predicted]),
            "beside_images": int(training.present[beside]),
            "expected": float(training.expected[pair]),
            "score": float(training.scores[pair]),
        }
        found += [region | evidence for region in groups[pair]]
    return found[:REGIONS]


def _confusions(totals: Totals) -> list[dict[str, Any]]:
    """Returns the ordered pairs of classes that lose most pixels."""
    lost, truth = totals.matrix, totals.matrix.sum(1)
    np.fill_diagonal(lost, 0)
    return [
        {"truth": t, "predicted": p, "pixels": n, "share": n / int(truth[t]), "images": images}
        for (t, p), n, images in _largest(totals, lost)
    ]


def _confusion_pairs(totals: Totals) -> list[dict[str, Any]]:
    """Returns the unordered pairs of classes that lose most pixels to each other."""
    lost, truth = np.triu(totals.matrix + totals.matrix.T, 1), totals.matrix.sum(1)
    return [
        {"classes": [a, b], "pixels": n, "share": n / int(truth[a] + truth[b]), "images": images}
        for (a, b), n, images in _largest(totals, lost, both_ways=True)
    ]


def _largest(totals: Totals, lost: np.ndarray, both_ways: bool = False) -> list[tuple[tuple[int, int], int, list[int]]]:
    """Returns the largest elements of a matrix of lost pixels: their indices, values, and the images that lose most."""
    images, cells, counts = totals.sparse_matrices()
    found = []
    for cell in np.argsort(-lost, axis=None, kind="stable")[:PAIRS]:
        row, column = divmod(int(cell), len(lost))
        if not lost[row, column]:
            break
        same = (cells == cell) | (both_ways & (cells == column * len(lost) + row))
        of_images = np.bincount(images[same], counts[same])
        losing = np.argsort(-of_images, kind="stable")[: min(IMAGES, np.count_nonzero(of_images))]
        found.append(((row, column), int(lost[row, column]), losing.tolist()))
    return found


def _inconspicuous(totals: Totals) -> dict[str, Any]:
    """Returns recall by the size and thickness of the truth's regions, and the missed ones, of each size in turns."""
    missed = itertools.zip_longest(*totals.missed.groups().values())
    return {
        "sizes": list(SIZES),
        "thicknesses": list(THICKNESSES),
        "by_size": _by_range(totals.by_size, SIZES),
        "by_thickness": _by_range(totals.by_thickness, THICKNESSES),
        "missed": [region for rank in missed for region in rank if region],
    }


def _by_range(sums: np.ndarray, lows: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the ranges in which there are regions: first of all classes together, then of each."""
    found = []
    for k, of_class in ((None, sums.sum(0)), *enumerate(sums)):
        for (regions, pixels, correct, half), (low, high) in zip(
            of_class.tolist(), itertools.zip_longest(lows, lows[1:]), strict=True
        ):
            if regions:
                counts = {"components": regions, "pixels": pixels, "recall": correct / pixels, "found": half / regions}
                found.append({"class": k, "low": low, "high": high, **counts})
    return found


def _boundary(matrices: np.ndarray) -> dict[str, Any]:
    """Returns scores within several distances of a border, and farther away, given `Totals.matrices`."""
    near = [metrics.summarize(matrix) for matrix in matrices.cumsum(0)[:-1]]
    far = [metrics.summarize(matrix) for matrix in matrices[::-1].cumsum(0)[-2::-1]]
    return {
        "distances": list(DISTANCES),
        "mean_iou": [or_none(found.mean_iou) for found in near],
        "pixel_accuracy": [or_none(found.pixel_accuracy) for found in near],
        "classes": [[or_none(value) for value in of_class] for of_class in np.stack([found.iou for found in near], 1)],
        "interior_mean_iou": [or_none(found.mean_iou) for found in far],
    }


def _calibration(levels: np.ndarray) -> dict[str, Any]:
    """Returns the reliability diagram and the expected calibration error, given `Totals.levels`."""
    edges, total = np.linspace(0, LEVELS, BINS + 1).astype(int), levels.sum()
    bins, error = [], 0.0
    for low, high in itertools.pairwise(edges.tolist()):
        part = np.s_[:, low : high + (high == LEVELS)]
        (_, right), values = levels[part].sum(1).tolist(), np.arange(LEVELS + 1)[part[1]] / LEVELS
        pixels = int(levels[part].sum())
        confidence = float(levels[part].sum(0) @ values / pixels) if pixels else None
        accuracy = right / pixels if pixels else None
        error += abs((confidence or 0) - (accuracy or 0)) * pixels / total
        bins.append(
            {"low": low / LEVELS, "high": high / LEVELS, "pixels": pixels, "confidence": confidence, "accuracy": accuracy}
        )
    return {"bins": bins, "expected_calibration_error": error}
