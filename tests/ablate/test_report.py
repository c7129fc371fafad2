"""Means, standard deviations, p-values and verdicts of hand-worked examples."""

import json
import math

import pytest
from etils import epath
from matplotlib.axes import Axes

from pspnet_jax import figures
from pspnet_jax.ablate import Row, Table, report
from pspnet_jax.ablate.runs import Score

TABLE = Table(
    rows={"plain": Row({}, (40.0, 80.0)), "good": Row({}, (41.5, 81.0)), "bad": Row({}), "missing": Row({})},
    reference="plain",
    order=(("good", "plain"), ("bad", "plain"), ("good", "missing")),
    title="Three variants.",
)
IOUS = {"plain": (1.0, 2.0, 3.0), "good": (3.0, 4.0, 5.0), "bad": (-5.0, -4.0, -3.0)}
SCORES = {(row, seed): Score(iou, 10 * iou) for row, ious in IOUS.items() for seed, iou in enumerate(ious)}


def by_seed(*values):
    return dict(enumerate(values))


def test_welch_with_equal_variances():
    """t = 2 / sqrt(1/3 + 1/3) with 4 degrees of freedom, whose distribution has a closed form."""
    t = math.sqrt(6)
    below = 0.5 + 3 / 8 * t / math.sqrt(1 + t**2 / 4) * (1 - t**2 / (1 + t**2 / 4) / 12)
    difference, p = report.compare(by_seed(3, 4, 5), by_seed(1, 2, 3), False)
    assert difference == 2
    assert p == pytest.approx(2 * (1 - below))
    assert p == pytest.approx(0.0705, abs=1e-4)


def test_welch_where_one_side_has_no_variance():
    """Variances 4 and 0: t = 7 / sqrt(4/3) with 2 degrees of freedom, where p = 1 - t / sqrt(2 + t^2)."""
    t = 7 / math.sqrt(4 / 3)
    difference, p = report.compare(by_seed(9, 9, 9), by_seed(0, 2, 4), False)
    assert (difference, p) == (7, pytest.approx(1 - t / math.sqrt(2 + t**2)))


@pytest.mark.parametrize(("values", "others"), [([1], [2, 3]), ([1, 1], [2, 2])])
def test_a_difference_without_any_standard_deviation_has_no_p_value(values, others):
    assert report.compare(by_seed(*values), by_seed(*others), False)[1] is None


def test_two_evaluations_of_the_same_networks_are_compared_seed_by_seed():
    """The differences 1, 1.1 and 1.2 have t = 1.1 / (0.1 / sqrt(3)) with 2 degrees of freedom; seed 3 has no partner."""
    t = 11 * math.sqrt(3)
    difference, p = report.compare(by_seed(41, 46.1, 51.2), by_seed(40, 45, 50, 99), True)
    assert (difference, p) == (pytest.approx(1.1), pytest.approx(1 - t / math.sqrt(2 + t**2)))
    assert report.compare(by_seed(1), by_seed(2), True) == (-1, None)
    table = Table(rows={"one": Row({}), "many": Row({"eval.scales": (0.5, 1.0)}, network="one")}, reference="one")
    scores = {("many", 0): Score(41, 80), ("many", 1): Score(46.1, 80), ("one", 0): Score(40, 80), ("one", 1): Score(45, 80)}
    assert report.summarize("mine", table, scores).lines[1].p == pytest.approx(0.0303, abs=1e-4)


def test_the_smallest_significant_difference():
    """Student's t at 97.5% is 2.776 for 4 degrees of freedom and 4.303 for 2 (tables of the distribution)."""
    assert report.smallest_significant(3) == pytest.approx(2.776 * math.sqrt(2 / 3), rel=1e-3)
    assert report.smallest_significant(2) == pytest.approx(4.303, rel=1e-3)


@pytest.mark.parametrize(
    ("measured", "p", "verdict"),
    [
        (1, 0.049, "agrees"),
        (-1, 0.049, "disagrees"),
        (1, 0.05, "undecided"),
        (-1, None, "undecided"),
        (None, None, "not measured"),
    ],
)
def test_verdicts(measured, p, verdict):
    assert report.judge(measured, p) == verdict


def test_a_summary():
    plain, good, bad, missing = report.summarize("mine", TABLE, SCORES).lines
    assert (plain.mean, plain.std, plain.pixel_accuracy, plain.difference, plain.p) == (2, 1, 20, None, None)
    assert (good.mean, good.std, good.difference) == (4, 1, 2)
    assert bad.difference == -6
    assert (missing.mean, missing.std, missing.difference, missing.p) == (None, None, None, None)


def test_sentences():
    """bad - plain is -6 with t = -6 / sqrt(2/3) = -7.35 and p = 0.0018 from the closed form above."""
    assert [*map(str, report.summarize("mine", TABLE, SCORES).comparisons)] == [
        "good is better than plain: undecided (measured +2.00 points, p = 0.07; published +1.50)",
        "bad is better than plain: disagrees (measured -6.00 points, p = 0.0018)",
        "good is better than missing: not measured",
    ]


def test_the_files(tmp_path):
    summaries = [report.summarize("mine", TABLE, SCORES)]
    text = report.write(epath.Path(tmp_path) / "ablation_v1.0", summaries, {"dataset": "scenes"}, [0, 1, 2])
    assert {path.name for path in tmp_path.iterdir()} == {f"ablation_v1.0.{suffix}" for suffix in ("json", "csv", "md", "png")}
    assert (tmp_path / "ablation_v1.0.md").read_text() == text
    assert "| good | 41.50 / 81.00 | 3.00, 4.00, 5.00 | 4.00 | 1.00 | 40.00 | +2.00 | 0.07 |" in text
    assert "| missing | - | -, -, - | - | - | - | - | - |" in text
    assert "3 of 12 scores are missing (-)." in text
    assert "only if they are about 2.3 standard deviations of a run apart" in text
    lines = (tmp_path / "ablation_v1.0.csv").read_text().splitlines()
    assert (len(lines), lines[0], lines[4]) == (10, "table,row,seed,mean_iou,pixel_accuracy", "mine,good,0,3.0,30.0")
    [table] = json.loads((tmp_path / "ablation_v1.0.json").read_text())["tables"]
    assert table["lines"][1]["scores"]["2"] == [5.0, 50.0]
    assert table["comparisons"][0]["verdict"] == "undecided"


def test_one_seed_says_that_it_shows_nothing():
    summary = report.summarize("mine", TABLE, {key: score for key, score in SCORES.items() if key[1] == 0})
    text = report.markdown([summary], {}, [0])
    assert "With one seed, no difference can be tested" in text
    assert "good is better than plain: undecided (measured +2.00 points; published +1.50)" in text


def test_the_plot_has_means_runs_and_ranks(monkeypatch):
    ranks, bars, annotate, errorbar = {}, {}, Axes.annotate, Axes.errorbar

    def annotated(self, text, place, **more):
        ranks[self.get_title().removesuffix(" mIoU, %, and rank"), place] = text.strip()
        return annotate(self, text, place, **more)

    monkeypatch.setattr(Axes, "annotate", annotated)
    monkeypatch.setattr(
        Axes, "errorbar", lambda *a, **more: (bars.update({a[2]: (a[1], more["xerr"])}), errorbar(*a, **more))[1]
    )
    figures.ablation({"tables/mi$n$e.py": [("a$", 40.0, [1, 2, 3]), ("b", 41.5, [7]), ("c", None, [3, 5]), ("d", 39.0, [])]})
    assert bars == {0: (2, 1), 2: (4, pytest.approx(math.sqrt(2)))}
    assert ranks == {
        (r"mi\$n\$e: published", (40.0, 0)): "2.",
        (r"mi\$n\$e: published", (41.5, 1)): "1.",
        (r"mi\$n\$e: published", (39.0, 3)): "3.",
        (r"mi\$n\$e: measured", (2, 0)): "3.",
        (r"mi\$n\$e: measured", (7, 1)): "1.",
        (r"mi\$n\$e: measured", (4, 2)): "2.",
    }
