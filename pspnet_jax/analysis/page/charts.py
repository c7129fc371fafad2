"""The charts of a report, as plotly figures; assets/charts.js adds what depends on the light or dark theme."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pspnet_jax.analysis.page import filters
from pspnet_jax.losses import LOSSES

BLUE, ORANGE, GRAY = "#3f83c8", "#d9782d", "#7d8894"  # their contrast with white and with near-black is 3 or more
# Most shares in a confusion matrix are a few percent, so these get half of the range.
SHADES = [[0, "rgba(63,131,200,0)"], [0.01, "rgba(63,131,200,0.2)"], [0.1, "rgba(63,131,200,0.55)"], [1, "rgb(63,131,200)"]]
DIAGONAL = {"x": [0, 100], "y": [0, 100], "mode": "lines", "line": {"color": GRAY, "dash": "dash"}}
ROW = 20  # height of a class, in pixels
MAX_SQUARE = 720  # side of the confusion matrix, in pixels
MAX_TICKS = 40  # classes whose names all fit
METRICS = {"mean_iou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}


def all_of(document: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Returns the charts of a report by name, without those that have no data."""
    names = [html.escape(one["name"], quote=False) for one in document["dataset"]["classes"]]  # plotly reads tags
    small = document["inconspicuous"]
    charts = {
        "class_scores": intervals(names, [one["iou"] for one in document["classes"]], "IoU, %"),
        "loss": curves(document["curves"]["training"], lambda name: name.endswith(("loss", *LOSSES)), "loss"),
        "metrics": curves(document["curves"]["evaluations"], METRICS.__contains__, "%", scale=100),
        "confusion_matrix": confusion_matrix(names, document["confusion_matrix"]),
        "by_size": recalls(small["by_size"], "size of the component, in pixels"),
        "by_thickness": recalls(small["by_thickness"], "thickness of the component, in pixels"),
        "boundary": boundary(document["boundary"]),
        "calibration": calibration(document["calibration"]["bins"]),
    }
    if against := document["against"]:
        changes = [one["iou"] for one in against["classes"]]
        significant = [one["p"] is not None and one["p"] < 0.05 for one in changes]
        charts["class_differences"] = intervals(
            names, [one["difference"] for one in changes], "difference, points", significant
        )
        charts["image_differences"] = image_differences(document)
        charts["histogram"] = histogram([one["difference"] for one in against["images"]])
    return {name: chart for name, chart in charts.items() if chart.data}


def intervals(names: Sequence[str], figures: Sequence[Any], title: str, filled: Sequence[bool] = ()) -> go.Figure:
    """Figures of classes as dots with their intervals, the highest on top; undefined ones are left out."""
    order = sorted((k for k, one in enumerate(figures) if one["value"] is not None), key=lambda k: figures[k]["value"])
    value, low, high = ([100 * (figures[k][end] or 0) for k in order] for end in ("value", "low", "high"))
    dots = go.Scatter(
        x=value,
        y=[*range(len(order))],
        error_x={
            "array": [b - x for x, b in zip(value, high, strict=True)],
            "arrayminus": [x - a for x, a in zip(value, low, strict=True)],
            "thickness": 1.5,
            "width": 0,
        },
        mode="markers",
        marker={"size": 8, "color": BLUE, "symbol": ["circle-open" if filled and not filled[k] else "circle" for k in order]},
        customdata=order,
        text=[f"{names[k]}: {x:.1f} ({a:.1f} to {b:.1f})" for k, x, a, b in zip(order, value, low, high, strict=True)],
        hoverinfo="text",
    )
    axis = {"tickvals": [*range(len(order))], "ticktext": [names[k] for k in order], "range": [-0.7, len(order) - 0.3]}
    height, margin = ROW * len(order) + 70, {"b": 12}
    return _figure(dots if order else [], title, height=height, xaxis={"side": "top"}, yaxis=axis, margin=margin)


def curves(points: Sequence[Mapping[str, Any]], chosen: Callable[[str], bool], title: str, scale: float = 1) -> go.Figure:
    """The chosen values of the points, each as a line over the step."""
    lines = []
    for name in dict.fromkeys(name for point in points for name in point if chosen(name)):
        there = [point for point in points if point.get(name) is not None]
        steps, values = [point["step"] for point in there], [scale * point[name] for point in there]
        mode = "lines+markers" if len(there) < 30 else "lines"
        lines.append(go.Scatter(x=steps, y=values, name=METRICS.get(name, name.replace("_", " ")), mode=mode))
    return _figure(lines, "step", title)


def confusion_matrix(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> go.Figure:
    """Shares of the pixels of each true class, in percent; shares of 0 are blank."""
    sums = [sum(row) for row in matrix]
    shares = [[100 * pixels / total if pixels else None for pixels in row] for row, total in zip(matrix, sums, strict=True)]
    heat = go.Heatmap(
        z=shares,
        zmin=0,
        zmax=100,
        colorscale=SHADES,
        customdata=matrix,
        x=names,
        y=names,
        hovertemplate="%{y} as %{x}: %{z:.2f}%, %{customdata:,} pixels<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "ticksuffix": "%"},
    )
    axis = {"type": "category", "dtick": 1 if len(names) <= MAX_TICKS else None, "showgrid": False}
    side = min(MAX_SQUARE, 260 + 2 * ROW * len(names))
    across, down = axis | {"tickangle": -90 if len(names) > 8 else None}, axis | {"autorange": "reversed"}
    return _figure(heat, "prediction", "truth", side, xaxis=across, yaxis=down)


def recalls(bins: Sequence[Mapping[str, Any]], title: str) -> go.Figure:
    """Recall of pixels and share of components found, of all classes, for each range of sizes."""
    shown = [one for one in bins if one["class"] is None]
    labels = [filters.sizes(one) for one in shown]
    number = [f"{one['components']:,} components" for one in shown]
    bars = [
        go.Bar(x=labels, y=[100 * one[key] for one in shown], name=name, marker_color=color, hovertext=number)
        for key, name, color in (("recall", "recall of pixels", BLUE), ("found", "components found", ORANGE))
    ]
    return _figure(bars if shown else [], title, "%").update_xaxes(type="category").update_yaxes(range=[0, 100])


def boundary(scores: Mapping[str, Any]) -> go.Figure:
    """Mean IoU and pixel accuracy of the pixels within each distance of a border, and mean IoU of those farther away."""
    shown = [
        ("mean_iou", "mean IoU", {"color": BLUE}),
        ("interior_mean_iou", "mean IoU, farther away", {"color": BLUE, "dash": "dash"}),
        ("pixel_accuracy", "pixel accuracy", {"color": ORANGE}),
    ]
    lines = [
        go.Scatter(x=scores["distances"], y=_percents(scores[key]), name=name, mode="lines+markers", line=line)
        for key, name, line in shown
    ]
    known = any(value is not None for value in scores["pixel_accuracy"])
    return _figure(lines if known else [], "distance from the border, in pixels", "%")


def calibration(bins: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The reliability diagram: accuracy over confidence, beside the diagonal of a perfectly calibrated network."""
    filled = [one for one in bins if one["pixels"]]
    bars = go.Bar(
        x=[50 * (one["low"] + one["high"]) for one in filled],
        y=_percents([one["accuracy"] for one in filled]),
        width=[95 * (one["high"] - one["low"]) for one in filled],
        name="accuracy",
        marker_color=BLUE,
        hovertext=[f"confidence {filters.levels(one)}: {one['pixels']:,} pixels" for one in filled],
    )
    diagonal = go.Scatter(DIAGONAL, name="perfectly calibrated")
    chart = _figure([bars, diagonal] if filled else [], "confidence, %", "accuracy, %", 360)
    return chart.update_xaxes(range=[0, 100]).update_yaxes(range=[0, 100])


def image_differences(document: Mapping[str, Any]) -> go.Figure:
    """Mean IoU of each image in this run over that in the other one; images above the diagonal got better."""
    pairs = [
        (100 * other["mean_iou"], 100 * image["mean_iou"], index)
        for index, (image, other) in enumerate(zip(document["images"], document["against"]["images"], strict=True))
        if None not in (image["mean_iou"], other["mean_iou"])
    ]
    other, this, indices = zip(*pairs, strict=True) if pairs else ((), (), ())
    titles = [html.escape(text, quote=False) for text in (document["against"]["title"], document["title"])]
    dots = go.Scatter(
        x=other,
        y=this,
        mode="markers",
        marker={"size": 6, "color": BLUE, "opacity": 0.6},
        customdata=indices,
        text=[html.escape(document["images"][index]["name"], quote=False) for index in indices],
        showlegend=False,
    )
    diagonal = go.Scatter(DIAGONAL, hoverinfo="skip", showlegend=False)
    return _figure([diagonal, dots] if pairs else [], f"mean IoU of {titles[0]}, %", f"mean IoU of {titles[1]}, %", 420)


def histogram(differences: Sequence[float | None]) -> go.Figure:
    """How many images changed by how much, in percentage points."""
    found = [one for one in _percents(differences) if one is not None]
    bars = go.Histogram(x=found, nbinsx=40, marker_color=BLUE)
    return _figure(bars if found else [], "difference of mean IoU, points", "images", 420)


def _percents(fractions: Sequence[float | None]) -> list[float | None]:
    return [None if one is None else 100 * one for one in fractions]


def _figure(data: Any, x: str, y: str = "", height: int = 300, **layout: Any) -> go.Figure:
    chart = go.Figure(data, layout={"template": "none", "height": height, "dragmode": False} | layout)
    return chart.update_layout(xaxis_title=x, yaxis_title=y or None)
