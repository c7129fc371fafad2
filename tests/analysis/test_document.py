"""The document of two small images, worked out by hand, and the tables made of it."""

import csv
import json

import numpy as np
import pytest

from pspnet_jax.analysis import document, tables
from pspnet_jax.analysis.cooccurrence import Cooccurrence
from pspnet_jax.analysis.document import Scored
from pspnet_jax.analysis.image import analyze
from pspnet_jax.analysis.totals import Ranked, Totals
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.metrics import summarize
from pspnet_jax.report import Report

INFO = DatasetInfo("farm", ("field", "earth", "sign", "never"), ((0, 9, 0), (9, 0, 0), (0, 0, 9), (9, 9, 9)))
FIELD, EARTH, SIGN, NEVER = range(4)
UNDEFINED = {"value": None, "low": None, "high": None}
TRAINING = Cooccurrence(100, np.full((4, 4), 50), np.array([[0, 40, 40, 0], [40, 0, 0, 0], [40, 0, 0, 0], [0, 0, 0, 0]]))


def images(confusion: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the truth and prediction of two images.

    Image a is half field and half earth, and has a sign of 16 pixels that is missed; of the field, `confusion` rows are
    predicted as earth. Image b is field with a sign on earth in the prediction, and void at its lower end.
    """
    truth, prediction = np.zeros((2, 2, 20, 20), np.uint8)
    truth[0, :, 10:] = prediction[0, :, 10:] = EARTH
    truth[0, 2:6, 2:6] = SIGN
    prediction[0, 20 - confusion :, :10] = EARTH
    prediction[1, :10], prediction[1, 4:8, 4:8] = EARTH, SIGN
    truth[1, 15:] = 255
    return list(zip(truth, prediction, strict=True))


def scored(confusion: int) -> Scored:
    totals = Totals(4, 2)
    for index, (truth, prediction) in enumerate(images(confusion)):
        confidence = np.full(truth.shape, 0.75, np.float32)
        if index:
            confidence[:10] = 0.35
        totals.add(index, analyze("ab"[index], truth, prediction, confidence, 4, TRAINING.scores))
    matrix = totals.matrix
    return Scored(Report(summarize(matrix), matrix, 2, INFO, {"split": "val"}, "1 x cpu", 1.0, 1.0), totals)


@pytest.fixture(scope="module")
def found():
    return document.describe(scored(5), TRAINING)


def test_confusions_in_both_directions(found):
    lost = {(entry["truth"], entry["predicted"]): entry for entry in found["confusions"]}
    assert {pair: entry["pixels"] for pair, entry in lost.items()} == {
        (FIELD, EARTH): 50 + 200 - 16,
        (FIELD, SIGN): 16,
        (SIGN, FIELD): 16,
    }
    assert lost[FIELD, EARTH]["share"] == 234 / (184 + 300)
    assert lost[FIELD, EARTH]["images"] == [1, 0]  # b loses 184 pixels, a 50
    [first, second] = found["confusion_pairs"]
    assert (first["classes"], first["pixels"], first["share"]) == ([FIELD, EARTH], 234, 234 / (484 + 200))
    assert (second["classes"], second["pixels"], second["images"]) == ([FIELD, SIGN], 32, [0, 1])
    assert found["confusion_matrix"][SIGN] == [16, 0, 0, 0]


def test_mismatched_regions_with_the_counts_that_make_them_suspicious(found):
    earth_beside_sign, sign_beside_earth = sorted(found["mismatched"], key=lambda region: -region["pixels"])
    assert sign_beside_earth == {
        "image": 1,
        "predicted": SIGN,
        "beside": EARTH,
        "truth": FIELD,
        "pixels": 16,
        "box": [4, 4, 4, 4],
        "together": 50,
        "touching": 0,
        "predicted_images": 50,
        "beside_images": 50,
        "expected": 25.0,
        "score": np.log2(26),
    }
    assert (earth_beside_sign["predicted"], earth_beside_sign["beside"], earth_beside_sign["pixels"]) == (EARTH, SIGN, 184)


def test_inconspicuous_classes(found):
    missed = [(entry["image"], entry["class"], entry["predicted"]) for entry in found["inconspicuous"]["missed"]]
    assert missed == [(0, SIGN, FIELD), (1, FIELD, EARTH)]
    smallest = {entry["class"]: entry for entry in found["inconspicuous"]["by_size"] if entry["low"] == 0}
    assert smallest[SIGN] == smallest[None] | {"class": SIGN}
    assert smallest[SIGN] == {
        "class": SIGN,
        "low": 0,
        "high": 64,
        "components": 1,
        "pixels": 16,
        "recall": 0.0,
        "found": 0.0,
    }
    assert found["inconspicuous"]["by_thickness"][0]["low"] == 3


def test_boundary_quality(found):
    """Beside borders are 40 + 12 + 16 + 20 pixels: of field and earth, of the sign, around it, and beside void."""
    boundary = found["boundary"]
    wrong = 12 + 5  # the sign, and the field in the last five rows
    assert boundary["pixel_accuracy"][0] == (88 - wrong) / 88
    assert boundary["classes"][SIGN] == [0] * 6
    assert boundary["classes"][NEVER] == [None] * 6
    everything = np.array(found["confusion_matrix"])
    assert boundary["interior_mean_iou"][-1] == pytest.approx(summarize(everything - _within(12)).mean_iou)


def _within(distance: int) -> np.ndarray:
    """Returns the confusion matrix of the pixels within a distance, by brute force over all pairs of pixels."""
    matrix = np.zeros((4, 4), int)
    for truth, prediction in images(5):
        rows, columns = np.indices(truth.shape).reshape(2, -1)
        squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
        other = truth.ravel()[:, None] != truth.ravel()
        near = np.where(other, squared, 9999).min(1).reshape(truth.shape) <= distance**2
        counted = near & (truth != 255)
        np.add.at(matrix, (truth[counted], prediction[counted]), 1)
    return matrix


def test_calibration(found):
    bins = {entry["low"]: entry for entry in found["calibration"]["bins"] if entry["pixels"]}
    low, high = bins.values()
    assert (low["pixels"], low["accuracy"]) == (200, 0)
    assert low["confidence"] == pytest.approx(0.35)
    assert (high["pixels"], high["accuracy"]) == (500, (500 - 66) / 500)
    assert found["calibration"]["expected_calibration_error"] == pytest.approx((200 * 0.35 + 500 * abs(0.75 - 434 / 500)) / 700)


def test_a_class_that_does_not_occur_has_no_figures(found):
    nothing = dict.fromkeys(("iou", "precision", "recall", "f1"), UNDEFINED)
    assert found["classes"][NEVER] == nothing | {"pixels": 0, "images": 0, "training_images": 50}
    assert found["classes"][SIGN]["images"] == 1


def test_images_of_a_pair_are_ranked_by_what_they_lose_in_both_directions():
    """Image 0 loses 60 pixels in each direction, image 1 70 in one and 1 in the other."""
    totals = Totals(2, 2)
    for index, (first, second) in enumerate([(60, 60), (70, 1)]):
        truth, prediction = np.zeros((2, 20, 20), np.uint8)
        truth[10:] = prediction[10:] = 1
        prediction.ravel()[:first], prediction.ravel()[-second:] = 1, 0
        totals.add(index, analyze(str(index), truth, prediction, np.ones(truth.shape, np.float32), 2, None))
    assert document._confusion_pairs(totals)[0]["images"] == [0, 1]
    assert document._confusions(totals)[0] == {"truth": 0, "predicted": 1, "pixels": 130, "share": 130 / 400, "images": [1, 0]}


def test_two_runs_side_by_side():
    mine, other = scored(5), scored(9)
    against = document.compare(mine, other)
    expected = mine.report.metrics.iou[EARTH] - other.report.metrics.iou[EARTH]
    assert against["classes"][EARTH]["iou"]["difference"]["value"] == expected
    assert against["classes"][NEVER]["iou"] == {"other": UNDEFINED, "difference": UNDEFINED, "p": None}
    assert (against["better"], against["worse"]) == ([0], [])
    assert against["images"][1]["difference"] == 0
    assert document.compare(other, mine)["worse"] == [0]


def test_ranked_items_are_the_highest_of_each_group():
    ranked = Ranked(2)
    for number, (group, rank) in enumerate([("x", 1), ("x", 3), ("y", 0), ("x", 3), ("x", 2)]):
        ranked.add(group, rank, {"number": number})
    assert ranked.groups() == {"x": [{"number": 1}, {"number": 3}], "y": [{"number": 2}]}


def test_tables_name_classes_and_images(found, tmp_path):
    classes = [{"name": name, "color": [0, 0, 0]} for name in INFO.class_names]
    whole = {**found, "dataset": {"classes": classes}, "curves": {"training": [], "evaluations": []}, "against": None}
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    tables.write(whole, tmp_path / "tables")

    def rows(name):
        with (tmp_path / f"tables/{name}.csv").open() as file:
            return list(csv.DictReader(file))

    assert list(rows("confusions")[0].values()) == ["field", "earth", "234", str(234 / 484), "b;a"]
    assert rows("mismatched")[0]["image"] == "b"
    assert rows("classes")[3] == dict.fromkeys(rows("classes")[0], "") | {
        "class": "never",
        "pixels": "0",
        "images": "0",
        "training_images": "50",
    }
    assert float(rows("classes")[0]["iou_low"]) <= float(rows("classes")[0]["iou"])
    assert [row["name"] for row in rows("images")] == ["a", "b"]
    assert rows("boundary")[0]["iou/never"] == ""
    assert not (tmp_path / "tables/training.csv").exists()  # it would have no rows
