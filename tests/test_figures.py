"""Plots show the values that they are given."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from pspnet_jax import figures
from pspnet_jax.datasets import DatasetInfo


def test_a_confusion_matrix_is_shown_in_shares_of_its_rows(monkeypatch):
    """A class without pixels has an empty row; "$" begins no formula."""
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **more: (shown.append(values), imshow(self, values, **more))[1])
    figures.confusion_matrix(np.array([[3, 1, 0], [0, 0, 0], [1, 0, 1]]), ("$road", "sky_$^", "car"))
    np.testing.assert_array_equal(shown[0], [[75, 25, 0], [0, 0, 0], [50, 0, 50]])


def test_150_classes_get_room_for_their_names():
    """11 pixels for each row, in which a name of 8 points fits, and no numbers."""
    small, large = (figures.confusion_matrix(np.eye(count), [f"c{i}" for i in range(count)]) for count in (3, 150))
    assert min(small.size) > 300
    assert 150 * 11 < min(large.size) < 3000


def test_learning_curves_have_losses_rate_and_metrics(monkeypatch):
    drawn, plot = {}, Axes.plot

    def recorded(self, xs, ys, *, label, **more):
        drawn[self.get_subplotspec().rowspan.start, label] = [*zip(xs, ys, strict=True)]
        return plot(self, xs, ys, label=label, **more)

    monkeypatch.setattr(Axes, "plot", recorded)
    lines = [
        {
            "kind": "train",
            "step": 2,
            "loss": 2.0,
            "auxiliary_dice": 0.5,
            "gradient_norm": 9,
            "learning_rate": 0.1,
            "mean_iou": 0,
        },
        {"kind": "epoch", "step": 3, "images_per_second": 7.0},
        {"kind": "eval", "step": 4, "mean_iou": 0.25, "iou/road": float("nan"), "pixel_accuracy": 0.5},
        {"kind": "train", "step": 4, "loss": 1.0, "learning_rate": 0.05, "mean_iou": 0.5},
    ]
    figures.learning_curves(lines, "iou/road")
    assert drawn.pop((2, "eval: iou/road"))[0][0] == 4
    assert drawn == {
        (0, "train: loss"): [(2, 2.0), (4, 1.0)],
        (0, "train: auxiliary_dice"): [(2, 0.5)],
        (1, "train: learning_rate"): [(2, 0.1), (4, 0.05)],
        (2, "train: mean_iou"): [(2, 0), (4, 0.5)],
        (2, "eval: mean_iou"): [(4, 0.25)],
    }


@pytest.mark.parametrize("lines", [[], [{"kind": "eval", "step": 1, "rmse": 2.0}]])
def test_a_run_without_any_curve_has_empty_panels(lines):
    assert figures.learning_curves(lines, "mean_iou").size == (800, 900)


def test_class_frequencies_are_bars_in_class_colors_with_the_most_frequent_on_top():
    """A "$" begins no formula."""
    info = DatasetInfo("street", ("$_^$", "car"), ((128, 64, 128), (0, 0, 142)))
    picture = np.asarray(figures.class_frequencies(np.array([1, 3]), info))
    road, car = (np.argwhere((picture == color).all(-1)) for color in info.colors)
    assert car[:, 0].max() < road[:, 0].min()
    assert np.ptp(car[:, 1]) > np.ptp(road[:, 1])


def test_names_in_letters_that_the_font_lacks_have_their_index_and_cause_no_warning(recwarn):
    assert figures.legible("背景", 3) == "3 背景"
    assert figures.legible("Straße", 3) == "Straße"
    figures.confusion_matrix(np.eye(2), ["背景", "道路"])
    assert not recwarn.list
