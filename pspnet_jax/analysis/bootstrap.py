"""Confidence intervals and paired tests by bootstrap over images (Efron, 1979): images are drawn with replacement.

The scores of all samples are computed at once: sums over a sample are the product of how often it draws each image and the
counts of each image.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pspnet_jax.metrics import ratio

SAMPLES, LEVEL, SEED = 1000, 0.95, 0
LEAST = 6  # images that a test needs: even if all of 5 agree on a sign, that has a probability of 2 / 2^5 > 0.05
BLOCK = 100  # samples at a time
Scores = Mapping[str, np.ndarray]


def scores(counts: np.ndarray, missing: Scores | None = None) -> Scores:
    """Returns scores by name, NaN where undefined, given `Totals.per_image` or sums of it, float64[..., 3, K].

    Those of each class are float64[..., K]: iou, precision, recall and f1. Those of all are float64[...]: mean_iou,
    mean_precision, mean_accuracy and mean_f1, over the classes that have a value, and pixel_accuracy. The means take the scores
    of classes without a value from `missing`, if that is given.
    """
    correct, truth, predicted = np.moveaxis(counts, -2, 0)
    wholes = {"iou": truth + predicted - correct, "precision": predicted, "recall": truth, "f1": (truth + predicted) / 2}
    of_classes = {name: ratio(correct, whole) for name, whole in wholes.items()}
    means = {
        f"mean_{name}": _mean(values if missing is None else np.where(np.isnan(values), missing[name], values))
        for name, values in of_classes.items()
    }
    means["mean_accuracy"] = means.pop("mean_recall")
    return {**of_classes, **means, "pixel_accuracy": ratio(correct.sum(-1), truth.sum(-1))}


def samples(counts: np.ndarray) -> Scores:
    """Returns the scores of `SAMPLES` samples of images along a leading axis, given float64[N, 3, K], see `Totals.per_image`.

    The samples depend only on the number of images, so that two runs are compared on the same samples. All means are over the
    same classes: one that a sample lacks counts with its score on all images. Left out, rare classes, which mostly have low
    scores, would raise the means of the samples that lack them.
    """
    flat, whole = counts.reshape(len(counts), -1), scores(counts.sum(0))
    found = [scores((drawn @ flat).reshape(-1, *counts.shape[1:]), whole) for drawn in _draws(len(counts))]
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _draws(images: int) -> Iterator[np.ndarray]:
    """Yields how often each sample draws each image, float64[BLOCK, N]."""
    generator = np.random.default_rng(SEED)
    for _ in range(SAMPLES // BLOCK):
        yield generator.multinomial(images, np.full(images, 1 / images), BLOCK).astype(np.float64)


def figure(value: float, sampled: np.ndarray) -> dict[str, float | None]:
    """Returns a value with the percentile interval of its samples; all are None if it is undefined."""
    if np.isnan(value):
        return dict.fromkeys(("value", "low", "high"))
    low, high = np.nanquantile(sampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"value": float(value), "low": float(low), "high": float(high)}


def compare(value: float, other: float, sampled: np.ndarray, sampled_other: np.ndarray, images: int) -> dict[str, Any]:
    """Returns another run's figure, the difference of this run to it, and its p-value.

    The p-value is two-sided: twice the share of samples in which the sign of the difference is not the more frequent one, with
    one more sample counted on each side, so that it is never 0. It is None if fewer than `LEAST` images have the class.
    """
    differences = (sampled - sampled_other)[~np.isnan(sampled - sampled_other)]
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    known = images >= LEAST and not np.isnan(value - other)
    p = min(1.0, 2 * (1 + int(smaller)) / (1 + len(differences))) if known else None
    return {"other": figure(other, sampled_other), "difference": figure(value - other, differences), "p": p}


def _mean(values: np.ndarray) -> np.ndarray:
    present = ~np.isnan(values)
    return ratio(np.where(present, values, 0).sum(-1), present.sum(-1, dtype=np.float64))
