"""A score and how it was made: what makes two numbers comparable is printed, saved and named with them."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
from etils import epath
from rich.table import Column, Table

from pspnet_jax import files
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Report:
    """A score and what makes it comparable."""

    metrics: Metrics  # of the whole split
    pixels: np.ndarray  # int64[K], labeled pixels of each class
    images: int  # number of images scored
    info: DatasetInfo  # the classes
    protocol: dict[str, Any]  # split, protocol, inference, crop, stride, base_size, short_size, scales, flip
    device: str  # number and kind of the devices
    images_per_second: float  # over all, compilation included

    def __str__(self) -> str:
        """`mIoU 41.68%  mean accuracy 50.90%  pixel accuracy 80.04%`, and the protocol on a second line."""
        metrics, protocol = self.metrics, self.protocol
        size = f"long side {protocol['base_size']}" if protocol["base_size"] else "own size"
        size += f", short side at most {protocol['short_size']}" if protocol["short_size"] else ""
        scales = ", ".join(map(str, protocol["scales"]))
        return (
            f"mIoU {metrics.mean_iou:.2%}  mean accuracy {metrics.mean_accuracy:.2%}  "
            f"pixel accuracy {metrics.pixel_accuracy:.2%}\n"
            f"{self.images} images of {protocol['split']}, {_windows(protocol)}, {size}, scales {scales}, "
            f"flip {'on' if protocol['flip'] else 'off'}, protocol {protocol['protocol']}; "
            f"{self.images_per_second:.2f} images/s on {self.device}"
        )

    def table(self) -> Table:
        """A line for each class, for rich to print."""
        table = Table(Column("class"), *(Column(name, justify="right") for name in ("IoU", "accuracy", "share of pixels")))
        shares = self.pixels / self.pixels.sum()
        for name, *fractions in zip(self.info.class_names, self.metrics.iou, self.metrics.accuracy, shares, strict=True):
            table.add_row(name, *("-" if math.isnan(fraction) else f"{fraction:.2%}" for fraction in fractions))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain values; None where there was nothing to divide by."""
        metrics = self.metrics
        columns = (self.info.class_names, metrics.iou, metrics.accuracy, self.pixels)
        return {
            "mean_iou": metrics.mean_iou,
            "mean_accuracy": metrics.mean_accuracy,
            "pixel_accuracy": metrics.pixel_accuracy,
            "dataset": self.info.name,
            "images": self.images,
            **self.protocol,
            "device": self.device,
            "images_per_second": self.images_per_second,
            "classes": [
                {"name": name, "iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": int(pixels)}
                for name, iou, accuracy, pixels in zip(*columns, strict=True)
            ],
        }

    def file_stem(self, step: int, root: str = "") -> str:
        """Returns a file name without its ending, which names all settings, so that different ones never share a file.

        As "voc2012_val_step30000_base_size512_crop473-473_flipTrue_windows_semseg_scales1.0_short_size0_stride0-0".

        Args:
          step: of the checkpoint.
          root: the dataset's directory, for those that its name does not tell apart ("folder").
        """

        def word(name: str, value: Any) -> str:
            return value if isinstance(value, str) else name + "-".join(map(str, value if isinstance(value, list) else [value]))

        settings = [word(name, value) for name, value in self.protocol.items() if name != "split"]
        words = [self.info.name, root, self.protocol["split"], f"step{step}", *settings]
        return "_".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in words if word)

    def write(self, path: epath.PathLike) -> None:
        """Writes `to_json` to a file."""
        with files.atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def _windows(protocol: dict[str, Any]) -> str:
    if protocol["inference"] == "whole":
        return "whole images"
    stride = " stride {}x{}".format(*protocol["stride"]) if any(protocol["stride"]) else ""
    return "windows {}x{}".format(*protocol["crop"]) + stride


def _or_none(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)
