"""The values, colors or categories in the label files of an unknown folder, and what they may mean."""

import collections
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath

from pspnet_jax import class_lists, polygons
from pspnet_jax.data import label_files
from pspnet_jax.errors import UserError
from pspnet_jax.label_maps import Key

SAMPLES = 300  # files that are read, evenly spaced
MANY = 256  # values or colors of an image that is not a label
VOID = re.compile(r"(void|un-?label+ed|ignored?|no.?data|unknown|255)$", re.IGNORECASE)  # names of no class


class Entry(NamedTuple):
    """An entry of dataset.label_map, and a remark about its share of the pixels and about other readings."""

    key: Key
    name: str | None
    remark: str


def sample(items: Sequence, size: int = SAMPLES) -> list:
    """Returns at most `size` evenly spaced items."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, size).round().astype(int))] if items else []


def count(pairs: Sequence[tuple[str, str]]) -> dict[Key, float]:
    """Returns the share of the pixels of each value, color or category in the labels of a sample of pairs of files.

    Raises:
      UserError: a label cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(_count, sample(pairs)))
    colored = any(isinstance(key, tuple) for found in counts for key in found)
    total = collections.Counter[Key]()
    for found in counts:
        total.update({(key, key, key) if colored and isinstance(key, int) else key: n for key, n in found.items()})
    return {key: n / total.total() for key, n in sorted(total.items())}


def _count(pair: tuple[str, str]) -> dict[Key, int]:
    image, label = pair
    try:
        if label.endswith(".json"):
            drawing = polygons.read(label, image)
            names = list(dict.fromkeys([polygons.BACKGROUND, *(name for name, _ in drawing.shapes)]))
            return dict(zip(names, np.bincount(drawing.paint(names.index).ravel(), minlength=len(names)).tolist(), strict=True))
        pixels = label_files.decode(label, epath.Path(label).read_bytes(), keep_indices=True)
    except Exception as error:  # whatever a decoder raises
        raise UserError(f"{label}: cannot be read as a label ({error})") from error
    if pixels.ndim == 3:
        same = (pixels == pixels[..., :1]).all()
        pixels = pixels[..., 0] if same else pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)
        values, counts = np.unique(pixels, return_counts=True)
        keys = values.tolist() if same else [(v >> 16, v >> 8 & 255, v & 255) for v in values.tolist()]
    ...
