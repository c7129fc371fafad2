"""The values, colors or categories in the label files of an unknown folder, and what they may mean."""

import collections
import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from pspnet_jax import class_lists, datasets, image_files, large_files, polygons
from pspnet_jax.data import label_files
from pspnet_jax.data.palettes import Palettes
from pspnet_jax.errors import UserError
from pspnet_jax.label_maps import Key

SAMPLES = 1000  # labels that are read, evenly spaced
MANY = 64  # more values or colors in one file are not classes
INDICES = 64  # if all other values are smaller, 255 is no class
INSTANCES = 5  # objects in a file, from which on consecutive values may be their numbers
FLAT = 16  # images with no more colors are masks
TELLING = 3  # equal labels of more than one value, by which folders are copies
LARGEST = 2**25  # bytes of a file whose colors are counted
VOID = re.compile(r"void|un-?label+ed|ignored?|no.?data|background/void", re.IGNORECASE)  # names of no class
LISTS = re.compile(r"(class|label|categor|legend|colou?r|palette|names|config|meta|info)[^/]*$", re.I)  # of classes
GRAYS = 4  # values near black, and near white, in smoothed labels
RARE = 0.005  # share of the pixels of a value that may be only at edges
EDGY = 4  # fewer values are classes
EDGES = 0.05  # share of pixels between black and white in binary labels that were smoothed or saved as JPEG


class Entry(NamedTuple):
    """An entry of dataset.label_map, and what the reader should know about it."""

    key: Key
    name: str | None
    remark: str


class Values(NamedTuple):
    """What is in the labels of a sample.

    Attributes:
      shares: the share of the pixels of each value, (R, G, B) color or category, sorted.
      read: number of labels that were read.
      of: number of all labels.
      damaged: why labels of the sample cannot be read.
      numbered: whether the values of each file may be the numbers of its objects.
    """

    shares: Mapping[Any, float]
    read: int
    of: int
    damaged: Sequence[str] = ()
    numbered: bool = False


def sample(items: Sequence, size: int = SAMPLES) -> list:
    """Returns at most `size` evenly spaced items."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, size).round().astype(int))] if items else []


def count(pairs: Sequence[tuple[str, str]]) -> Values:
    """Counts the values in the labels of a sample of pairs, which are paths of images and labels.

    Raises:
      UserError: most labels cannot be read, have as many values as photos, or no polygons.
    """
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(_count, chosen := sample(pairs)))
        if by_color := _palettes_differ(chosen, results):
            results = list(pool.map(functools.partial(_count, keep_indices=False), chosen))
    counts = [found for found in results if not isinstance(found, str)]
    damaged = [found for found in results if isinstance(found, str)]
    if 2 * len(damaged) >= len(results):
        raise UserError(damaged[0])
    colored = by_color or any(isinstance(key, tuple) for found in counts for key in found)
    total = collections.Counter[Any]()
    for key, number in (item for found in counts for item in found.items()):
        total[(key, key, key) if colored and isinstance(key, int) else key] += number
    pixels = total.total()
    shares = {key: n / pixels for key, n in sorted(total.items())}
    if np.median([len(found) for found in counts]) > MANY and not is_smoothed(shares):
        raise UserError(f"{chosen[0][1]}: has {len(counts[0])} values or colors, as a photo has")
    if [*shares] == [polygons.BACKGROUND]:
        raise UserError(f"{chosen[0][1]}: has no polygons, only boxes or nothing; draw or convert them")
    return Values(shares, len(counts), len(pairs), damaged, _are_numbers(counts))


def are_masks(images: Sequence[str]) -> bool:
    """Returns whether all images of a sample have so few colors as only masks have."""
    return all(
        not image.lower().endswith((".jpg", ".jpeg"))
        and epath.Path(image).stat().length < LARGEST
        and isinstance(found := _count(("", image)), dict)
        and len(found) <= FLAT
        for image in sample(images, 3)
    )


def are_copies(pairs: Sequence[tuple[str, str]]) -> bool:
    """Returns whether both labels of each pair have the same pixels, and some of them more than one value or color."""
    varied = 0
    for files in pairs:
        one, other = (label_files.decode(file, epath.Path(file).read_bytes(), True) for file in files)
        if not np.array_equal(one, other):
            return False
        varied += bool((one != one[:1, :1]).any())
        if varied == TELLING:
            break
    return varied > 0


def _are_numbers(counts: Sequence[Mapping[Any, int]]) -> bool:
    """Returns whether the values of each label are 0 or 1 to n, without a gap, where n differs."""
    if not all(isinstance(key, int) for found in counts for key in found):
        return False
    last = {max(found) for found in counts if max(found) - min(found) + 1 == len(found) and min(found) < 2}
    return len(last) > 2 and max(last) >= INSTANCES and max(last) == max(map(max, counts))


def _palettes_differ(pairs: Sequence[tuple[str, str]], counts: Sequence[Mapping[Any, int] | str]) -> bool:
    """Returns whether the same value stands for different classes, by the colors of the palettes in the labels."""
    palettes = Palettes()
    for (_, label), found in zip(pairs, counts, strict=True):
        if not (isinstance(found, str) or large_files.is_large(label)):
            with epath.Path(label).open("rb") as file, contextlib.suppress(UnidentifiedImageError), Image.open(file) as image:
                palettes.add(label, np.zeros(256), label_files.palette(image, [key for key in found if isinstance(key, int)]))
    return bool(palettes.contradiction)


def _count(pair: tuple[str, str], keep_indices: bool = True) -> dict[Any, int] | str:
    """Returns the number of pixels of each value, or why the label cannot be read."""
    image, label = pair
    try:
        if label.lower().endswith(".json"):
            drawing = polygons.read(label, image)
            names = list(dict.fromkeys([polygons.BACKGROUND, *polygons.categories(label)]))
            return dict(zip(names, np.bincount(drawing.paint(names.index).ravel(), minlength=len(names)).tolist(), strict=True))
        if large_files.is_large(label):
            large = large_files.LargeTiff(label, lambda stored: stored[..., :1] if stored.shape[2] < 3 else stored)
            return dict(sum((_values(label_files.normalize(strip)) for strip in large.strips()), collections.Counter()))
        return dict(_values(label_files.decode(label, epath.Path(label).read_bytes(), keep_indices)))
    except UserError as error:
        return f"{label}: {error}"
    except Exception as error:  # whatever a decoder raises
        return f"{label}: cannot be read as a label ({image_files.reason(error)})"


def _values(pixels: np.ndarray) -> collections.Counter[Any]:
    """Returns the number of pixels of each value, or of each (R, G, B) color if any is not gray."""
    if colored := pixels.ndim == 3 and not (pixels == pixels[..., :1]).all():
        pixels = pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    values, counts = np.unique(pixels[..., 0] if pixels.ndim == 3 else pixels, return_counts=True)
    keys = [(value >> 16, value >> 8 & 255, value & 255) if colored else value for value in values.tolist()]
    return collections.Counter(dict(zip(keys, counts.tolist(), strict=True)))


def is_smoothed(shares: Mapping[Any, float]) -> bool:
    """Returns whether labels are black and white with grays between, because they were smoothed, or saved as JPEG."""
    if not all(isinstance(key, int) and 0 <= key < 256 for key in shares):
        return False
    ends = [[share for key, share in shares.items() if low <= key < low + 64] for low in (0, 192)]
    return min(map(len, ends)) >= GRAYS and sum(map(sum, ends)) > 1 - EDGES


def entries(values: Values, texts: Mapping[str, str]) -> list[Entry]:
    """Returns a label map that leaves no value out. Where a value may mean a class or nothing, it is a class, with a remark.

    Args:
      values: as `count` returns them.
      texts: {path: content} of files that may name the classes. Values that only they have are in the map, too.
    """
    shares = values.shares
    if is_smoothed(shares):
        low = sum(share for key, share in shares.items() if key < 128)
        return [
            Entry(0, "class_0", f"{low:.2%} of the pixels, values 0 to 127"),
            Entry(255, "class_255", f"{1 - low:.2%}, 128 to 255"),
        ]
    (names, source), found, several = _names(list(shares), texts), [], len(shares) > 2
    named = [key for key in {*shares, *names} - {255} if not _is_void(names.get(key, ""))]
    spelled = dict[str, str]()  # {name in lower case: its first form}
    odd = [key for key in shares if isinstance(key, int) and not 0 <= key < INDICES]
    least = EDGES if {0, 255} <= shares.keys() and odd != [255] else RARE  # between black and white
    edges = [key for key, share in shares.items() if key not in names and share < least]
    for key in sorted({*shares, *names}):
        default = "color_{}_{}_{}".format(*key) if isinstance(key, tuple) else key if isinstance(key, str) else f"class_{key}"
        name, remark = names.get(key, default), ""
        is_void = (odd == [key] and (key in (255, 65535) or key < 0)) or (key == datasets.VOC_BORDER and key not in names)
        is_void = is_void or (len(named) > 1 and _is_void(name))  # one class alone cannot be trained
        ignored = several and bool(is_void)
        if ignored:
            remark = f"; GUESS: ignored, as such a value or name usually is; {name!r} instead of None makes it a class"
        elif key in {0, (0, 0, 0), polygons.BACKGROUND} - names.keys() and several and 255 not in shares:
            remark = "; GUESS: a class; None instead of the name ignores it, if it means void or not labeled"
        elif key == 1 == next(iter(shares)):
            remark = "; 0 does not occur; if other files have it, add it, as None if it means void"
        elif key in edges and 2 * len(edges) > len(shares) > EDGY:
            remark = "; GUESS: a class, unless it is only at edges, from resizing or JPEG: then save the labels again without"
        remark += f"; named by {source}" * (key in names)
        share = f"{shares[key]:.2%} of the pixels" if key in shares else "listed, but not in the labels that were read"
        if (first := spelled.setdefault(name.lower(), name)) != name:
            remark += f"; GUESS: the same class as {first!r}"
        found.append(Entry(key, None if ignored else first, share + remark))
    if values.numbered and not names:
        guess = "; GUESS: a class; if each file numbers its objects, as it seems, give all numbers the same name"
        found = [entry._replace(remark=entry.remark + guess) if entry.key == 1 else entry for entry in found]
    if len(found) == 1:
        key = 1 if found[0].key != 1 else 2
        found.append(Entry(key, f"class_{key}", "does not occur: a network needs two classes"))
    return found


def _is_void(name: str) -> bool:
    return bool(VOID.fullmatch(name.strip("_")))


def _names(keys: Sequence[Any], texts: Mapping[str, str]) -> tuple[dict[Any, str], str]:
    """Returns the names of values or colors in the first list of classes that fits to them, and its file; {} without one."""
    for path, text in texts.items():
        with contextlib.suppress(UserError):  # another kind of text
            lists_files = any(line.strip().lower().endswith(image_files.SUFFIXES) for line in text.splitlines())
            if LISTS.search(path) and not lists_files and (names := _listed(keys, class_lists.read_rows(text, path))):
                return names, path
    return {}, ""


def _listed(keys: Sequence[Any], rows: Sequence[class_lists.Row]) -> dict[Any, str]:
    if any(isinstance(key, tuple) for key in keys):
        names: dict[Any, str] = {row.color: row.name for row in rows if row.color}
        return names if 2 * len(names.keys() & set(keys)) > len(keys) else {}
    if not all(isinstance(key, int) for key in keys):
        return {}
    grays = {row.color[0]: row.name for row in rows if row.color and len(set(row.color)) == 1}
    if len(grays) == len(rows) > 1 and set(keys) <= {*grays, 255}:
        return grays
    first = int(min(keys) == 1 and max(keys) == len(rows))  # such lists leave out 0
    names = {first + position if row.label is None else row.label: row.name for position, row in enumerate(rows)}
    return names if set(keys) <= {*names, 255} else {}
