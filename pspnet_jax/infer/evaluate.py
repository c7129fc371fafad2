"""Scores a network on a split: every image once, one confusion matrix, a report that says how it was made."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image
from rich.table import Column, Table

from pspnet_jax import files
from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.infer.draw import side_by_side
from pspnet_jax.infer.metrics import Metrics, confusion_matrix, summarize
from pspnet_jax.infer.windows import Example, Predictor
from pspnet_jax.progress import progress


@dataclasses.dataclass(frozen=True)
class Report:
    """A score and what makes it comparable.

    Attributes:
      metrics: of the whole split.
      pixels: int64[K], labeled pixels of each class.
      images: number of images scored.
      info: the classes.
      protocol: split, protocol, inference, crop, stride, base_size, short_size, scales, flip.
      device: number and kind of the devices.
      images_per_second: over all, compilation included.
      pictures: image, truth and prediction side by side, by name of the example.
    """

    metrics: Metrics
    pixels: np.ndarray
    images: int
    info: DatasetInfo
    protocol: dict[str, Any]
    device: str
    images_per_second: float
    pictures: dict[str, Image.Image]

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
            "images": self.images,
            **self.protocol,
            "device": self.device,
            "images_per_second": self.images_per_second,
            "classes": [
                {"name": name, "iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": int(pixels)}
                for name, iou, accuracy, pixels in zip(*columns, strict=True)
            ],
        }

    def write(self, path: epath.PathLike) -> None:
        """Writes `to_json` to a file."""
        with files.atomic(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def evaluate(
    predictor: Predictor,
    variables: Any,
    examples: Iterable[Example],
    info: DatasetInfo,
    num_examples: int,
    split: str,
    pictures: int = 0,
) -> Report:
    """Scores a split; with several processes each gives its share of the examples, and all get the whole report.

    Args:
      predictor: for the classes of `info`, on devices of this process.
      variables: weights, see `Predictor.place`.
      examples: this process's: image uint8[H, W, 3], label uint8[H, W] with 255 for pixels that do not count, name.
      info: the classes.
      num_examples: of all processes.
      split: named in the report.
      pictures: number of examples, spread over this process's, to picture.

    Raises:
      ValueError: no pixel of the split has a label.
    """
    began = time.perf_counter()
    variables = predictor.place(variables)
    share = -(-(num_examples - jax.process_index()) // jax.process_count())
    chosen = {round(i) for i in np.linspace(0, share - 1, pictures)}
    drawn: dict[str, Image.Image] = {}
    total = np.zeros((info.num_classes, info.num_classes), np.int64)
    images, newest = 0, None
    with progress(f"evaluating {split}", share) as advance:
        for group, labels in predictor.stream(variables, examples):
            before, newest = newest, _count(_truth(group, labels.shape), labels, info.num_classes)
            for i, example in enumerate(group):
                if images + i in chosen:
                    height, width = example["label"].shape
                    prediction = np.asarray(labels)[i, :height, :width]
                    drawn[example["name"]] = side_by_side(example["image"], example["label"], prediction, info)
            images += len(group)
            if before is not None:
                total += np.asarray(before)  # one group late, so that the devices always have the next to work on
            advance(len(group))
    if newest is not None:
        total += np.asarray(newest)
    total, images = _over_processes(total, images)
    assert images == num_examples, f"{images} images scored, but {split} has {num_examples}"
    if not total.any():
        raise ValueError(
            f"split {split!r}: all pixels of its {images} images are labeled {IGNORE} (ignored), so it cannot be scored; "
            "use a split with labels, or --mode predict to see what the network makes of its images"
        )
    rate = images / (time.perf_counter() - began)
    device = f"{predictor.num_devices * jax.process_count()} x {predictor.device_kind}"
    return Report(summarize(total), total.sum(1), images, info, {"split": split, **predictor.description}, device, rate, drawn)


_count = jax.jit(confusion_matrix, static_argnums=2)


def _truth(group: Sequence[Example], shape: tuple[int, ...]) -> np.ndarray:
    """Labels side by side in an array as large as the predictions; what is no pixel of theirs is ignored."""
    truth = np.full(shape, IGNORE, np.uint8)
    for place, example in zip(truth, group, strict=False):
        label = example["label"]
        assert label.shape == example["image"].shape[:2], (
            f"{example['name']}: label {label.shape}, image {example['image'].shape}"
        )
        place[: label.shape[0], : label.shape[1]] = label
    return truth


def _over_processes(total: np.ndarray, images: int) -> tuple[np.ndarray, int]:
    """Adds up what the processes counted."""
    if jax.process_count() == 1:
        return total, images
    counts = np.append(total, images)
    halves = multihost_utils.process_allgather(counts.view(np.uint32))  # JAX would cut int64 to its lower half
    counts = np.ascontiguousarray(halves).view(np.int64).reshape(-1, counts.size).sum(0)
    return counts[:-1].reshape(total.shape), int(counts[-1])


def _windows(protocol: dict[str, Any]) -> str:
    if protocol["inference"] == "whole":
        return "whole images"
    stride = " stride {}x{}".format(*protocol["stride"]) if any(protocol["stride"]) else ""
    return "windows {}x{}".format(*protocol["crop"]) + stride


def _or_none(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)
