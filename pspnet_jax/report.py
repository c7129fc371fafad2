"""Evaluation reports: scores that are printed and saved together with the settings that make them comparable."""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.table import Column, Table
from rich.text import Text

from pspnet_jax import files
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.metrics import Metrics

MAX_NAME_BYTES = 200  # of a file name, without its digest; most file systems allow 255 in total
OF_A_CLASS = {"iou": "IoU", "precision": "precision", "accuracy": "accuracy = recall", "f1": "F1 = Dice"}  # name: in words
MEANS = {"iou": "mIoU", "precision": "precision", "accuracy": "recall", "f1": "F1"}  # in the caption of the table
OF_ALL_CLASSES = ("mean_iou", "mean_accuracy", "mean_precision", "mean_f1", "pixel_accuracy")


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores and the settings that make them comparable."""

    metrics: Metrics  # of the whole split
    matrix: np.ndarray  # int64[K, K], the confusion matrix: number of pixels by truth (row) and prediction (column)
    images: int  # number of images scored
    info: DatasetInfo  # the classes
    protocol: dict[str, Any]  # split, protocol, inference, crop, stride, base_size, short_size, scales, flip
    device: str  # number and kind of the devices
    images_per_second: float  # of the whole evaluation, including compilation
    slots_used: float  # share of the slots for windows in all forward passes, on all devices, that held a window

    @property
    def pixels(self) -> np.ndarray:
        """Number of labeled pixels of each class, int64[K]."""
        return self.matrix.sum(1)

    def __str__(self) -> str:
        """`mIoU 41.68%  mean accuracy 50.90%  pixel accuracy 80.04%`, and the protocol on a second line.

        If classes are missing, the means say so, as in "mIoU 41.68% over 4 of 9 classes". Mean IoU is over the classes in the
        truth or the prediction; mean accuracy is over those in the truth.
        """
        metrics = self.metrics
        return (
            f"mIoU {metrics.mean_iou:.2%}{_over(metrics.iou)}  "
            f"mean accuracy {metrics.mean_accuracy:.2%}{_over(metrics.accuracy)}  pixel accuracy {metrics.pixel_accuracy:.2%}\n"
            f"{self.images} images of {self.protocol['split']}, {describe_protocol(self.protocol)}; "
            f"{self.images_per_second:.2f} images/s on {self.device}, "
            f"{self.slots_used:.1%} of window slots used"
        )

    def table(self) -> Table:
        """Returns a rich table with one row per class, and a last row with the means over the classes that have a value."""
        columns = (Column(name, justify="right") for name in (*OF_A_CLASS.values(), "share of pixels"))
        over = collections.defaultdict(list)
        for name, title in MEANS.items():
            over[_over(getattr(self.metrics, name))].append(title)
        means = "; ".join(f"{', '.join(titles)}{text}" for text, titles in over.items() if text)
        table = Table(Column("class", overflow="fold"), *columns, caption=means or None)
        fractions = [*(getattr(self.metrics, name) for name in OF_A_CLASS), self.pixels / self.pixels.sum()]
        for name, *row in zip(self.info.class_names, *fractions, strict=True):
            table.add_row(Text(name), *map(_percent, row))
        table.add_section()
        table.add_row("mean", *(_percent(getattr(self.metrics, f"mean_{name}")) for name in OF_A_CLASS))
        return table

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; undefined fractions of a class are None."""
        metrics = self.metrics
        columns = {name: map(or_none, getattr(metrics, name)) for name in OF_A_CLASS}
        rows = zip(self.info.class_names, *columns.values(), self.pixels.tolist(), strict=True)
        return {
            **{name: or_none(getattr(metrics, name)) for name in OF_ALL_CLASSES},
            **{f"classes_in_mean_{name}": _present(getattr(metrics, name)) for name in OF_A_CLASS},
            "dataset": self.info.name,
            "images": self.images,
            **self.protocol,
            "device": self.device,
            "images_per_second": self.images_per_second,
            "slots_used": self.slots_used,
            "classes": [dict(zip(("name", *columns, "pixels"), row, strict=True)) for row in rows],
        }

    def matrix_csv(self) -> str:
        """Returns the confusion matrix as CSV: a row for each class of the truth, a column for each that was predicted."""
        rows = zip(self.info.class_names, *self.matrix.T.tolist(), strict=True)
        csv.writer(text := io.StringIO()).writerows([("truth / prediction", *self.info.class_names), *rows])
        return text.getvalue()

    def save(self, folder: epath.PathLike, origin: Mapping[str, Any]) -> epath.Path:
        """Writes `to_json` and the origin to a file in the folder, which is created if missing, and returns its path.

        The name is like "voc2012_val_step30000_base_size512_crop473-473_flipTrue_windows_semseg_scales1.0_..._DIGEST.json",
        shortened if necessary. The digest covers everything on which the score depends. The confusion matrix is written beside
        it, to a file whose name ends in _confusion.csv. The origin is what was scored, as plain values, such as the step.

        Raises:
          UserError: the file cannot be written.
        """

        def word(name: str, value: Any) -> str:
            values = value if isinstance(value, list) else [value]
            text = value if isinstance(value, str) else name + "-".join(map(str, values))
            return re.sub(r"[^\w.]+", "-", text).strip("-")

        decisive = {"dataset": self.info.name, "split": "", **origin, **self.protocol, "classes": self.info.class_names}
        decisive |= {"images": self.images, "pixels": [int(pixels) for pixels in self.pixels]}  # labels may have changed
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
        named = {name: decisive[name] for name in ("dataset", "split", "step", *self.protocol) if name in decisive}
        words = "_".join(word(name, value) for name, value in named.items())
        shortened = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        path = epath.Path(folder) / f"{shortened}_{digest}.json"
        try:
            files.write_atomic(path, json.dumps({**self.to_json(), **origin}, indent=2) + "\n")
            files.write_atomic(path.with_name(f"{path.stem}_confusion.csv"), self.matrix_csv())
        except OSError as error:
            raise UserError(
                f"{path}: the report cannot be written ({error}); the score itself is complete and shown above"
            ) from error
        return path


def _present(fractions: np.ndarray) -> int:
    """Returns the number of classes over which a mean is taken."""
    return int(np.count_nonzero(~np.isnan(fractions)))


def _over(fractions: np.ndarray) -> str:
    """Returns the number of classes in words, unless it is all classes."""
    present = _present(fractions)
    return f" over {present} of {len(fractions)} classes" if present < len(fractions) else ""


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """Returns the settings of an evaluation, the fields of config.eval, in words."""
    size = f"long side {protocol['base_size']}" if protocol["base_size"] else "own size"
    size += f", short side at most {protocol['short_size']}" if protocol["short_size"] else ""
    scales = ", ".join(map(str, protocol["scales"]))
    flip = "on" if protocol["flip"] else "off"
    return f"{_windows(protocol)}, {size}, scales {scales}, flip {flip}, protocol {protocol['protocol']}"


def _windows(protocol: Mapping[str, Any]) -> str:
    if protocol["inference"] == "whole":
        return "whole images"
    stride = " stride {}x{}".format(*protocol["stride"]) if any(protocol["stride"]) else ""
    return "windows {}x{}".format(*protocol["crop"]) + stride


def require_metric(name: str, class_names: Sequence[str]) -> None:
    """Raises UserError, which lists the metrics and classes, unless a report has the metric, such as "iou/road"."""
    figure, _, of_class = name.partition("/")
    if name not in OF_ALL_CLASSES and not (figure in OF_A_CLASS and of_class in class_names):
        raise UserError(
            f"eval.best_metric={name!r}: expected one of {', '.join(OF_ALL_CLASSES)}, or one of a class: "
            f"{'/CLASS, '.join(OF_A_CLASS)}/CLASS (accuracy is also called recall, and F1 Dice), where CLASS is one of "
            f"{', '.join(class_names)}"
        )


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{fraction:.2%}"


def or_none(fraction: float) -> float | None:
    """Returns a fraction, or None if it is NaN, which JSON does not have."""
    return None if math.isnan(fraction) else float(fraction)
