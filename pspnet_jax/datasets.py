"""Definitions of datasets: class names and colors, and the raw values of the classes in label files."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import class_lists, label_maps, polygons
from pspnet_jax.class_lists import Color
from pspnet_jax.errors import MissingFileError, UserError

IGNORE = 255  # label of pixels that are ignored in training and evaluation
WRONG = 254  # marks values that do not occur in a benchmark's label files
MAX_CLASSES = 255  # labels are uint8, and 255 is IGNORE

# Names and colors of the known datasets, in the format of classes.txt. The benchmarks' are from hszhao/semseg,
# data/*/*_names.txt and *_colors.txt (VOC's colors are `voc_palette`); CamVid's are from the SegNet tutorial; those of Pascal
# Context, COCO-Stuff, LoveDA and Potsdam are mmsegmentation's.
CLASSES = pathlib.Path(__file__).parent / "classes"
LISTS = ("classes.txt", "class_dict.csv")  # files in which a folder lists its classes

# The raw value of each class 0..K-1 in a benchmark's label files and submissions.
RAW_VALUES = {
    "cityscapes": (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),  # labelIds
    "voc2012": tuple(range(21)),
    "ade20k": tuple(range(1, 151)),
    "pascal_context": tuple(range(1, 60)),
    # of COCO's ids, less 1, those of eleven classes are not used
    "coco_stuff": tuple(sorted({*range(182)} - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})),
    "loveda": tuple(range(1, 8)),
    "potsdam": tuple(range(1, 7)),
}
# Other values in these files, which are not scored; in Cityscapes, the ids of the remaining classes up to 33.
VOID_VALUES = {"cityscapes": range(34), "voc2012": (IGNORE,), "coco_stuff": (IGNORE,)} | dict.fromkeys(
    ("ade20k", "pascal_context", "loveda", "potsdam"), (0,)
)
VOC_BORDER = (224, 224, 192)  # the color of VOC's value 255, around objects
MAX_SHOWN = 20  # classes of a label map in a message
RARE = 10  # wrong values at fewer than 1/10 of the pixels may be the edges of interpolated labels
# Number of images in each split.
COUNTS = {
    "ade20k": {"training": 20_210, "validation": 2_000},
    "voc2012": {"train": 1_464, "train_aug": 10_582, "trainval": 2_913, "val": 1_449, "test": 1_456},
    "cityscapes": {"train": 2_975, "val": 500, "test": 1_525, "train_extra": 19_998},
    "pascal_context": {"train": 4_998, "val": 5_105},
    "coco_stuff": {"train2017": 118_287, "val2017": 5_000},
    "loveda": {"Train": 2_522, "Val": 1_669, "Test": 1_796},
    "potsdam": {"train": 3_456, "val": 2_016},
}

# Expected contents of the directory for each file-based config.dataset.name, see data/layouts.py.
EXPECTED_FILES = {
    "folder": "images/SPLIT and labels/SPLIT, or what dataset.images and dataset.labels say",
    "ade20k": "images/{training,validation} and annotations/{training,validation}, as in ADEChallengeData2016",
    "voc2012": "JPEGImages, SegmentationClass and ImageSets/Segmentation, as in VOCdevkit/VOC2012; for train_aug also "
    "SegmentationClassAug, or SBD's benchmark_RELEASE/dataset, next to it or as --config.dataset.extra_root",
    "cityscapes": "leftImg8bit/{train,val}/CITY and gtFine/{train,val}/CITY (for train_extra gtCoarse), all in one directory",
    "pascal_context": "JPEGImages, SegmentationClassContext and ImageSets/SegmentationContext, as mmsegmentation's converter "
    "writes them to VOCdevkit/VOC2010",
    "coco_stuff": "images/{train2017,val2017} and annotations/{train2017,val2017} with the files of "
    "stuffthingmaps_trainval2017.zip",
    "loveda": "{Train,Val}/{Urban,Rural}/{images_png,masks_png}",
    "potsdam": "img_dir/{train,val} and ann_dir/{train,val}, the tiles that mmsegmentation's converter writes",
}
NAMES = (*EXPECTED_FILES, "scenes", "tfds")


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Class names and (R, G, B) colors, 0..255, in label order 0..K-1.

    Raises:
      UserError: there are not 2 to 255 classes with distinct names, or not one valid color for each.
    """

    name: str
    class_names: tuple[str, ...]
    colors: tuple[Color, ...]

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise UserError(
                f"dataset {self.name!r} has {self.num_classes} classes: expected 2 to {MAX_CLASSES} in dataset.class_names or "
                f"classes.txt (labels are 8-bit, and {IGNORE} means ignored)"
            )
        first: dict[str, int] = {}
        for label, name in enumerate(self.class_names):
            if (other := first.setdefault(name.strip().lower(), label)) != label:
                raise UserError(
                    f"classes {other} and {label} of dataset {self.name!r} are both {name!r}; give them different names"
                )
        if len(self.colors) != self.num_classes:
            raise UserError(
                f"dataset.colors has {len(self.colors)} colors for {self.num_classes} classes: expected one per class"
            )
        for name, color in zip(self.class_names, self.colors, strict=True):
            if len(color) != 3 or not all(isinstance(value, int) and 0 <= value < 256 for value in color):
                raise UserError(f"color {color} of class {name!r}: expected (R, G, B), each from 0 to 255")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def describe(dataset: ConfigDict) -> DatasetInfo:
    """Returns the classes of a recipe's dataset.

    Names are dataset.class_names or, if that is empty, from the known dataset's table, or a folder's label map, COCO files or
    list of classes. Colors are dataset.colors, or from the same place, or from `voc_palette`.

    Raises:
      UserError: the classes are not named anywhere, or are not valid (see `DatasetInfo`).
    """
    own = None if dataset.class_names else _mapped_classes(dataset) or _listed_classes(dataset)
    names = dataset.class_names or (own and own[0])
    if not names and dataset.name == "tfds":
        raise UserError(
            f"dataset.class_names is empty: the recipe must name the classes of dataset.tfds_name={dataset.tfds_name!r}; to "
            "pretrain a backbone on images with one class each, use --mode pretrain"
        )
    if not names:
        root = epath.Path(dataset.root).expanduser()
        if dataset.root and not (root.exists() if "://" in dataset.root else os.access(root, os.R_OK | os.X_OK)):
            raise MissingFileError(f"--config.dataset.root={dataset.root}: no such directory, or it cannot be read")
        file = epath.Path(dataset.root) / "classes.txt" if dataset.root else "dataset.root"
        raise UserError(
            f"dataset.class_names is empty and there is no {file}: name the classes in the recipe, or in ROOT/classes.txt with "
            "--config.dataset.root=ROOT, one per line in label order, as `name` or `name R G B`"
        )
    colors = tuple(map(tuple, dataset.colors)) or _fill_colors(names, own[1] if own else {})
    return DatasetInfo(dataset.name, tuple(names), colors)


def file_colors(dataset: ConfigDict) -> dict[int, Color]:
    """Returns the colors in a folder's list of classes, {label: (R, G, B)}; {} if there are none."""
    own = _listed_classes(dataset) if dataset.name == "folder" and not dataset.label_map else None
    return own[1] if own else {}


def check_classes(dataset: ConfigDict) -> None:
    """Checks that dataset.class_names agrees with the known dataset's table or a folder's list of classes.

    Raises:
      UserError: names the first class that differs.
    """
    has_map = dataset.name == "folder" and dataset.label_map  # which refers to classes by name
    own = None if has_map else _listed_classes(dataset)
    if own is None:
        return
    for label, listed, named in differing_classes(own[0], describe(dataset).class_names):
        raise UserError(
            f"class {label} of dataset.name={dataset.name!r} at {dataset.root!r} is {listed or 'missing'!r}, but "
            f"{named or 'missing'!r} in dataset.class_names; both must list the same classes"
        )


def differing_classes(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[int, str, str]]:
    """Returns (label, their name, our name) of each class that two lists name differently; a missing name is ""."""
    pairs = enumerate(itertools.zip_longest(theirs, ours, fillvalue=""))
    return [
        (label, their, our)
        for label, (their, our) in pairs
        if their.lower() != our.lower()
        and not (their and our == f"class {label}")  # the placeholder for imported weights without class names
    ]


def _mapped_classes(dataset: ConfigDict) -> tuple[tuple[str, ...], dict[int, Color]] | None:
    """Returns the names and colors that a folder's label map or COCO files give; None without either."""
    if dataset.name != "folder":
        return None
    entries = label_maps.read(dataset)
    if names := label_maps.class_names(entries):
        colors = {names.index(name): key for key, name in reversed(entries.items()) if name and isinstance(key, tuple)}
        return names, colors
    if not entries and dataset.root and polygons.is_coco(dataset.labels):
        return polygons.class_names(dataset.root, dataset.labels), {}
    return None


def _listed_classes(dataset: ConfigDict) -> tuple[tuple[str, ...], dict[int, Color]] | None:
    """Returns the names and colors of a known dataset's table, or of a folder's list of classes; None without either."""
    known = dataset.tfds_name.removeprefix("pspnet_") if dataset.name == "tfds" else dataset.name
    if known in tables():
        return _read(CLASSES / f"{known}.txt")
    if dataset.name == "folder" and dataset.root:
        files = [file for name in LISTS if (file := epath.Path(dataset.root).expanduser() / name).exists()]
        lists = [_read(file) for file in files]
        if len(lists) > 1 and differing_classes(lists[0][0], lists[1][0]):
            raise UserError(f"{files[0]} and {files[1].name} differ in their classes or the order; remove the wrong file")
        return lists[0] if lists else None
    return None


def _read(file: epath.Path | pathlib.Path) -> tuple[tuple[str, ...], dict[int, Color]]:
    try:
        if "\0" in (text := file.read_text(encoding="utf-8")):
            raise UserError(f"{file}: is not UTF-8 text; save it as UTF-8")
        return class_lists.parse(text, str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _fill_colors(names: Sequence[str], colors: Mapping[int, Color]) -> tuple[Color, ...]:
    """Returns a color for each class, from VOC's palette if it has none."""
    return tuple(colors.get(label, color) for label, color in enumerate(voc_palette(len(names))))


def table(name: str) -> DatasetInfo:
    """Returns the classes of a known dataset, for recipes that read it from a folder: `table("camvid")`."""
    if name not in tables():
        raise UserError(f"there is no table of classes for {name!r}: expected one of {', '.join(tables())}")
    names, colors = _read(CLASSES / f"{name}.txt")
    return DatasetInfo(name, names, _fill_colors(names, colors))


def tables() -> list[str]:
    """Returns the names of the known datasets."""
    return sorted(file.stem for file in CLASSES.glob("*.txt"))


def voc_palette(num_classes: int) -> tuple[Color, ...]:
    """Returns PASCAL VOC's colors of the labels 0..K-1 (VOCdevkit's VOClabelcolormap): bits 3i, 3i+1 and 3i+2 of a label
    become bit 7-i of R, G and B."""

    def value(label: int, channel: int) -> int:
        return sum((label >> (3 * i + channel) & 1) << (7 - i) for i in range(3))

    return tuple((value(label, 0), value(label, 1), value(label, 2)) for label in range(num_classes))


def classes_of_raw_values(name: str) -> np.ndarray:
    """Returns uint8[256], the inverse of `RAW_VALUES`: the class of each raw value, IGNORE for values that are not scored,
    and WRONG for values that do not occur."""
    table = np.full(256, WRONG, np.uint8)
    table[list(VOID_VALUES[name])] = IGNORE
    table[list(RAW_VALUES[name])] = np.arange(len(RAW_VALUES[name]))
    return table


def raw_label_problem(name: str, histogram: Sequence[int] | np.ndarray) -> str | None:
    """Returns a description of raw values in a label's histogram that the benchmark's files cannot have, or None."""
    table = classes_of_raw_values(name)
    wrong = [value for value in range(256) if histogram[value] and table[value] == WRONG]
    if not wrong:
        return None
    known = [value for value in range(256) if table[value] != WRONG]
    if wrong[0] != IGNORE:
        cause = "instance or color labels: unpack the labels again"
    else:
        cause = "labels that are already mapped to classes: unpack the original ones" + (
            ", or rename these to *_labelTrainIds.png" if name == "cityscapes" else ""
        )
    return (
        f"value {wrong[0]} at {histogram[wrong[0]]} pixels does not occur in labels of {name}, which have values {known[0]}.."
        f"{known[-1]}; likely cause: {cause}"
    )


def label_problem(histogram: Sequence[int] | np.ndarray, num_classes: int) -> str | None:
    """Returns a description of values outside 0..K-1 and 255 in the histogram of a label, or None if there are none."""
    wrong = [value for value in range(num_classes, IGNORE) if histogram[value]]
    if not wrong:
        return None
    if wrong == [num_classes]:
        void, named = shift_maps(num_classes)
        cause = (
            f'either 0 is void and the classes count from 1 (set dataset.label_map="{void}"), or one class name is missing, '
            f'the first or the last (add it, and set dataset.label_map="{named}")'
        )
    elif set(wrong) <= _voc_grays():
        cause = "a VOC palette image converted to gray (read the palette's indices instead)"
    elif num_classes == len(RAW_VALUES["cityscapes"]) and wrong[-1] <= max(RAW_VALUES["cityscapes"]):
        cause = "Cityscapes' raw labelIds (name them *_labelIds.png and read them with --config.dataset.name=cityscapes)"
    else:
        cause = "raw ids that were not mapped to classes, a color image converted to gray, or missing class names"
    if RARE * sum(histogram[value] for value in wrong) < sum(histogram):
        causes = ["interpolated values from saving as JPEG or from resizing without nearest-neighbor interpolation", cause]
        cause = ", or ".join(causes[::-1] if wrong == [num_classes] else causes)
    return (
        f"label value {wrong[0]} at {histogram[wrong[0]]} pixels, expected 0..{num_classes - 1} for {num_classes} classes, or "
        f"{IGNORE} to ignore; likely cause: {cause}"
    )


def shift_maps(num_classes: int) -> tuple[str, str]:
    """Returns two label maps for values 0..K, where 0 is void, or all are classes; those of many classes are abbreviated."""
    shown = [*range(1, num_classes + 1)]
    void, named = [f"{value}: {value - 1}" for value in shown], [f"{value}: {value}" for value in shown]
    if num_classes > MAX_SHOWN:
        void[2:-1] = named[2:-1] = ["..."]
    return f"{{0: None, {', '.join(void)}}}", f"{{0: 0, {', '.join(named)}}}"


def _voc_grays() -> set[int]:
    """Returns the ITU-R 601 luma of VOC's 21 colors and of its border color."""
    colors = (*voc_palette(21), VOC_BORDER)
    return {round(0.299 * red + 0.587 * green + 0.114 * blue) for red, green, blue in colors}
