"""The directory layout of each dataset, as users unpack it. Directories may be local or gs://."""

import collections
import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import tensorflow as tf

from pspnet_jax import datasets, image_files
from pspnet_jax.data.names import check_partners
from pspnet_jax.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)
MAX_LISTED = 3  # files in a warning
IMAGES = image_files.SUFFIXES
LABELS = (".png", ".tif", ".tiff")
ALIASES = {
    "ade20k": {"train": "training", "val": "validation"},
    "coco_stuff": {"train": "train2017", "val": "val2017"},
    "loveda": {"train": "Train", "val": "Val", "test": "Test"},
}


class Pair(NamedTuple):
    """An image and its label.

    Attributes:
      name: identifies the pair in messages and prediction files.
      image: the image file.
      label: the label file; "" if the split has no public labels. Either file may be missing, see `checks.check_pair`.
      raw: whether the label has the benchmark's raw values (see `datasets.RAW_VALUES`) instead of class indices.
    """

    name: str
    image: str
    label: str
    raw: bool = False


def list_pairs(name: str, root: str, split: str, extra_root: str = "") -> list[Pair]:
    """Lists a split, or several in the form "train+train_extra", each sorted by name. Names are unique.

    A pair's name is that of its image file without the extension, preceded by "SPLIT/" if "folder" has several splits.

    Args:
      name: config.dataset.name.
      root: the dataset's directory.
      split: for "folder", a subfolder of images/ and labels/; ade20k: training (train), validation (val); voc2012: train,
        train_aug, trainval, val, test; cityscapes: train, val, test, train_extra; pascal_context, coco_stuff, potsdam: train,
        val; loveda: train, val, test.
      extra_root: SBD's directory, for voc2012.

    Raises:
      UserError: a directory or list file is missing, or an image is in more than one of the splits.
    """
    expected = datasets.EXPECTED_FILES[name]
    if not root:
        raise UserError(f"dataset.root is empty: set --config.dataset.root to the directory with {expected}")
    parts = _parts(name, split)
    try:
        if not tf.io.gfile.isdir(root):
            raise MissingFileError(f"{root}: no such directory; correct --config.dataset.root or dataset.mixture")
        found = {part: LAYOUTS[name](root, part, extra_root) for part in parts}
    except MissingFileError as error:
        raise MissingFileError(f"dataset.name={name!r}: {error}; expected {expected}") from error
    except tf.errors.OpError as error:  # permissions or the network
        raise UserError(f"{root}: cannot be read ({error.message}); check --config.dataset.root or dataset.mixture") from error
    pairs = [pair for part in parts for pair in found[part]]
    if name == "folder" and len(parts) > 1:  # different splits may have the same file names
        pairs = [pair._replace(name=f"{part}/{pair.name}") for part in parts for pair in found[part]]
    if not pairs:
        raise UserError(f"split {split!r} of {root} has no images")
    name, number = collections.Counter(pair.name for pair in pairs).most_common(1)[0]
    if number > 1:
        raise UserError(f"split {split!r} contains {name} {number} times; list each split and image only once")
    return pairs


def official_count(name: str, split: str) -> int | None:
    """Returns the official number of images of a benchmark's split, or None if it is unknown."""
    counts = [datasets.COUNTS.get(name, {}).get(part, 0) for part in _parts(name, split)]
    return sum(counts) if all(counts) else None


def _parts(name: str, split: str) -> list[str]:
    """Returns the splits in "a+b" with aliases resolved, such as "train" to ADE20K's "training"."""
    parts = split.split("+")
    if not all(parts):
        raise UserError(f"split {split!r}: expected a name, or several names in the form 'train+val'")
    return [ALIASES.get(name, {}).get(part, part) for part in parts]


def _folder(root: str, split: str, extra_root: str) -> list[Pair]:
    """ROOT/images/SPLIT/NAME.{jpg,jpeg,png} with ROOT/labels/SPLIT/NAME.png; NAME may contain subfolders."""
    return _paired(f"{root}/images/{split}", f"{root}/labels/{split}", raw=False)


def _ade20k(root: str, split: str, extra_root: str) -> list[Pair]:
    """images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png."""
    root = _first_with("images", root, f"{root}/ADEChallengeData2016")
    return _paired(f"{root}/images/{split}", f"{root}/annotations/{split}", raw=True)


def _coco_stuff(root: str, split: str, extra_root: str) -> list[Pair]:
    """images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png; mmsegmentation writes NAME_labelTrainIds.png next to these."""
    return _paired(f"{root}/images/{split}", f"{root}/annotations/{split}", raw=True, other="_labelTrainIds")


def _loveda(root: str, split: str, extra_root: str) -> list[Pair]:
    """SPLIT/{Rural,Urban}/images_png/NAME.png with masks_png/NAME.png; the test split has no labels."""
    return [
        pair._replace(name=f"{area}/{pair.name}")
        for area in ("Rural", "Urban")
        for pair in _paired(f"{root}/{split}/{area}/images_png", f"{root}/{split}/{area}/masks_png", raw=True)
    ]


def _potsdam(root: str, split: str, extra_root: str) -> list[Pair]:
    """img_dir/SPLIT/NAME.png with ann_dir/SPLIT/NAME.png."""
    return _paired(f"{root}/img_dir/{split}", f"{root}/ann_dir/{split}", raw=True)


def _paired(image_directory: str, label_directory: str, raw: bool, other: str = "") -> list[Pair]:
    """Pairs the files of the same name in two directories; pairs have no labels if there is no label directory.

    Labels whose names end in `other` are left out.
    """
    images = _files(image_directory, IMAGES)
    if not tf.io.gfile.isdir(label_directory):
        return [Pair(name, images[name], "", raw) for name in sorted(images)]
    labels = {name: path for name, path in _files(label_directory, LABELS).items() if not (other and name.endswith(other))}
    check_partners(images, labels, label_directory)
    return [
        Pair(name, images.get(name, f"{image_directory}/{name}.jpg"), labels.get(name, f"{label_directory}/{name}.png"), raw)
        for name in sorted(images.keys() | labels.keys())
    ]


def _voc2012(root: str, split: str, extra_root: str) -> list[Pair]:
    """JPEGImages/NAME.jpg with SegmentationClass/NAME.png, for the names in ImageSets/Segmentation/SPLIT.txt."""
    root = _first_with("JPEGImages", root, f"{root}/VOC2012", f"{root}/VOCdevkit/VOC2012")
    if split == "train_aug":
        return _voc2012_augmented(root, extra_root)
    labeled = split != "test"
    return [
        Pair(name, f"{root}/JPEGImages/{name}.jpg", f"{root}/SegmentationClass/{name}.png" if labeled else "")
        for name in sorted(_names(f"{root}/ImageSets/Segmentation/{split}.txt"))
    ]


def _pascal_context(root: str, split: str, extra_root: str) -> list[Pair]:
    """JPEGImages/NAME.jpg with SegmentationClassContext/NAME.png, for the names in ImageSets/SegmentationContext/SPLIT.txt."""
    root = _first_with("SegmentationClassContext", root, f"{root}/VOC2010", f"{root}/VOCdevkit/VOC2010")
    return [
        Pair(name, f"{root}/JPEGImages/{name}.jpg", f"{root}/SegmentationClassContext/{name}.png", raw=True)
        for name in sorted(_names(f"{root}/ImageSets/SegmentationContext/{split}.txt"))
    ]


def _voc2012_augmented(root: str, extra_root: str) -> list[Pair]:
    """VOC's train split and SBD's train and val splits, without VOC's val split: 10,582 images in total.

    The labels of SBD (Hariharan et al. 2011) are read from its .mat files, or from a folder SegmentationClassAug with PNG
    versions of them, as third parties distribute them (with or without VOC's train split). Images of VOC's train split keep
    VOC's labels, which are better, unless that folder has its own.
    """
    train, val = (set(_names(f"{root}/ImageSets/Segmentation/{split}.txt")) for split in ("train", "val"))
    ready = f"{root}/SegmentationClassAug"
    if not extra_root and tf.io.gfile.isdir(ready):
        labels = {name: f"{root}/SegmentationClass/{name}.png" for name in train} | _files(ready, (".png",))
        return [Pair(name, f"{root}/JPEGImages/{name}.jpg", labels[name]) for name in sorted(labels.keys() - val)]
    if extra_root:
        candidates = [extra_root, f"{extra_root}/dataset", f"{extra_root}/benchmark_RELEASE/dataset"]
    else:
        parent = os.path.dirname(root)
        candidates = [f"{place}/benchmark_RELEASE/dataset" for place in (os.path.dirname(parent), parent, root)]
    sbd = _first_with("cls", *candidates)
    added = {name for split in ("train", "val") for name in _names(f"{sbd}/{split}.txt")} - val - train
    in_voc = {file.removesuffix(".jpg") for file in tf.io.gfile.listdir(f"{root}/JPEGImages")}
    return [
        Pair(
            name,
            f"{root}/JPEGImages/{name}.jpg" if name in in_voc else f"{sbd}/img/{name}.jpg",
            f"{root}/SegmentationClass/{name}.png" if name in train else f"{sbd}/cls/{name}.mat",
        )
        for name in sorted(train | added)
    ]


def _cityscapes(root: str, split: str, extra_root: str) -> list[Pair]:
    """leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with gtFine (train_extra: gtCoarse) .../NAME_*_labelIds.png.

    If there are no labelIds files, the class indices are read from *_labelTrainIds.png.
    """
    ground_truth = "gtCoarse" if split == "train_extra" else "gtFine"
    found = _files(f"{root}/leftImg8bit/{split}", (".png",))
    images = {os.path.basename(name).removesuffix("_leftImg8bit"): path for name, path in found.items()}
    if split == "test":  # its published label files are blank
        return [Pair(f"{name}_leftImg8bit", path, "") for name, path in sorted(images.items())]
    files = _files(f"{root}/{ground_truth}/{split}", (".png",))
    for kind in ("labelIds", "labelTrainIds"):
        ending = f"_{ground_truth}_{kind}"
        labels = {os.path.basename(n).removesuffix(ending): p for n, p in files.items() if n.endswith(ending)}
        if labels:
            break
    return [
        Pair(
            f"{name}_leftImg8bit",
            images.get(name, f"{root}/leftImg8bit/{split}/{name.split('_')[0]}/{name}_leftImg8bit.png"),
            labels.get(name, f"{root}/{ground_truth}/{split}/{name.split('_')[0]}/{name}_{ground_truth}_labelIds.png"),
            kind == "labelIds",
        )
        for name in sorted(images.keys() | labels.keys())
    ]


def _first_with(folder: str, *places: str) -> str:
    """Returns the first of these directories that contains the folder."""
    for place in places:
        if tf.io.gfile.isdir(f"{place}/{folder}"):
            return place
    raise MissingFileError(f"found no {folder}/ in {', '.join(places)}")


def _names(file: str) -> list[str]:
    """Returns the first word of each line."""
    if not tf.io.gfile.exists(file):
        raise MissingFileError(f"{file}: no such file; it should list the image names of a split")
    try:
        with tf.io.gfile.GFile(file) as lines:
            text = lines.read().removeprefix("\ufeff")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def _files(directory: str, extensions: Sequence[str]) -> dict[str, str]:
    """Returns {relative path without extension: full path} of the files with these extensions."""
    if not tf.io.gfile.isdir(directory):
        parent = os.path.dirname(directory)
        siblings = ", ".join(sorted(tf.io.gfile.listdir(parent))[:8]) if tf.io.gfile.isdir(parent) else ""
        raise MissingFileError(f"{directory}: no such directory" + (f"; {parent} contains {siblings}" if siblings else ""))
    found: dict[str, str] = {}
    others = []
    for path in _walk(directory):
        name, extension = os.path.splitext(path[len(directory) + 1 :])
        name, extension = unicodedata.normalize("NFC", name), extension.lower()  # macOS decomposes accented characters
        if extension not in extensions:
            others.append(path)
            continue
        if name in found:
            raise UserError(f"{path} and {found[name]}: two files of the same name, so their label is ambiguous; remove one")
        found[name] = path
    if others:
        logger.warning(
            f"{directory}: {len(others):,} files are ignored because they are not {', '.join(extensions)} files: "
            f"{', '.join(others[:MAX_LISTED])}{', ...' if len(others) > MAX_LISTED else ''}"
        )
    if not found:
        raise MissingFileError(f"{directory}: contains no {', '.join(extensions)} files")
    return found


def _walk(directory: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the files below a directory, except hidden ones; `above` are the real paths of its parent directories.

    In a bucket, a name with a "." and without a trailing "/" is assumed to be a file. Asking the server about each would take
    minutes.
    """
    remote = "://" in directory
    if not remote:
        if (real := os.path.realpath(directory)) in above:
            raise UserError(f"{directory}: links to one of its parent directories; remove the link")
        above = (*above, real)
    for entry in _entries(directory):
        path = f"{directory}/{entry.rstrip('/')}"
        if entry.startswith("."):
            continue
        if entry.endswith("/") or (("." not in entry or not remote) and tf.io.gfile.isdir(path)):
            yield from _walk(path, above)
        else:
            yield path


def _entries(directory: str) -> list[str]:
    try:
        return tf.io.gfile.listdir(directory)
    except UnicodeDecodeError as error:
        name = error.object.decode(errors="backslashreplace")
        raise UserError(f"{directory}: contains {name}, whose name is not UTF-8; rename it") from error


LAYOUTS: dict[str, Callable[[str, str, str], list[Pair]]] = {
    "folder": _folder,
    "ade20k": _ade20k,
    "voc2012": _voc2012,
    "cityscapes": _cityscapes,
    "pascal_context": _pascal_context,
    "coco_stuff": _coco_stuff,
    "loveda": _loveda,
    "potsdam": _potsdam,
}
assert LAYOUTS.keys() == datasets.EXPECTED_FILES.keys() >= datasets.RAW_VALUES.keys()
