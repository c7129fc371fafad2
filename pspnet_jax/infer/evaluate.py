"""Scores a network on a split: one confusion matrix over all images, and a report that includes the settings."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from pspnet_jax import parallel
from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.infer.draw import side_by_side
from pspnet_jax.infer.plan import ceil_div
from pspnet_jax.infer.predictor import Example, Predictor
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.metrics import confusion_matrix, summarize
from pspnet_jax.progress import progress
from pspnet_jax.report import Report

Observe = Callable[[Example, np.ndarray, np.ndarray], None]  # example, prediction uint8[H, W], its confidence f32[H, W]


def evaluate(
    segmenter: Segmenter,
    examples: Iterable[Example],
    num_examples: int,
    split: str,
    pictures: int = 0,
    observe: Observe | None = None,
) -> tuple[Report, dict[str, Image.Image]]:
    """Scores a split. With several processes, each passes its share of the examples and gets the report on the whole split.

    Args:
      segmenter: predicts on devices of this process.
      examples: this process's share, each with image [H, W, C], label uint8[H, W] (255 is ignored) and name.
      num_examples: total over all processes.
      split: its name, for the report.
      pictures: number of examples to return as pictures (image, label and prediction side by side), keyed by name.
      observe: called with every example of this process, which has its number in the share; its prediction; and the
        probability of the predicted class at each pixel. The arrays are read-only.

    Raises:
      UserError: the number of examples is 0 or not `num_examples`; an example lacks a field; a label has the wrong size, type
        or values; the network's scores are not finite; or no pixel of the split is labeled.
    """
    if num_examples < 1:
        raise UserError(f"split {split!r} has no images to score")
    began, predictor, info = time.perf_counter(), segmenter.predictor, segmenter.info
    share = ceil_div(num_examples - jax.process_index(), jax.process_count())
    chosen = {round(i) for i in np.linspace(0, share - 1, pictures)}
    before = predictor.windows, predictor.slots
    panels: dict[str, Image.Image] = {}
    total = np.zeros((info.num_classes, info.num_classes), np.int64)
    images, pending = 0, list[tuple[Sequence[Example], tuple[jax.Array, jax.Array], list[jax.Array]]]()
    with parallel.fail_together("evaluating"), progress(f"evaluating {split}", share) as advance:
        checked = _checked(examples, info.num_classes)
        for group, labels, confidence in predictor.stream(segmenter.variables, checked):
            counts = _count(_stack_labels(group, labels.shape), labels, info.num_classes)
            pending.append((group, counts, [labels, confidence] if observe else []))
            for i, example in enumerate(group):
                if example["number"] in chosen:
                    panels[example["name"]] = _panel(example, np.asarray(labels)[i], info)
            images += len(group)
            if len(pending) > 1:  # fetched one group late, so that the devices always have work queued
                total += _fetch(*pending.pop(0), predictor, observe)
            advance(len(group))
        for last in pending:
            total += _fetch(*last, predictor, observe)
    slots = parallel.max_over_processes(predictor.slots - before[1]) * jax.process_count()  # the last one keeps all waiting
    total, images, windows = _sum_over_processes(total, images, predictor.windows - before[0])
    if images != num_examples:
        raise UserError(f"split {split!r}: got {images} images, but expected {num_examples}; each must be scored exactly once")
    if not total.any():
        raise UserError(
            f"split {split!r}: all pixels of its {images} images are labeled {IGNORE} (ignored), so it cannot be scored; "
            "use a split with labels, or --mode predict to see the network's predictions"
        )
    rate = images / (time.perf_counter() - began)
    protocol = {"split": split, **predictor.description}
    return Report(summarize(total), total, images, info, protocol, predictor.device, rate, windows / slots), panels


def _panel(example: Example, prediction: np.ndarray, info: DatasetInfo) -> Image.Image:
    """Draws the image, its label and the prediction uint8[S, T], of which only the label's size counts."""
    height, width = example["label"].shape
    labels = {"ground truth": example["label"], "prediction": prediction[:height, :width]}
    return side_by_side(example["image"], labels, info)


def _checked(examples: Iterable[Example], num_classes: int) -> Iterator[Example]:
    """Yields the examples with their numbers, after checking their fields and labels."""
    for number, example in enumerate(examples):
        if missing := [field for field in ("image", "label", "name") if field not in example]:
            raise UserError(f"an example has {', '.join(example)}, but no {' and no '.join(missing)}")
        name, label, shape = example["name"], example["label"], example["image"].shape[:2]
        if label.shape != shape:
            raise UserError(f"{name}: the label's size is {label.shape}, but the image's is {shape}")
        if label.dtype != np.uint8 or ((label >= num_classes) & (label != IGNORE)).any():
            found = (
                f"values up to {label[label != IGNORE].max(initial=0)}" if label.dtype == np.uint8 else f"type {label.dtype}"
            )
            raise UserError(f"{name}: the label has {found}; expected uint8 values from 0 to {num_classes - 1}, or {IGNORE}")
        yield {**example, "number": number}


def _stack_labels(group: Sequence[Example], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the labels in one array of the predictions' shape, padded with 255."""
    truth = np.full(shape, IGNORE, np.uint8)
    for row, example in zip(truth, group, strict=False):
        height, width = example["label"].shape
        row[:height, :width] = example["label"]
    return truth


@jax.jit(static_argnums=2)
def _count(truth: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns the confusion matrix and, for each image, whether any labeled pixel has no predicted class."""
    unpredicted = (labels == IGNORE) & (truth != IGNORE)
    return confusion_matrix(truth, jax.numpy.where(unpredicted, 0, labels), num_classes), unpredicted.any((1, 2))


def _fetch(
    group: Sequence[Example],
    counts: tuple[jax.Array, jax.Array],
    predicted: Sequence[jax.Array],
    predictor: Predictor,
    observe: Observe | None,
) -> np.ndarray:
    """Waits for a group's confusion matrix and returns it, after its examples were observed with what was predicted."""
    with predictor.explain_out_of_memory([example["image"] for example in group]):
        matrix, unpredicted = map(np.asarray, counts)
    for example, any_unpredicted in zip(group, unpredicted, strict=False):
        if any_unpredicted:
            raise UserError(
                f"{example['name']}: the network's scores are not finite (NaN), so the image cannot be evaluated; "
                "the weights may be damaged, or training may have diverged"
            )
    if observe:
        for example, *arrays in zip(group, *map(np.asarray, predicted), strict=False):
            height, width = example["label"].shape
            observe(example, *(array[:height, :width] for array in arrays))
    return matrix


def _sum_over_processes(total: np.ndarray, *numbers: int) -> tuple[Any, ...]:
    """Returns the matrix and the numbers, summed over all processes."""
    if jax.process_count() == 1:
        return total, *numbers
    counts = np.append(total, numbers)
    halves = multihost_utils.process_allgather(counts.view(np.uint32))  # JAX would truncate int64 to 32 bits
    counts = np.ascontiguousarray(halves).view(np.int64).reshape(-1, counts.size).sum(0)
    return counts[: total.size].reshape(total.shape), *map(int, counts[total.size :])
