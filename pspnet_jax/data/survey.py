"""Looks at every example of a split: what is wrong, which sizes there are, and how frequent the classes are."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.table import Column, Table

from pspnet_jax.data import layouts
from pspnet_jax.data.pipeline import reader
from pspnet_jax.data.sources import open_source
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.progress import progress

THREADS = 8


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found in a split.

    Attributes:
      split: its name.
      usable: indices of the examples with which nothing is wrong.
      sizes: how many of them have each (height, width).
      pixels: int64[K], of each class.
      ignored: number of pixels that do not count.
      present: int64[K], number of images that have the class.
      problems: one sentence for each example that cannot be used, and one if the number of images is not the official one.
    """

    split: str
    usable: Sequence[int]
    sizes: Mapping[tuple[int, int], int]
    pixels: np.ndarray
    ignored: int
    present: np.ndarray
    problems: list[str]

    @property
    def area(self) -> int:
        """Number of all pixels."""
        return sum(height * width * images for (height, width), images in self.sizes.items())

    def __str__(self) -> str:
        if not self.usable:
            return f"{self.split}: no image can be used"
        sides = [f"{width}x{height}" for height, width in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        sizes = ", ".join(sides) if len(sides) < 4 else f"{sides[0]} to {sides[-1]}"
        ignored = f"{self.ignored / self.area:.2%} of the pixels are ignored"
        return f"{self.split}: {len(self.usable):,} images of {sizes}; {ignored}"

    def table(self, info: DatasetInfo) -> Table:
        """A line for each class, for rich to print."""
        table = Table(Column("class"), *(Column(name, justify="right") for name in ("share of pixels", "images")))
        for name, pixels, images in zip(info.class_names, self.pixels, self.present, strict=True):
            table.add_row(name, f"{pixels / max(1, self.pixels.sum()):.3%}", f"{images:,}")
        return table


def survey(dataset: ConfigDict, split: str, num_classes: int) -> Survey:
    """Checks and loads every example of a split once, as training does, and counts its labels.

    Args:
      dataset: config.dataset; whatever its on_error says, wrong files are listed.
      split: see `open_source`.
      num_classes: K.

    Raises:
      ValueError: the split cannot be opened.
    """
    source = open_source(dataset, split, check=False)
    read = reader(source)

    def look(index: int) -> tuple[tuple[int, int], np.ndarray] | str:
        try:
            source.check(index)
            _, label = read(index)
        except ValueError as error:
            return str(error)
        height, width = label.shape
        return (height, width), np.bincount(label.ravel(), minlength=256)

    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    usable, problems = [], []
    total, present = np.zeros(256, np.int64), np.zeros(256, np.int64)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, progress(f"checking {split}", len(source)) as advance:
        for index, found in enumerate(pool.map(look, range(len(source)))):
            if isinstance(found, str):
                problems.append(found)
            else:
                usable.append(index)
                sizes[found[0]] += 1
                total += found[1]
                present += found[1] > 0
            advance(1)
    name = dataset.tfds_name.removeprefix("pspnet_") if dataset.name == "tfds" else dataset.name
    if (count := layouts.official_count(name, split)) not in (None, len(source)):
        problems.append(f"{name} {split} has {count:,} images officially, here {len(source):,}")
    return Survey(split, usable, sizes, total[:num_classes], int(total[255]), present[:num_classes], problems)


def samples(dataset: ConfigDict, found: Survey, count: int) -> list[dict[str, Any]]:
    """Returns up to so many usable examples of a split, evenly spread: image uint8[H,W,3], label uint8[H,W] and name."""
    source = open_source(dataset, found.split, check=False)
    chosen = np.unique(np.linspace(0, len(found.usable) - 1, count).round().astype(int)) if found.usable else ()
    read, examples = reader(source), []
    for index in (found.usable[i] for i in chosen):
        image, label = read(index)
        examples.append({"image": image, "label": label, "name": source.names[index]})
    return examples
