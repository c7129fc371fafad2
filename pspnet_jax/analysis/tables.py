"""The tables of a report as CSV files."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def write(document: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes the tables of a document; classes and images are given by name, intervals in columns NAME_low and NAME_high.

    A table without rows is left out.
    """
    names = [entry["name"] for entry in document["dataset"]["classes"]]
    images = [{name: entry[name] for name in entry if not isinstance(entry[name], list | dict)} for entry in document["images"]]
    files = [entry["name"] for entry in images]
    lists = {name: document[name] for name in ("confusions", "confusion_pairs", "mismatched")}
    lists |= {name: document["inconspicuous"][name] for name in ("by_size", "by_thickness", "missed")}
    tables = {
        "summary": _named("score", document["summary"]),
        "classes": _rows("class", names, document["classes"]),
        "confusion_matrix": _rows(
            "truth / prediction", names, [dict(zip(names, row, strict=True)) for row in document["confusion_matrix"]]
        ),
        **{name: [_by_name(row, names, files) for row in rows] for name, rows in lists.items()},
        "boundary": _boundary(document["boundary"], names),
        "calibration": document["calibration"]["bins"],
        "images": images,
        **document["curves"],
    }
    if against := document["against"]:
        tables["against_summary"] = _named("score", against["summary"])
        tables["against_classes"] = _rows("class", names, against["classes"])
        tables["against_images"] = _rows("name", files, against["images"])
    folder.mkdir()
    for name, rows in tables.items():
        if rows:
            _write(folder / f"{name}.csv", rows)


def _boundary(boundary: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each distance."""
    scores = {name: boundary[name] for name in ("mean_iou", "pixel_accuracy", "interior_mean_iou")}
    columns = {"distance": boundary["distances"], **scores}
    columns |= {f"iou/{name}": values for name, values in zip(names, boundary["classes"], strict=True)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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


def _by_name(row: Mapping[str, Any], names: Sequence[str], images: Sequence[str]) -> dict[str, Any]:
    """Returns a row in which indices of classes and images are names, and lists have semicolons between their values."""
    known = dict.fromkeys(("class", "classes", "truth", "predicted", "beside"), names)
    known |= dict.fromkeys(("image", "images"), images)
    found: dict[str, Any] = {}
    for column, value in row.items():
        values = value if isinstance(value, list) else [value]
        if column in known and value is not None:
            values = [known[column][index] for index in values]
        found[column] = ";".join(map(str, values)) if isinstance(value, list) else values[0]
    return found


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, whose columns may differ."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
