"""What a dataset is: its class names and colors, and the values that stand for the classes in its files."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError

NAMES = ("folder", "ade20k", "voc2012", "cityscapes", "scenes", "tfds")  # of config.dataset.name
IGNORE = 255  # label of the pixels that neither train nor count
WRONG = 254  # stands for values that do not occur in a benchmark's label files
MAX_CLASSES = 255  # labels are uint8, and 255 is IGNORE

# One entry a class, in label order: "name R G B", or "name" for the color that voc_palette gives it; a folder's classes.txt
# has the same form, one entry a line. Names and colors are those of the benchmarks (hszhao/semseg, data/*/*_names.txt and
# *_colors.txt); CamVid's are the SegNet tutorial's.
TABLES = {
    "cityscapes": """
        road 128 64 128; sidewalk 244 35 232; building 70 70 70; wall 102 102 156; fence 190 153 153; pole 153 153 153;
        traffic light 250 170 30; traffic sign 220 220 0; vegetation 107 142 35; terrain 152 251 152; sky 70 130 180;
        person 220 20 60; rider 255 0 0; car 0 0 142; truck 0 0 70; bus 0 60 100; train 0 80 100; motorcycle 0 0 230;
        bicycle 119 11 32
    """,
    "voc2012": """
        background; aeroplane; bicycle; bird; boat; bottle; bus; car; cat; chair; cow; diningtable; dog; horse; motorbike;
        person; pottedplant; sheep; sofa; train; tvmonitor
    """,
    "camvid": """
        sky 128 128 128; building 128 0 0; pole 192 192 128; road 128 64 128; pavement 60 40 222; tree 128 128 0;
        sign symbol 192 128 128; fence 64 64 128; car 64 0 128; pedestrian 64 64 0; bicyclist 0 128 192
    """,
    "scenes": """
        sky 135 206 235; water 30 90 180; grass 90 160 60; road 110 110 110; pier 150 110 70; boat 200 40 40; car 240 180 0;
        pole 40 40 40; bird 180 0 200
    """,
    "ade20k": """
        wall 120 120 120; building 180 120 120; sky 6 230 230; floor 80 50 50; tree 4 200 3; ceiling 120 120 80;
        road 140 140 140; bed 204 5 255; windowpane 230 230 230; grass 4 250 7; cabinet 224 5 255; sidewalk 235 255 7;
        person 150 5 61; earth 120 120 70; door 8 255 51; table 255 6 82; mountain 143 255 140; plant 204 255 4;
        curtain 255 51 7; chair 204 70 3; car 0 102 200; water 61 230 250; painting 255 6 51; sofa 11 102 255; shelf 255 7 71;
        house 255 9 224; sea 9 7 230; mirror 220 220 220; rug 255 9 92; field 112 9 255; armchair 8 255 214; seat 7 255 224;
        fence 255 184 6; desk 10 255 71; rock 255 41 10; wardrobe 7 255 255; lamp 224 255 8; bathtub 102 8 255;
        railing 255 61 6; cushion 255 194 7; base 255 122 8; box 0 255 20; column 255 8 41; signboard 255 5 153;
        chest of drawers 6 51 255; counter 235 12 255; sand 160 150 20; sink 0 163 255; skyscraper 140 140 140;
        fireplace 250 10 15; refrigerator 20 255 0; grandstand 31 255 0; path 255 31 0; stairs 255 224 0; runway 153 255 0;
        case 0 0 255; pool table 255 71 0; pillow 0 235 255; screen door 0 173 255; stairway 31 0 255; river 11 200 200;
        bridge 255 82 0; bookcase 0 255 245; blind 0 61 255; coffee table 0 255 112; toilet 0 255 133; flower 255 0 0;
        book 255 163 0; hill 255 102 0; bench 194 255 0; countertop 0 143 255; stove 51 255 0; palm 0 82 255;
        kitchen island 0 255 41; computer 0 255 173; swivel chair 10 0 255; boat 173 255 0; bar 0 255 153;
        arcade machine 255 92 0; hovel 255 0 255; bus 255 0 245; towel 255 0 102; light 255 173 0; truck 255 0 20;
        tower 255 184 184; chandelier 0 31 255; awning 0 255 61; streetlight 0 71 255; booth 255 0 204;
        television receiver 0 255 194; airplane 0 255 82; dirt track 0 10 255; apparel 0 112 255; pole 51 0 255; land 0 194 255;
        bannister 0 122 255; escalator 0 255 163; ottoman 255 153 0; bottle 0 255 10; buffet 255 112 0; poster 143 255 0;
        stage 82 0 255; van 163 255 0; ship 255 235 0; fountain 8 184 170; conveyer belt 133 0 255; canopy 0 255 92;
        washer 184 0 255; plaything 255 0 31; swimming pool 0 184 255; stool 0 214 255; barrel 255 0 112; basket 92 255 0;
        waterfall 0 224 255; tent 112 224 255; bag 70 184 160; minibike 163 0 255; cradle 153 0 255; oven 71 255 0;
        ball 255 0 163; food 255 204 0; step 255 0 143; tank 0 255 235; trade name 133 255 0; microwave 255 0 235;
        pot 245 0 255; animal 255 0 122; bicycle 255 245 0; lake 10 190 212; dishwasher 214 255 0; screen 0 204 255;
        blanket 20 0 255; sculpture 255 255 0; hood 0 153 255; sconce 0 41 255; vase 0 255 204; traffic light 41 0 255;
        tray 41 255 0; ashcan 173 0 255; fan 0 245 255; pier 71 0 255; crt screen 122 0 255; plate 0 255 184; monitor 0 92 255;
        bulletin board 184 255 0; shower 0 133 255; radiator 255 214 0; glass 25 194 194; clock 102 255 0; flag 92 0 255
    """,
}
TABLES |= {f"pspnet_{name}": TABLES[name] for name in ("scenes", "ade20k", "voc2012", "cityscapes")}  # the same through TFDS

# The value of each class 0..K-1 in a benchmark's label files and submissions.
RAW_VALUES = {
    "cityscapes": (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),  # labelIds
    "voc2012": tuple(range(21)),
    "ade20k": tuple(range(1, 151)),
}
# Other values in these files, which are not scored: in ADE20K 0, in Cityscapes the ids of the remaining classes, to 33.
VOID_VALUES = {"cityscapes": range(34), "voc2012": (IGNORE,), "ade20k": (0,)}
# Number of images by split.
COUNTS = {
    "ade20k": {"training": 20_210, "validation": 2_000},
    "voc2012": {"train": 1_464, "train_aug": 10_582, "trainval": 2_913, "val": 1_449, "test": 1_456},
    "cityscapes": {"train": 2_975, "val": 500, "test": 1_525, "train_extra": 19_998},
}

Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Class names and their (R, G, B) colors, 0..255, in the order of the labels 0..K-1.

    Raises:
      UserError: there are not 2 to 255 classes, not one color for each, or a color has a value outside 0..255.
    """

    name: str
    class_names: tuple[str, ...]
    colors: tuple[Color, ...]

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise UserError(
                f"dataset {self.name!r} has {self.num_classes} classes: expected 2 to {MAX_CLASSES} in dataset.class_names or "
                f"classes.txt (labels are 8-bit, and {IGNORE} is the ignored one)"
            )
        if len(self.colors) != self.num_classes:
            raise UserError(
                f"dataset.colors has {len(self.colors)} colors for {self.num_classes} classes: expected one a class"
            )
        for name, color in zip(self.class_names, self.colors, strict=True):
            if len(color) != 3 or not all(value in range(256) for value in color):
                raise UserError(f"color {color} of class {name!r}: expected (R, G, B), each from 0 to 255")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def describe(dataset: ConfigDict) -> DatasetInfo:
    """Returns the classes that a recipe's dataset is labeled with.

    Names are dataset.class_names or, where that is empty, those of the known dataset's table or of a folder's classes.txt.
    Colors are dataset.colors, or come with the names, or are `voc_palette`'s.

    Args:
      dataset: config.dataset.

    Raises:
      UserError: nobody names the classes, or see DatasetInfo.
    """
    entries = dataset.class_names or _own_classes(dataset)
    if not entries and dataset.name == "tfds":
        raise UserError(
            f"dataset.class_names is empty: the recipe must name the classes of dataset.tfds_name={dataset.tfds_name!r}"
        )
    if entries is None:
        file = epath.Path(dataset.root) / "classes.txt" if dataset.root else "dataset.root"
        raise UserError(
            f"dataset.class_names is empty and there is no {file}: name the classes in the recipe, or in ROOT/classes.txt with "
            "--config.dataset.root=ROOT, one a line in label order, as `name` or `name R G B`"
        )
    names, colors = _parse(entries)
    return DatasetInfo(dataset.name, names, tuple(map(tuple, dataset.colors)) or colors)


def check_classes(dataset: ConfigDict) -> None:
    """Refuses a dataset whose labels mean other classes than dataset.class_names, by its table or a folder's classes.txt.

    Raises:
      UserError: names the first class that differs.
    """
    own = _own_classes(dataset)
    if own is None:
        return
    theirs, ours = _parse(own)[0], describe(dataset).class_names
    for index, (there, here) in enumerate(itertools.zip_longest(theirs, ours)):
        unnamed = here == f"class {index}" and there  # of imported weights that do not tell
        if str(there).lower() != str(here).lower() and not unnamed:
            raise UserError(
                f"class {index} of dataset.name={dataset.name!r} at {dataset.root!r} is {there or 'not there'!r}, but in "
                f"dataset.class_names {here or 'not there'!r}; the labels have to mean the same"
            )


def _own_classes(dataset: ConfigDict) -> list[str] | None:
    """The entries of a known dataset's table, or of a folder's classes.txt if it has one."""
    known = dataset.tfds_name if dataset.name == "tfds" else dataset.name
    if known in TABLES:
        return TABLES[known].split(";")
    file = epath.Path(dataset.root).expanduser() / "classes.txt"
    if dataset.name == "folder" and dataset.root and file.exists():
        try:
            return file.read_text().removeprefix("\ufeff").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    return None


def table(name: str) -> DatasetInfo:
    """Returns the classes of a known dataset, for recipes that read it from a folder: `table("camvid")`."""
    if name not in TABLES:
        raise UserError(f"no table of classes for {name!r}: expected one of {', '.join(sorted(TABLES))}")
    return DatasetInfo(name, *_parse(TABLES[name].split(";")))


def voc_palette(num_classes: int) -> tuple[Color, ...]:
    """Returns PASCAL VOC's colors of the labels 0..K-1 (VOCdevkit's VOClabelcolormap): from the lowest bit up, a label's bits
    go in turn to R, G and B, and fill these from the highest bit down."""

    def value(label: int, channel: int) -> int:
        return sum((label >> (3 * i + channel) & 1) << (7 - i) for i in range(3))

    return tuple((value(label, 0), value(label, 1), value(label, 2)) for label in range(num_classes))


def classes_of_raw_values(name: str) -> np.ndarray:
    """Returns uint8[256], the inverse of `RAW_VALUES`: the class of each value in a benchmark's label files, IGNORE for values
    that are not scored, and WRONG for those that do not occur."""
    table = np.full(256, WRONG, np.uint8)
    table[list(VOID_VALUES[name])] = IGNORE
    table[list(RAW_VALUES[name])] = np.arange(len(RAW_VALUES[name]))
    return table


def raw_label_problem(name: str, histogram: Sequence[int]) -> str | None:
    """Describes values that do not occur in a benchmark's label files, if there are any.

    Args:
      name: of the benchmark.
      histogram: number of pixels of each value 0..255 in the file.
    """
    table = classes_of_raw_values(name)
    wrong = [value for value in range(256) if histogram[value] and table[value] == WRONG]
    if not wrong:
        return None
    known = [value for value in range(256) if table[value] != WRONG]
    if wrong[0] != IGNORE:
        cause = "instance or color labels: unpack the labels again"
    else:
        cause = "labels that were mapped to classes before: unpack the original ones" + (
            ", or name these *_labelTrainIds.png" if name == "cityscapes" else ""
        )
    return (
        f"value {wrong[0]} at {histogram[wrong[0]]} pixels does not occur in labels of {name}, which have {known[0]}.."
        f"{known[-1]}; likely {cause}"
    )


def label_problem(histogram: Sequence[int], num_classes: int) -> str | None:
    """Describes label values outside 0..K-1 and 255, if there are any.

    Args:
      histogram: number of pixels of each value 0..255.
      num_classes: K.
    """
    wrong = [value for value in range(num_classes, IGNORE) if histogram[value]]
    if not wrong:
        return None
    if wrong == [num_classes]:
        cause = "indices that count from 1 with 0 as void (subtract 1, and make 0 into 255), or one class name too few"
    elif set(wrong) <= _voc_grays():
        cause = "a palette picture of VOC turned gray (read the palette's indices instead)"
    elif num_classes == len(RAW_VALUES["cityscapes"]) and wrong[-1] <= max(RAW_VALUES["cityscapes"]):
        cause = "Cityscapes' raw labelIds (name them *_labelIds.png and read them with --config.dataset.name=cityscapes)"
    else:
        cause = "raw ids that were not mapped to classes, a color picture turned gray, or missing class names"
    return (
        f"label value {wrong[0]} at {histogram[wrong[0]]} pixels, expected 0..{num_classes - 1} for {num_classes} classes, or "
        f"{IGNORE} to ignore; likely {cause}"
    )


def _voc_grays() -> set[int]:
    """The brightness, by ITU-R 601, of VOC's 21 colors and of its border's."""
    colors = (*voc_palette(21), (224, 224, 192))
    return {round(0.299 * red + 0.587 * green + 0.114 * blue) for red, green, blue in colors}


def _parse(entries: Iterable[str]) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Returns the names and colors of entries "name R G B" or "name"; blank entries do not count."""
    entries = [entry.strip() for entry in entries if entry.strip()]
    names, colors = [], []
    for entry, color in zip(entries, voc_palette(len(entries)), strict=True):
        if match := re.fullmatch(r"(.+?)\s+(\d+)\s+(\d+)\s+(\d+)", entry):
            entry, color = match[1], (int(match[2]), int(match[3]), int(match[4]))
        names.append(entry)
        colors.append(color)
    return tuple(names), tuple(colors)
