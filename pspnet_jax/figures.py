"""Plots: the confusion matrix, learning curves, class frequencies and ablations. Only drawing them imports matplotlib."""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.losses import LOSSES

MAX_CELLS_WITH_NUMBERS = 25  # classes


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Returns a picture of a confusion matrix [K, K] (rows truth, columns prediction), in percent of each row."""
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    with_numbers = len(class_names) <= MAX_CELLS_WITH_NUMBERS
    cells = max(4, (0.45 if with_numbers else 0.16) * len(class_names))  # inches; larger than a line of the names
    margin = 0.5 + 0.075 * max(map(len, class_names))  # inches
    side = cells + margin + 0.5
    figure, canvas = _canvas(side, side)
    labels = {"title": "share of the pixels of each true class, in %", "xlabel": "prediction", "ylabel": "truth"}
    axes = figure.add_axes((margin / side, margin / side, cells / side, cells / side), **labels)
    axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    places = range(len(class_names))
    names = [_without_formulas(legible(name, k)) for k, name in enumerate(class_names)]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    for (i, j), share in np.ndenumerate(shares) if with_numbers else ():
        axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 0.5 else "black")
    return _picture(canvas)


def learning_curves(lines: Sequence[Mapping[str, Any]], best_metric: str) -> Image.Image:
    """Returns a picture of the losses, the learning rate, mean IoU and the metric that selects the best checkpoint, by step.

    In the lines of metrics.jsonl, the metrics of classes have names like "iou/road" (see `logs.numbers_in`).
    """
    curves = dict.fromkeys((line["kind"], name) for line in lines for name in line)
    chosen = {
        "loss": [curve for curve in curves if curve[0] == "train" and curve[1].endswith(("loss", *LOSSES))],
        "learning rate": [curve for curve in curves if curve == ("train", "learning_rate")],
        "metrics": [curve for curve in curves if curve[1] in ("mean_iou", best_metric)],
    }
    figure, canvas = _canvas(8, 9)
    figure.subplots_adjust(0.11, 0.06, 0.98, 0.98, hspace=0.08)  # faster than a layout that fits
    for axes, (title, of_panel) in zip(figure.subplots(len(chosen), sharex=True), chosen.items(), strict=True):
        for kind, name in of_panel:
            points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
            label, marker = _without_formulas(f"{kind}: {name}"), "o" if kind == "eval" else ""
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if of_panel:
            axes.legend(fontsize=8)
    axes.set_xlabel("step")
    return _picture(canvas)


def ablation(tables: Mapping[str, Sequence[tuple[str, float | None, Sequence[float]]]]) -> Image.Image:
    """Returns a picture of published scores beside measured ones, with the rank of each row.

    A row is (name, published score or None, one measured score for each run), in percent; rows are given by the name of their
    table, or the path of its file. Measured ones are points; their mean and standard deviation (that of the sample) is a bar.
    """
    heights = [1.2 + 0.35 * len(rows) for rows in tables.values()]
    figure, canvas = _canvas(9, sum(heights))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(tables), 2, squeeze=False, sharey="row", height_ratios=heights)
    for (table, rows), (left, right) in zip(tables.items(), panels, strict=True):
        means = [np.mean(scores) if scores else None for _, _, scores in rows]
        for axes, title, values in ((left, "published", [row[1] for row in rows]), (right, "measured", means)):
            points = {y: value for y, value in enumerate(values) if value is not None}
            axes.set_title(f"{_without_formulas(pathlib.PurePath(table).stem)}: {title} mIoU, %, and rank", fontsize=9)
            axes.plot(points.values(), points.keys(), "o", color="tab:blue")
            for y, value in points.items():
                rank = 1 + sum(other > value for other in points.values())
                axes.annotate(f" {rank}.", (value, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
            axes.margins(0.15)
            axes.grid(alpha=0.3)
        for y, (_, _, scores) in enumerate(rows):
            right.plot(scores, [y] * len(scores), "|", color="tab:gray")
            if len(scores) > 1:
                right.errorbar(means[y], y, xerr=np.std(scores, ddof=1), color="tab:blue", capsize=3)
        left.set_yticks(range(len(rows)), [_without_formulas(row[0]) for row in rows], fontsize=8)
        left.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, also those without a score
    return _picture(canvas)


def class_frequencies(pixels: np.ndarray, info: DatasetInfo) -> Image.Image:
    """Returns a bar chart of each class's share of the labeled pixels int[K], on a logarithmic axis, most frequent first."""
    order = np.argsort(-pixels, kind="stable")
    shares = pixels[order] / max(1, pixels.sum())
    figure, canvas = _canvas(8, 1 + 0.2 * len(order))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    rank = np.arange(len(order))
    axes.barh(rank, shares, color=[np.array(info.colors[k]) / 255 for k in order], edgecolor="black", linewidth=0.5)
    names = [
        _without_formulas(f"{legible(info.class_names[k], k)}  {share:.3%}") for k, share in zip(order, shares, strict=True)
    ]
    axes.set_yticks(rank, names, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("share of the labeled pixels")
    return _picture(canvas)


def legible(name: str, index: int) -> str:
    """Returns a class name, with its index in front if it has characters, such as Chinese ones, that the font may lack."""
    return f"{index} {name}" if max(name) >= "\u2e80" else name


def _without_formulas(text: str) -> str:
    return text.replace("$", r"\$")


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure, whose size is given in inches, and its canvas, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, FigureCanvasAgg(figure)


def _picture(canvas: Any) -> Image.Image:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
