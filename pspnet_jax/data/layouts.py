"""The directory layout of each dataset, as users unpack it. Directories may be local or gs://."""

import collections
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import folders, listing
from pspnet_jax.errors import MissingFileError, UserError

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


def list_pairs(dataset: ConfigDict, split: str) -> list[Pair]:
    """Lists a split, or several in the form "train+train_extra", each sorted by name. Names are unique.

    A pair's name is that of its image file without the extension, preceded by "SPLIT/" if "folder" has several splits.

    Args:
      dataset: config.dataset.
      split: for "folder", see `folders.find`; ade20k: training (train), validation (val); voc2012: train, train_aug, trainval,
        val, test; cityscapes: train, val, test, train_extra; pascal_context, coco_stuff, potsdam: train, val; loveda: train,
        val, test.

    Raises:
      UserError: a directory or list file is missing, or an image is in more than one of the splits.
    """
    name, root = dataset.name, os.path.expanduser(dataset.root).rstrip("/")
    expected = datasets.EXPECTED_FILES[name]
    if not root:
        raise UserError(f"dataset.root is empty: set --config.dataset.root to the directory with {expected}")
    parts = _parts(name, split)
    try:
        if not tf.io.gfile.isdir(root):
            raise MissingFileError(f"{root}: no such directory; correct --config.dataset.root or dataset.mixture")
        found = {part: LAYOUTS[name](root, part, dataset) for part in parts}
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


def count_problem(name: str, split: str, found: int) -> str | None:
    """Returns a sentence if a benchmark's split officially has another number of images than were found, or None."""
    counts = [datasets.COUNTS.get(name, {}).get(part, 0) for part in _parts(name, split)]
    if not all(counts) or sum(counts) == found:
        return None
    return f"{name} {split} officially has {sum(counts):,} images, but {found:,} were found"


def _parts(name: str, split: str) -> list[str]:
    """Returns the splits in "a+b" with aliases resolved, such as "train" to ADE20K's "training"."""
    parts = split.split("+")
    if not all(parts):
        raise UserError(f"split {split!r}: expected a name, or several names in the form 'train+val'")
    return [ALIASES.get(name, {}).get(part, part) for part in parts]


def _folder(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """The files that match dataset.images and dataset.labels."""
    return [Pair(*found) for found in folders.find(dataset, root, split)]


def _ade20k(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png."""
    root = _first_with("images", root, f"{root}/ADEChallengeData2016")
    return _raw_pairs(root, f"images/{split}", f"annotations/{split}")


def _coco_stuff(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png; mmsegmentation writes NAME_labelTrainIds.png next to these."""
    pairs = _raw_pairs(root, f"images/{split}", f"annotations/{split}")
    return [pair for pair in pairs if not pair.name.endswith("_labelTrainIds")]


def _loveda(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """SPLIT/{Rural,Urban}/images_png/NAME.png with masks_png/NAME.png; the test split has no labels."""
    return [
        pair._replace(name=f"{area}/{pair.name}")
        for area in ("Rural", "Urban")
        for pair in _raw_pairs(root, f"{split}/{area}/images_png", f"{split}/{area}/masks_png")
    ]


def _potsdam(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """img_dir/SPLIT/NAME.png with ann_dir/SPLIT/NAME.png."""
    return _raw_pairs(root, f"img_dir/{split}", f"ann_dir/{split}")


def _raw_pairs(root: str, images: str, labels: str) -> list[Pair]:
    """Pairs the files of the same name in two directories below root; labels have raw values."""
    return [Pair(*found, raw=True) for found in folders.match(root, f"{images}/{{name}}.*", f"{labels}/{{name}}.png", "")]


def _voc2012(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
    """JPEGImages/NAME.jpg with SegmentationClass/NAME.png, for the names in ImageSets/Segmentation/SPLIT.txt."""
    root = _first_with("JPEGImages", root, f"{root}/VOC2012", f"{root}/VOCdevkit/VOC2012")
    if split == "train_aug":
        return _voc2012_augmented(root, os.path.expanduser(dataset.extra_root).rstrip("/"))
    labeled = split != "test"
    return [
        Pair(name, f"{root}/JPEGImages/{name}.jpg", f"{root}/SegmentationClass/{name}.png" if labeled else "")
        for name in sorted(_names(f"{root}/ImageSets/Segmentation/{split}.txt"))
    ]


def _pascal_context(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
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


def _cityscapes(root: str, split: str, dataset: ConfigDict) -> list[Pair]:
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
    return [line.split()[0] for line in listing.read_lines(file)]


def _files(directory: str, extensions: Sequence[str]) -> dict[str, str]:
    """Returns {relative path without extension: full path} of the files with these extensions, of which there are some."""
    found, others = listing.find(directory, extensions)
    listing.warn_of_others(directory, others, f"are not {', '.join(extensions)} files")
    if not found:
        raise MissingFileError(f"{directory}: contains no {', '.join(extensions)} files")
    return found


LAYOUTS: dict[str, Callable[[str, str, ConfigDict], list[Pair]]] = {
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
