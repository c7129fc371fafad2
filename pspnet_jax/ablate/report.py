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
    """A row of a table with its scores in percent; None is a value that is not defined or not known."""

    row: str  # its name
    published: tuple[float, float] | None  # mIoU and pixel accuracy
    scores: Mapping[int, Score]  # by seed
    mean: float | None  # of the mIoU over the seeds
    std: float | None  # of the mIoU: the sample's standard deviation, with n - 1
    pixel_accuracy: float | None  # mean over the seeds
    difference: float | None  # of the mean mIoU to the reference's
    p: float | None  # of the difference, see `compare`


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
    ious = {row: {seed: score.mean_iou for seed, score in of_row.items()} for row, of_row in by_row.items()}

    def compared(row: str, other: str) -> tuple[float | None, float | None]:
        same_networks = (table.rows[row].network or row) == (table.rows[other].network or other)
        return compare(ious[row], ious[other], same_networks)

    lines = [
        Line(
            row,
            details.published,
            by_row[row],
            mean([*ious[row].values()]),
            float(np.std([*ious[row].values()], ddof=1)) if len(ious[row]) > 1 else None,
            mean([score.pixel_accuracy for score in by_row[row].values()]),
            *(compared(row, table.reference) if row != table.reference else (None, None)),
        )
        for row, details in table.rows.items()
    ]
    comparisons = []
    for better, worse in table.order:
        published = [table.rows[row].published for row in (better, worse)]
        gain = published[0][0] - published[1][0] if published[0] and published[1] else None
        measured, p = compared(better, worse)
        comparisons.append(Comparison(better, worse, gain, measured, p, judge(measured, p)))
    return Summary(name, table.title, table.reference, lines, comparisons)


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def compare(
    by_seed: Mapping[int, float], others_by_seed: Mapping[int, float], same_networks: bool
) -> tuple[float | None, float | None]:
    """Returns the difference of two means over seeds, and its two-sided p-value.

    That is the p-value of Welch's t-test, which assumes no equal variances. Two evaluations of the same networks are compared
    over the seeds that both have, and by the paired t-test. The p-value is None with fewer than two values on a side, or if the
    values of each side (if paired, their differences) are all equal.
    """
    if same_networks:
        both = [seed for seed in by_seed if seed in others_by_seed]
        by_seed, others_by_seed = ({seed: side[seed] for seed in both} for side in (by_seed, others_by_seed))
    values, others = [*by_seed.values()], [*others_by_seed.values()]
    if not values or not others:
        return None, None
    difference = float(np.mean(values) - np.mean(others))
    if same_networks:
        changes = np.subtract(values, others)
        return difference, float(scipy.stats.ttest_1samp(changes, 0).pvalue) if np.ptp(changes) > 0 else None
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


def write(stem: epath.Path, summaries: Sequence[Summary], settings: Mapping[str, object], seeds: Sequence[int]) -> str:
    """Writes `stem` with the suffixes .json, .csv, .md and .png, each atomically, and returns the text of the .md file.

    `settings` are what the runs have in common, by name.
    """
    text = markdown(summaries, settings, seeds)
    found = {"settings": dict(settings), "tables": [dataclasses.asdict(summary) for summary in summaries]}
    rows = {s.table: [(n.row, n.published and n.published[0], _ious(n)) for n in s.lines] for s in summaries}
    with files.writing(stem.parent, "the runs are kept; repeat the command with space for their table"):
        for suffix, content in ((".json", json.dumps(found, indent=2) + "\n"), (".csv", _csv(summaries)), (".md", text)):
            files.write_atomic(stem.parent / f"{stem.name}{suffix}", content)
        with files.atomic(stem.parent / f"{stem.name}.png") as path, path.open("wb") as file:
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


def markdown(summaries: Sequence[Summary], settings: Mapping[str, object], seeds: Sequence[int]) -> str:
    """Returns a table and a sentence for each comparison, for each summary."""
    power = "With one seed, no difference can be tested; use three or more."
    if len(seeds) > 1:
        power = (
            f"With {len(seeds)} seeds, two means differ significantly (p < {LEVEL}) only if they are about "
            f"{smallest_significant(len(seeds)):.1f} standard deviations of a run apart; smaller differences stay undecided. "
            "Two evaluations of the same networks are compared by a paired test. "
            "The p-values are not corrected for the number of comparisons."
        )
    sections = ["# Ablation", ", ".join(f"{name}: {value}" for name, value in settings.items()) + f". {power}"]
    for summary in summaries:
        reference = summary.reference
        head = ("row", "published: mIoU / pixel accuracy", "mIoU by seed", "mean", "std", "pixel accuracy")
        cells = [_cells(line, seeds) for line in summary.lines]
        table = [(*head, f"difference to {reference}", "p"), ("---",) * 8, *cells]
        sections += [f"## {summary.table}", summary.title, "\n".join(f"| {' | '.join(row)} |" for row in table)]
        if left := sum(seed not in line.scores for line in summary.lines for seed in seeds):
            sections.append(f"{left} of {len(seeds) * len(summary.lines)} scores are missing (-).")
        if summary.comparisons:
            sections.append("\n".join(f"- {comparison}" for comparison in summary.comparisons))
    return "\n\n".join(sections) + "\n"


def _cells(line: Line, seeds: Sequence[int]) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    published = "{:.2f} / {:.2f}".format(*line.published) if line.published else "-"
    ious = ", ".join(number(line.scores[seed].mean_iou) if seed in line.scores else "-" for seed in seeds)
    return (
        *(line.row, published, ious, number(line.mean), number(line.std), number(line.pixel_accuracy)),
        *(number(line.difference, "+.2f"), number(line.p, ".2g")),
    )
