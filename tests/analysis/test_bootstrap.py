"""Intervals and p-values, compared with a loop over samples and with the normal approximation."""

import math

import numpy as np
import pytest

from pspnet_jax import metrics
from pspnet_jax.analysis import bootstrap


def counts_of(matrices: np.ndarray) -> np.ndarray:
    """Returns `Totals.per_image` of confusion matrices [N, K, K]."""
    return np.stack([np.diagonal(matrices, 0, 1, 2), matrices.sum(2), matrices.sum(1)], 1).astype(float)


def test_scores_are_those_of_the_confusion_matrix():
    matrix = np.array([[5, 2, 0], [1, 3, 0], [0, 0, 0]])
    found, expected = bootstrap.scores(counts_of(matrix[None])[0]), metrics.summarize(matrix)
    for name in ("iou", "precision", "f1", "mean_iou", "mean_accuracy", "mean_precision", "mean_f1", "pixel_accuracy"):
        np.testing.assert_array_equal(found[name], getattr(expected, name))
    np.testing.assert_array_equal(found["recall"], expected.accuracy)


def test_samples_are_sums_over_images_drawn_with_replacement(monkeypatch):
    """With five images, all of which a sample may draw; each score is that of the summed matrices."""
    matrices = np.random.default_rng(1).integers(0, 9, (5, 3, 3))
    draws = list(bootstrap._draws(5))
    assert all((block.sum(1) == 5).all() for block in draws)
    found = bootstrap.samples(counts_of(matrices))["mean_iou"]
    for sample in (0, 123, 999):
        drawn = np.repeat(np.arange(5), draws[sample // bootstrap.BLOCK][sample % bootstrap.BLOCK].astype(int))
        assert found[sample] == pytest.approx(metrics.summarize(matrices[drawn].sum(0)).mean_iou, abs=1e-12)


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation():
    """Of 400 images with the same number of pixels, 70% right on average, the standard error is that of a mean."""
    right = np.random.default_rng(2).binomial(100, np.random.default_rng(3).uniform(0.4, 1, 400))
    matrices = np.zeros((400, 2, 2), int)
    matrices[:, 0, 0], matrices[:, 0, 1] = right, 100 - right
    accuracy = right / 100
    figure = bootstrap.figure(accuracy.mean(), bootstrap.samples(counts_of(matrices))["pixel_accuracy"])
    error = 1.96 * accuracy.std() / math.sqrt(400)
    assert figure["value"] == accuracy.mean()
    assert figure["low"] == pytest.approx(accuracy.mean() - error, abs=0.1 * error)
    assert figure["high"] == pytest.approx(accuracy.mean() + error, abs=0.1 * error)


def test_a_class_that_does_not_occur_has_no_figure():
    samples = bootstrap.samples(counts_of(np.ones((4, 2, 2), int) * [[1, 0], [0, 0]]))
    assert bootstrap.figure(math.nan, samples["iou"][:, 1]) == {"value": None, "low": None, "high": None}


def test_paired_runs_are_compared_on_the_same_samples():
    """Images differ far more than the runs: each image loses one pixel in the other run, which no interval alone would show."""
    sizes = np.random.default_rng(4).integers(10, 90, 50)
    runs = []
    for right in (sizes, sizes - 1):
        matrices = np.zeros((50, 2, 2), int)
        matrices[:, 0, 0], matrices[:, 0, 1] = right, 100 - right
        runs.append(bootstrap.samples(counts_of(matrices))["pixel_accuracy"])
    value = sizes.mean() / 100
    found = bootstrap.compare(value, value - 0.01, *runs, 50)
    assert found["other"]["high"] > value
    assert found["difference"]["low"] == pytest.approx(0.01)
    assert found["difference"]["high"] == pytest.approx(0.01)
    assert found["p"] == 2 / 1001


def test_equal_runs_and_few_images_are_not_significant():
    sampled = np.full(1000, 0.5)
    assert bootstrap.compare(0.5, 0.5, sampled, sampled, 9)["p"] == 1
    assert bootstrap.compare(0.5, 0.4, sampled, sampled - 0.1, 5)["p"] is None
    assert bootstrap.compare(0.5, 0.4, sampled, sampled - 0.1, 6)["p"] == 2 / 1001


def test_a_mean_lies_in_its_interval_though_samples_lack_rare_classes():
    """Class 0 is in all of 20 images, with an IoU near 0.9; each of 20 others in one image, with an IoU of 1/20."""
    matrices = np.zeros((20, 21, 21), int)
    matrices[:, 0, 0] = 200
    matrices[range(20), range(1, 21), range(1, 21)] = 1
    matrices[range(20), range(1, 21), 0] = 19
    counts = counts_of(matrices)
    found = bootstrap.figure(float(bootstrap.scores(counts.sum(0))["mean_iou"]), bootstrap.samples(counts)["mean_iou"])
    assert found["low"] <= found["value"] <= found["high"]
