"""Evaluation reports: scores that are printed and saved together with the settings that make them comparable."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores and the settings that make them comparable."""

    metrics: Metrics  # of the whole split
    pixels: np.ndarray  # int64[K], labeled pixels of each class
    images: int  # number of images scored
    info: DatasetInfo  # the classes
    protocol: dict[str, Any]  # split, protocol, inference, crop, stride, base_size, short_size, scales, flip
    device: str  # number and kind of the devices
    images_per_second: float  # of the whole evaluation, including compilation
    slots_used: float  # share of the slots for windows in all forward passes, on all devices, that held a window

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
        """Returns a rich table with one row per class."""
        columns = (Column(name, justify="right") for name in ("IoU", "accuracy", "share of pixels"))
        means = f"mIoU{_over(self.metrics.iou)}" if _over(self.metrics.iou) else None
        table = Table(Column("class"), *columns, caption=means)
        shares = self.pixels / self.pixels.sum()
        for name, *fractions in zip(self.info.class_names, self.metrics.iou, self.metrics.accuracy, shares, strict=True):
            table.add_row(Text(name), *("-" if math.isnan(fraction) else f"{fraction:.2%}" for fraction in fractions))
        return table

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; undefined fractions of a class are None."""
        metrics = self.metrics
        columns = (self.info.class_names, metrics.iou, metrics.accuracy, self.pixels)
        return {
            "mean_iou": metrics.mean_iou,
            "mean_accuracy": metrics.mean_accuracy,
            "pixel_accuracy": metrics.pixel_accuracy,
            "classes_in_mean_iou": _present(metrics.iou),
            "classes_in_mean_accuracy": _present(metrics.accuracy),
            "dataset": self.info.name,
            "images": self.images,
            **self.protocol,
            "device": self.device,
            "images_per_second": self.images_per_second,
            "slots_used": self.slots_used,
            "classes": [
                {"name": name, "iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": int(pixels)}
                for name, iou, accuracy, pixels in zip(*columns, strict=True)
            ],
        }

    def save(self, folder: epath.PathLike, origin: Mapping[str, Any]) -> epath.Path:
        """Writes `to_json` and the origin to a file, and returns its path.

        The name is like "voc2012_val_step30000_base_size512_crop473-473_flipTrue_windows_semseg_scales1.0_..._DIGEST.json",
        shortened if necessary. The digest covers everything on which the score depends.

        Args:
          folder: created if missing.
          origin: what was scored, as plain values: step, checkpoint, root and so on.

        Raises:
          UserError: the file cannot be written.
        """

        def word(name: str, value: Any) -> str:
            value = (
                value if isinstance(value, str) else name + "-".join(map(str, value if isinstance(value, list) else [value]))
            )
            return re.sub(r"[^\w.]+", "-", value).strip("-")

        decisive = {"dataset": self.info.name, "split": "", **origin, **self.protocol, "classes": self.info.class_names}
        decisive |= {"images": self.images, "pixels": [int(pixels) for pixels in self.pixels]}  # labels may have changed
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
        named = {name: decisive[name] for name in ("dataset", "split", "step", *self.protocol) if name in decisive}
        words = "_".join(word(name, value) for name, value in named.items())
        shortened = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        path = epath.Path(folder) / f"{shortened}_{digest}.json"
        try:
            with files.atomic(path) as temporary:
                temporary.write_text(json.dumps({**self.to_json(), **origin}, indent=2) + "\n")
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


def _or_none(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)
