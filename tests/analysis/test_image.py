"""Statistics of an image that is worked out by hand."""

import numpy as np

from pspnet_jax.analysis.image import DISTANCES, LEVELS, SIZES, THICKNESSES, analyze

GROUND, POLE, BOAT = range(3)


def example():
    """A pole of 3x20 pixels, of which 6 are found, on ground; at the right, void; in the prediction, a boat on the ground."""
    truth, prediction = np.zeros((2, 40, 60), np.uint8)
    truth[10:30, 20:23] = POLE
    prediction[10:12, 20:23] = POLE
    truth[:, 50:] = 255
    prediction[30:36, 30:40] = BOAT
    confidence = np.full(truth.shape, 0.9, np.float32)
    confidence[prediction == BOAT] = 0.25
    return truth, prediction, confidence


def found(scores=None):
    return analyze("one", *example(), 3, scores)


def test_cells_count_each_labeled_pixel_once_by_distance_from_a_border():
    statistics = found()
    bands = np.zeros((len(DISTANCES) + 1, 3, 3), int)
    bands.ravel()[statistics.cells] = statistics.counts
    assert bands.sum(0).tolist() == [[40 * 50 - 60 - 60, 0, 60], [54, 6, 0], [0, 0, 0]]
    assert bands[0].sum(1).tolist() == [2 * 23 + 40, 60 - 18, 0]  # beside the pole, and beside void; all but the pole's core
    assert bands[1, POLE].sum() == 18


def test_confidence_counts_labeled_pixels():
    levels = found().levels
    assert levels[:, round(0.9 * LEVELS)].tolist() == [54, 40 * 50 - 60 - 54]
    assert levels[:, LEVELS // 4].tolist() == [60, 0]
    assert levels.sum() == 40 * 50


def test_regions_by_size_and_thickness():
    statistics = found()
    of_ground = [1, 40 * 50 - 60, 40 * 50 - 60 - 60, 1]
    assert statistics.by_size[POLE, 0].tolist() == [1, 60, 6, 0]
    assert statistics.by_size[GROUND, SIZES.index(1024)].tolist() == of_ground
    assert statistics.by_thickness[POLE, THICKNESSES.index(3)].tolist() == [1, 60, 6, 0]
    assert statistics.by_size.sum() == statistics.by_thickness.sum() == sum([*of_ground, 1, 60, 6])


def test_missed_regions():
    [pole] = found().missed
    assert pole == {
        "class": POLE,
        "pixels": 60,
        "thickness": 3.0,
        "box": [10, 20, 20, 3],
        "recall": 0.1,
        "predicted": GROUND,
    }


def test_mismatched_regions_are_wrong_and_beside_a_class_that_they_do_not_touch_in_training():
    scores = np.zeros((3, 3))
    assert found(scores).mismatched == []
    scores[POLE, GROUND] = scores[BOAT, GROUND] = 5  # but the part of the pole is right
    [boat] = found(scores).mismatched
    assert boat == {"predicted": BOAT, "beside": GROUND, "truth": GROUND, "pixels": 60, "box": [30, 30, 6, 10]}


def test_the_row_of_the_image():
    row = found().row
    assert (row["labeled"], row["smallest"], row["truth"], row["predicted"]) == (2000, 60, [0, 1], [0, 1, 2])
    assert row["errors"] == [[GROUND, BOAT, 60], [POLE, GROUND, 54]]
    assert row["pixel_accuracy"] == (2000 - 114) / 2000
    assert row["mean_iou"] == np.mean([1880 / 1994, 6 / 60, 0])
    assert abs(row["confidence"] - (0.9 * 2340 + 0.25 * 60) / 2400) < 1e-6


def test_an_image_of_void_has_no_scores():
    prediction = np.ones((5, 6), np.uint8)
    statistics = analyze("void", np.full((5, 6), 255, np.uint8), prediction, np.ones((5, 6), np.float32), 2, np.ones((2, 2)))
    assert (statistics.row["mean_iou"], statistics.row["pixel_accuracy"], statistics.row["errors"]) == (None, None, [])
    assert not statistics.cells.size
    assert statistics.mismatched == statistics.missed == []
