"""Confusion matrices are counted exactly, and metrics are computed from them once."""

import jax
import numpy as np
import pytest

from pspnet_jax import metrics, parallel
from pspnet_jax.metrics import confusion_matrix, summarize

COUNT = jax.jit(confusion_matrix, static_argnums=2)


def test_matrix_of_a_hand_worked_image():
    truth = np.array([[0, 0, 1], [1, 2, 255], [2, 2, 3]], np.uint8)  # 255 and 3 (K = 3) are ignored
    prediction = np.array([[0, 1, 1], [1, 2, 0], [0, 2, 2]], np.uint8)
    np.testing.assert_array_equal(COUNT(truth, prediction, 3), [[1, 1, 0], [0, 2, 0], [1, 0, 2]])


def test_metrics_of_that_matrix():
    found = summarize(np.array([[1, 1, 0], [0, 2, 0], [1, 0, 2]]))
    np.testing.assert_allclose(found.iou, [1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(found.accuracy, [1 / 2, 1, 2 / 3])
    np.testing.assert_allclose(found.precision, [1 / 2, 2 / 3, 1])
    np.testing.assert_allclose(found.f1, [1 / 2, 4 / 5, 4 / 5])  # 2 / (1 / precision + 1 / recall)
    assert found.mean_precision == pytest.approx(13 / 18)
    assert found.mean_f1 == pytest.approx(7 / 10)
    assert found.mean_iou == pytest.approx(5 / 9)
    assert found.mean_accuracy == pytest.approx(13 / 18)
    assert found.pixel_accuracy == pytest.approx(5 / 7)


def test_a_class_absent_from_truth_and_prediction_is_left_out_of_the_means():
    found = summarize(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert found.mean_iou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert found.mean_accuracy == pytest.approx((3 / 4 + 1) / 2)
    assert np.isnan(found.iou[2])
    assert np.isnan(found.accuracy[2])


def test_a_class_that_is_only_predicted_lowers_mean_iou_but_has_no_accuracy():
    found = summarize(np.array([[3, 1], [0, 0]]))
    np.testing.assert_array_equal(found.iou, [3 / 4, 0])
    assert found.mean_iou == 3 / 8
    assert found.mean_accuracy == 3 / 4
    assert (found.mean_precision, found.mean_f1) == (1 / 2, 3 / 7)


def test_a_class_that_is_never_predicted_lowers_mean_f1_but_has_no_precision():
    found = summarize(np.array([[3, 0], [1, 0]]))
    np.testing.assert_array_equal(found.precision, [3 / 4, np.nan])
    np.testing.assert_array_equal(found.f1, [6 / 7, 0])
    assert (found.mean_precision, found.mean_f1) == (3 / 4, 3 / 7)


def test_metrics_without_labeled_pixels_are_nan():
    found = summarize(np.zeros((2, 2), int))
    assert np.isnan([found.mean_iou, found.mean_accuracy, found.pixel_accuracy]).all()


@pytest.mark.parametrize(("shape", "classes"), [((3, 41, 57), 19), ((2, 300, 400), 7), ((100,), 150), ((1, 1, 1), 2)])
def test_products_of_one_hot_vectors_count_as_bincount_does(shape, classes):
    """The two ways to count, of accelerators and of CPUs; more pixels than one block has, and labels to be ignored."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, classes + 2, shape), rng.integers(0, classes, shape)
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (truth[truth < classes], prediction[truth < classes]), 1)
    for count in (metrics._count_by_products, metrics._count_by_bincount):
        np.testing.assert_array_equal(jax.jit(count, static_argnums=2)(truth, prediction, classes), expected)


def test_counts_beyond_float32_stay_exact():
    """2^24 + 1 is the first count that float32 cannot hold."""
    assert summarize(np.array([[2**24 + 1, 0], [1, 2**24]])).accuracy[1] == 2**24 / (2**24 + 1)
    ones = np.zeros(2**24 + 1, np.uint8)
    assert COUNT(ones, ones, 2)[0, 0] == 2**24 + 1


def test_a_sharded_batch_is_counted_without_gathering_it():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 20, (8, 33, 17)).astype(np.uint8)
    truth[truth == 19] = 255
    prediction = rng.integers(0, 19, truth.shape).astype(np.uint8)
    sharding = parallel.batch_sharding(parallel.make_mesh())
    sharded = [jax.device_put(x, sharding) for x in (truth, prediction)]
    expected = np.zeros((19, 19), int)
    counted = truth != 255
    np.add.at(expected, (truth[counted], prediction[counted]), 1)
    np.testing.assert_array_equal(COUNT(*sharded, 19), expected)
    text = COUNT.lower(*sharded, 19).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
