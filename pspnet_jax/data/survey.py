"""Statistics of a split: wrong examples, image sizes and class frequencies."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.markup import escape
from rich.table import Column, Table

from pspnet_jax import datasets
from pspnet_jax.data import checks, label_values, layouts, screening, stamps
from pspnet_jax.data.cache import Read
from pspnet_jax.data.palettes import Palettes, ValueColors
from pspnet_jax.data.sources import Source, open_source, training_parts
from pspnet_jax.data.totals import Totals
from pspnet_jax.errors import UserError
from pspnet_jax.large_files import strips
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
THREADS = 8
MAX_SIDE = 4096  # pixels of an example in a picture; of larger ones, every n-th row and column
SAMPLES = 16  # examples of a custom source whose labels are checked before training
VERSION = 1  # of counting; cached tables of another version are not used


@dataclasses.dataclass(frozen=True)
class Survey:
    """Statistics of a split.

    Attributes:
      split: its name.
      source: its examples.
      usable: indices of the usable examples.
      sizes: number of usable examples of each (height, width).
      pixels: int64[K], number of pixels of each class.
      ignored: number of ignored pixels.
      present: int64[K], number of images that contain each class.
      palette: the colors of the label values, see `Palettes.seen`.
      problems: one sentence for each example that cannot be used, and for each problem of the whole split.
      moments: float64[3, C], number of pixels, their sum and the sum of their squares, for each channel; 0 if not measured.
    """

    split: str
    source: Source
    usable: Sequence[int]
    sizes: Mapping[tuple[int, ...], int]
    pixels: np.ndarray
    ignored: int
    present: np.ndarray
    palette: ValueColors
    problems: list[str]
    moments: np.ndarray

    def __str__(self) -> str:
        if not self.usable:
            return f"{self.split}: no image can be used"
        sides = [f"{width}x{height}" for height, width in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        sizes = ", ".join(sides) if len(sides) < 4 else f"{sides[0]} to {sides[-1]}"
        share = self.ignored / (self.ignored + self.pixels.sum())
        return f"{self.split}: {len(self.usable):,} images of {sizes}; {share:.2%} of the pixels are ignored"

    def table(self, info: datasets.DatasetInfo) -> Table:
        """Returns a rich table with a row for each class."""
        figures = (Column(name, justify="right") for name in ("share of pixels", "images"))
        table = Table(Column("class", overflow="fold"), *figures)
        for name, pixels, images in zip(info.class_names, self.pixels, self.present, strict=True):
            table.add_row(escape(name), f"{pixels / max(1, self.pixels.sum()):.3%}", f"{images:,}")
        return table


def survey(dataset: ConfigDict, split: str, num_classes: int, channels: int = 3, measure: bool = False) -> Survey:
    """Checks and loads every example of a split once, as training does, and counts its label values.

    Args:
      dataset: config.dataset; its on_error is ignored, as wrong files are always listed.
      split: see `open_source`.
      num_classes: K.
      channels: C of the images.
      measure: whether to compute `Survey.moments`.

    Raises:
      UserError: the split cannot be opened.
    """
    dataset = dataset.copy_and_resolve_references()
    dataset.on_error = "stop"
    source, names = open_source(dataset, split, False, channels), datasets.describe(dataset).class_names
    palettes, turned, outlines = Palettes(datasets.file_colors(dataset), num_classes), [], set[bool | None]()

    def inspect(index: int) -> tuple[tuple[int, ...], np.ndarray, checks.CheckedPair | None, np.ndarray | int] | str:
        try:
            checked = source.check(index)
            image, label = source.read(index)
        except UserError as error:
            return str(error)
        return label.shape, checks.histogram(label), checked, _moments(image) if measure else 0

    sizes: collections.Counter[tuple[int, ...]] = collections.Counter()
    usable, problems, total, present = [], [], np.zeros(256, np.int64), np.zeros(256, np.int64)
    moments = np.zeros((3, channels))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, progress(f"checking {split}", len(source)) as advance:
        for index, found in enumerate(pool.map(inspect, range(len(source)))):
            advance(1)
            if isinstance(found, str):
                problems.append(found)
                continue
            shape, counts, checked, measured = found
            usable.append(index)
            sizes[shape] += 1
            total, present, moments = total + counts, present + (counts > 0), moments + measured
            if checked:
                image, label = source.files(index)
                outlines.add(checked.outlines)
                palettes.add(label, counts, checked.palette)
                turned += [image] if checked.orientation != 1 else []
    name = dataset.tfds_name.removeprefix("pspnet_") if dataset.name == "tfds" else dataset.name
    totals = Totals(split, len(usable), len(source), total)
    train = split == dataset.train_split and not dataset.mixture
    shift = screening.shift_problem(split, names) if outlines - {None} == {True} else None
    count = layouts.count_problem(name, split, len(source))
    problems += filter(None, (count, palettes.contradiction, shift, totals.problem(names, train)))
    screening.warn(totals, names, turned, palettes.remarks)
    pixels, ignored, present = total[:num_classes], int(total[255]), present[:num_classes]
    seen = {} if dataset.label_map else palettes.seen  # as in `screening`
    return Survey(split, source, usable, sizes, pixels, ignored, present, seen, problems, moments)


def _moments(image: np.ndarray) -> np.ndarray:
    """Returns float64[3, C]: the number of pixels of [H, W, C], their sum and the sum of their squares; row by row."""
    rows = (row.astype(np.float64) for strip in strips(image) for row in strip)
    return np.sum([(np.full(row.shape[1], len(row)), row.sum(0), (row * row).sum(0)) for row in rows], 0)


def samples(found: Survey, count: int) -> list[dict[str, Any]]:
    """Returns up to `count` usable examples as `pictured` does, evenly spaced over the split."""
    return pictured(found.source, label_values.sample(found.usable, count))


def pictured(source: Source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns examples for a picture, reduced if they are large: image [H,W,C], label uint8[H,W] and name."""
    return [dict(zip(("image", "label"), map(_reduced, source.read(i)), strict=True), name=source.names[i]) for i in indices]


def _reduced(array: np.ndarray) -> np.ndarray:
    """Returns every n-th row and column of an array [H,W,...] that is too large for a picture."""
    step = max(1, max(array.shape[:2]) // MAX_SIDE)
    rows = (row for strip in strips(array) for row in strip)
    return np.stack([row[::step] for row in itertools.islice(rows, 0, None, step)])


def sample_totals(source: Source, read: Read) -> Totals:
    """Counts the label values of a few evenly spaced examples. Unreadable ones are skipped; training will report them."""
    labels, values = 0, np.zeros(256, np.int64)
    for index in label_values.sample(range(len(source)), SAMPLES):
        with contextlib.suppress(Exception):
            values += checks.histogram(read(index)[1])
            labels += 1
    return Totals(f"{source.names[0]} to {source.names[-1]}", labels, len(source), values)


class ClassPixels(NamedTuple):
    """Pixel counts of the training data, for two inverse frequencies: pixels.sum() / pixels and labeled / pixels.

    Attributes:
      pixels: int64[K], number of pixels of each class.
      labeled: int64[K], number of labeled pixels in the images that contain the class; pixels / labeled is the frequency
        that median-frequency balancing uses.
    """

    pixels: np.ndarray
    labeled: np.ndarray


def class_pixels(config: ConfigDict, sources: Sequence[Source]) -> ClassPixels:
    """Counts the classes of the training data, given its opened `training_parts`, each image once.

    Raises:
      UserError: a label is wrong.
    """
    parts = zip(training_parts(config.dataset), sources, strict=True)
    counts = np.concatenate([class_counts(source, dataset, source.read) for (dataset, _), source in parts])
    return ClassPixels(counts.sum(axis=0), counts.sum(axis=1) @ (counts > 0))


def class_counts(source: Source, dataset: ConfigDict, read: Read) -> np.ndarray:
    """Returns int64[N,K]: the number of pixels of each class in each of the source's N labels.

    dataset.cache_dir keeps the counts until a name or a file changes; `read` is `source.read`, possibly cached.
    """
    shape = len(source), source.num_classes

    def count() -> bytes:
        logger.info(f"counting the classes in {len(source)} labels of {dataset.name}; the counts are cached")
        table = np.zeros(shape, np.int32)
        with progress("classes", len(source)) as advance, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            labels = pool.map(lambda index: checks.histogram(read(index)[1])[: shape[1]], range(len(source)))
            for row, counts in zip(table, labels, strict=True):
                row[:] = counts
                advance(1)
        return table.tobytes()

    files = sorted({file for index in range(len(source)) for file in source.files(index)})
    depends = (VERSION, dataset.name, dataset.root, dataset.tfds_name, shape, list(source.names), source.reading)
    kept = stamps.compute_once(dataset.cache_dir, "classes", files, depends, count)
    return np.frombuffer(kept, np.int32).reshape(shape).astype(np.int64)
