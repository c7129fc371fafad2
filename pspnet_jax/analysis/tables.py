"""The tables of a report as CSV files."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def write(document: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes the tables of a document; classes and images are given by name, intervals in columns NAME_low and NAME_high."""
    names = [entry["name"] for entry in document["dataset"]["classes"]]
    images = [{name: entry[name] for name in entry if not isinstance(entry[name], list | dict)} for entry in document["images"]]
    matrix = [dict(zip(names, row, strict=True)) for row in document["confusion_matrix"]]
    boundary = document["boundary"]
    tables = {
        "summary": _named("score", document["summary"]),
        "classes": _rows("class", names, document["classes"]),
        "confusion_matrix": _rows("truth", names, matrix),
        "confusions": document["confusions"],
        "confusion_pairs": document["confusion_pairs"],
        "mismatched": document["mismatched"],
        "by_size": document["inconspicuous"]["by_size"],
        "by_thickness": document["inconspicuous"]["by_thickness"],
        "missed": document["inconspicuous"]["missed"],
        "boundary": [
            dict(zip(("distance", "mean_iou", "pixel_accuracy", "interior_mean_iou", *names), values, strict=True))
            for values in zip(
                *(boundary[name] for name in ("distances", "mean_iou", "pixel_accuracy", "interior_mean_iou")),
                *boundary["classes"],
                strict=True,
            )
        ],
        "calibration": document["calibration"]["bins"],
        "images": images,
        "training": document["curves"]["training"],
        "evaluations": document["curves"]["evaluations"],
    }
    if against := document["against"]:
        tables["against_summary"] = _named("score", against["summary"])
        tables["against_classes"] = _rows("class", names, against["classes"])
        tables["against_images"] = _rows("name", [entry["name"] for entry in images], against["images"])
    folder.mkdir()
    for name, rows in tables.items():
        _write(folder / f"{name}.csv", [_by_name(row, names, images) for row in rows])


def _named(title: str, entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each entry of a dict."""
    return _rows(title, list(entries), list(entries.values()))


def _rows(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{title: name, **_flat(row)} for name, row in zip(names, rows, strict=True)]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a row without dicts in it: those have columns of their own, a figure's value that of the figure itself."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        column = prefix.removesuffix("_") if prefix and name == "value" else f"{prefix}{name}"
        if isinstance(value, dict) and name != "pictures":
            flat |= _flat(value, f"{column}_")
        elif name != "pictures":
            flat[column] = value
    return flat


def _by_name(row: Mapping[str, Any], names: Sequence[str], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a row in which indices of classes and images are names, and lists have spaces between their values."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        if column in ("class", "truth", "predicted", "beside") and isinstance(value, int):
            value = names[value]
        elif column == "image":
            value = images[value]["name"]
        elif column == "classes":
            value, column = " / ".join(names[k] for k in value), "classes"
        elif column == "images" and isinstance(value, list):
            value = " ".join(images[i]["name"] for i in value)
        found[column] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, whose columns may differ."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
