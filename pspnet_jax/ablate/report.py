"""What the runs of an ablation show: means, standard deviations, significance, and whether the published order holds."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
from etils import epath

from pspnet_jax import figures, files
from pspnet_jax.ablate.runs import Score
from pspnet_jax.ablate.tables import Table

LEVEL = 0.05  # of significance


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a table with its scores in percent; None is a value that is not defined or not known.

    Attributes:
      row: its name.
      published: mIoU and pixel accuracy.
      scores: by seed.
      mean, std: of the mIoU over the seeds; the sample's standard deviation, with n - 1.
      pixel_accuracy: mean over the seeds.
      difference, p: of the mean mIoU to the reference's, and the p-value of Welch's t-test.
    """

    row: str
    published: tuple[float, float] | None
    scores: Mapping[int, Score]
    mean: float | None
    std: float | None
    pixel_accuracy: float | None
    difference: float | None
    p: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison that the publication makes, and what the runs say: differences of the mIoU (better - worse), in points."""

    better: str
    worse: str
    published: float | None
    measured: float | None
    p: float | None
    verdict: str  # agrees, disagrees, undecided or not measured

    def __str__(self) -> str:
        published = "" if self.published is None else f"; published {self.published:+.2f}"
        p = "" if self.p is None else f", p = {self.p:.2g}"
        measured = "" if self.measured is None else f" (measured {self.measured:+.2f} points{p}{published})"
        return f"{self.better} is better than {self.worse}: {self.verdict}{measured}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table with its scores."""

    table: str
    title: str
    reference: str
    lines: Sequence[Line]
    comparisons: Sequence[Comparison]


def summarize(name: str, table: Table, scores: Mapping[tuple[str, int], Score]) -> Summary:
    """Returns the summary of a table, given the scores that there are, by (row, seed)."""
    by_row = {row: {seed: score for (of, seed), score in scores.items() if of == row} for row in table.rows}
    ious = {row: [score.mean_iou for score in of_row.values()] for row, of_row in by_row.items()}
    lines = [
        Line(
            row,
            details.published,
            by_row[row],
            mean(ious[row]),
            float(np.std(ious[row], ddof=1)) if len(ious[row]) > 1 else None,
            mean([score.pixel_accuracy for score in by_row[row].values()]),
            *(compare(ious[row], ious[table.reference]) if row != table.reference else (None, None)),
        )
        for row, details in table.rows.items()
    ]
    comparisons = []
    for better, worse in table.order:
        published = [table.rows[row].published for row in (better, worse)]
        gain = published[0][0] - published[1][0] if published[0] and published[1] else None
        measured, p = compare(ious[better], ious[worse])
        comparisons.append(Comparison(better, worse, gain, measured, p, judge(measured, p)))
    return Summary(name, table.title, table.reference, lines, comparisons)


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def compare(values: Sequence[float], others: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the difference of two means, and the two-sided p-value of Welch's t-test, which assumes no equal variances.

    The p-value is None with fewer than two values on a side, or if the values of each side are all equal.
    """
    if not values or not others:
        return None, None
    difference = float(np.mean(values) - np.mean(others))
    if min(len(values), len(others)) < 2 or np.ptp(values) == np.ptp(others) == 0:
        return difference, None
    moments = [moment for side in (values, others) for moment in (np.mean(side), np.std(side, ddof=1), len(side))]
    return difference, float(scipy.stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)


def judge(measured: float | None, p: float | None) -> str:
    """Returns what a measured difference says about a published one that is positive."""
    if measured is None:
        return "not measured"
    if p is None or p >= LEVEL:
        return "undecided"
    return "agrees" if measured > 0 else "disagrees"


def smallest_significant(seeds: int) -> float:
    """Returns the smallest significant difference of two means over so many seeds, in standard deviations of a run.

    It is that of the t-test if both samples have this standard deviation: t * sqrt(2 / n) with 2 n - 2 degrees of freedom.
    """
    return float(scipy.stats.t.ppf(1 - LEVEL / 2, 2 * seeds - 2)) * math.sqrt(2 / seeds)


def write(folder: epath.Path, summaries: Sequence[Summary], settings: Mapping[str, object], seeds: int) -> str:
    """Writes ablation.json, .csv, .md and .png, each atomically, and returns the text of the .md file.

    Args:
      folder: created if missing.
      summaries: of the tables.
      settings: what the runs have in common, by name.
      seeds: number of seeds.
    """
    text = markdown(summaries, settings, seeds)
    found = {"settings": dict(settings), "tables": [dataclasses.asdict(summary) for summary in summaries]}
    rows = {s.table: [(n.row, n.published and n.published[0], _ious(n)) for n in s.lines] for s in summaries}
    with files.writing(folder, "the runs are kept; repeat the command with space for their table"):
        for suffix, content in ((".json", json.dumps(found, indent=2) + "\n"), (".csv", _csv(summaries)), (".md", text)):
            with files.atomic(folder / f"ablation{suffix}") as path:
                path.write_text(content)
        with files.atomic(folder / "ablation.png") as path, path.open("wb") as file:
            figures.ablation(rows).save(file, "png")
    return text


def _ious(line: Line) -> list[float]:
    return [score.mean_iou for score in line.scores.values()]


def _csv(summaries: Sequence[Summary]) -> str:
    """Returns one line for each run."""
    lines = [
        (summary.table, line.row, seed, *score)
        for summary in summaries
        for line in summary.lines
        for seed, score in line.scores.items()
    ]
    csv.writer(text := io.StringIO()).writerows([("table", "row", "seed", *Score._fields), *lines])
    return text.getvalue()


def markdown(summaries: Sequence[Summary], settings: Mapping[str, object], seeds: int) -> str:
    """Returns a table and a sentence for each comparison, for each summary."""
    power = "With one seed, no difference can be tested; use three or more."
    if seeds > 1:
        power = (
            f"With {seeds} seeds, two means differ significantly (p < {LEVEL}) only if they are about "
            f"{smallest_significant(seeds):.1f} standard deviations of a run apart; smaller differences stay undecided. "
            "The p-values are not corrected for the number of comparisons."
        )
    sections = ["# Ablation", ", ".join(f"{name}: {value}" for name, value in settings.items()) + f". {power}"]
    for summary in summaries:
        reference = summary.reference
        head = ("row", "published: mIoU / pixel accuracy", "mIoU by seed", "mean", "std", "pixel accuracy")
        table = [(*head, f"difference to {reference}", "p"), ("---",) * 8, *map(_cells, summary.lines)]
        sections += [f"## {summary.table}", summary.title, "\n".join(f"| {' | '.join(cells)} |" for cells in table)]
        if summary.comparisons:
            sections.append("\n".join(f"- {comparison}" for comparison in summary.comparisons))
    return "\n\n".join(sections) + "\n"


def _cells(line: Line) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    published = "{:.2f} / {:.2f}".format(*line.published) if line.published else "-"
    ious = ", ".join(map(number, _ious(line))) or "-"
    return (
        *(line.row, published, ious, number(line.mean), number(line.std), number(line.pixel_accuracy)),
        *(number(line.difference, "+.2f"), number(line.p, ".2g")),
    )
