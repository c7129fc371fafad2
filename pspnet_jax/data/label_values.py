"""The values, colors or categories in the label files of an unknown folder, and what they may mean."""

import collections
import contextlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pspnet_jax import class_lists, polygons
from pspnet_jax.data import label_files
from pspnet_jax.errors import UserError
from pspnet_jax.label_maps import Key

SAMPLES = 300  # labels that are read, evenly spaced
MANY = 64  # more values or colors in one file are not classes
VOID = re.compile(r"void|un-?label+ed|ignored?|no.?data|background/void", re.IGNORECASE)  # names of no class
LISTS = re.compile(r"class|label|categor|legend|colou?r|palette|names", re.IGNORECASE)  # names of texts that list classes
GRAYS = 4  # values near black, and near white, in smoothed labels
EDGES = 0.05  # share of pixels between black and white in binary labels that were smoothed or saved as JPEG


class Entry(NamedTuple):
    """An entry of dataset.label_map, and what the reader should know about it."""

    key: Key
    name: str | None
    remark: str


def sample(items: Sequence, size: int = SAMPLES) -> list:
    """Returns at most `size` evenly spaced items."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, size).round().astype(int))] if items else []


def count(pairs: Sequence[tuple[str, str]]) -> dict[Any, float]:
    """Returns the share of the pixels of each value, (R, G, B) color or category in the labels of a sample.

    Args:
      pairs: paths of images and labels.

    Raises:
      UserError: a label cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(_count, sample(pairs)))
    colored = any(isinstance(key, tuple) for found in counts for key in found)
    total = collections.Counter[Any]()
    for found in counts:
        total.update({(key, key, key) if colored and isinstance(key, int) else key: n for key, n in found.items()})
    pixels = total.total()
    shares = {key: n / pixels for key, n in sorted(total.items())}
    if np.median([len(found) for found in counts]) > MANY and not is_smoothed(shares):
        raise UserError(f"{pairs[0][1]}: has {len(counts[0])} values or colors, as a photo has")
    return shares


def _count(pair: tuple[str, str]) -> dict[Any, int]:
    image, label = pair
    try:
        if label.endswith(".json"):
            drawing = polygons.read(label, image)
            names = list(dict.fromkeys([polygons.BACKGROUND, *(name for name, _ in drawing.shapes)]))
            return dict(zip(names, np.bincount(drawing.paint(names.index).ravel(), minlength=len(names)).tolist(), strict=True))
        pixels = label_files.decode(label, epath.Path(label).read_bytes(), True)
    except Exception as error:  # whatever a decoder raises
        raise UserError(f"{label}: cannot be read as a label ({error})") from error
    if colored := pixels.ndim == 3 and not (pixels == pixels[..., :1]).all():
        pixels = pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    values, counts = np.unique(pixels[..., 0] if pixels.ndim == 3 else pixels, return_counts=True)
    keys = [(value >> 16, value >> 8 & 255, value & 255) if colored else value for value in values.tolist()]
    return dict(zip(keys, counts.tolist(), strict=True))


def is_smoothed(shares: Mapping[Any, float]) -> bool:
    """Returns whether labels are black and white with grays between, because they were smoothed, or saved as JPEG."""
    if not all(isinstance(key, int) and 0 <= key < 256 for key in shares):
        return False
    ends = [[share for key, share in shares.items() if low <= key < low + 64] for low in (0, 192)]
    return min(map(len, ends)) >= GRAYS and sum(map(sum, ends)) > 1 - EDGES


def entries(shares: Mapping[Any, float], texts: Mapping[str, str]) -> list[Entry]:
    """Returns a label map that leaves no value out. Where a value may mean a class or nothing, it is a class, with a remark.

    Args:
      shares: as `count` returns them.
      texts: {path: content} of files that may name the classes.
    """
    if is_smoothed(shares):
        low = sum(share for key, share in shares.items() if key < 128)
        return [
            Entry(0, "class_0", f"{low:.2%} of the pixels, values 0 to 127"),
            Entry(255, "class_255", f"{1 - low:.2%}, 128 to 255"),
        ]
    names, found, several = _names(list(shares), texts), [], len(shares) > 2
    for key, share in shares.items():
        default = "color_{}_{}_{}".format(*key) if isinstance(key, tuple) else key if isinstance(key, str) else f"class_{key}"
        name, remark = names.get(key, default), ""
        ignored = several and (key == 255 or VOID.fullmatch(name) is not None)
        if ignored:
            remark = f"; GUESS: ignored, as 255 or such a name usually is; {name!r} instead of None makes it a class"
        elif key in {0, (0, 0, 0), polygons.BACKGROUND} - names.keys() and several and 255 not in shares:
            remark = "; GUESS: a class; None instead of the name ignores it, if it means void or not labeled"
        elif key == 1 == next(iter(shares)):
            remark = "; 0 does not occur; if other files have it, add it, as None if it means void"
        found.append(Entry(key, None if ignored else name, f"{share:.2%} of the pixels{remark}"))
    if len(found) == 1:
        key = 1 if found[0].key != 1 else 2
        found.append(Entry(key, f"class_{key}", "does not occur: a network needs two classes"))
    return found


def _names(keys: Sequence[Any], texts: Mapping[str, str]) -> dict[Any, str]:
    """Returns the names of values or colors in the first list of classes that fits to them; {} without one."""
    for path, text in texts.items():
        with contextlib.suppress(UserError):  # another kind of text
            if LISTS.search(path) and (names := _listed(keys, class_lists.read_rows(text, path))):
                return names
    return {}


def _listed(keys: Sequence[Any], rows: Sequence[class_lists.Row]) -> dict[Any, str]:
    if any(isinstance(key, tuple) for key in keys):
        names: dict[Any, str] = {row.color: row.name for row in rows if row.color}
        return names if 2 * len(names.keys() & set(keys)) > len(keys) else {}
    if not all(isinstance(key, int) for key in keys):
        return {}
    grays = {row.color[0]: row.name for row in rows if row.color and len(set(row.color)) == 1}
    if len(grays) == len(rows) > 1:
        return grays if set(keys) <= {*grays, 255} else {}
    first = int(min(keys) == 1 and max(keys) == len(rows))  # such lists leave out 0
    names = {first + position if row.label is None else row.label: row.name for position, row in enumerate(rows)}
    return names if set(keys) <= {*names, 255} else {}
