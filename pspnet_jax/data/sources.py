"""Where the image and label pairs are: a folder of files, the built-in scenes, or a TFDS dataset.

A source hands out examples by index, in any order, and checks what it hands out: no wrong label reaches the network silently.
"""

import concurrent.futures
import dataclasses
import functools
import io
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from pspnet_jax import datasets
from pspnet_jax.data import scenes
from pspnet_jax.data.checks import check_pair

logger = logging.getLogger(__name__)
CHECK_ALL = 5000  # up to this many pairs, every pixel of every label is looked at before training starts
CHECK_SOME = 1000  # of a larger folder, about this many, evenly spread; the others are looked at when they are loaded


class Source(Protocol):
    """Random access to labeled images."""

    @property
    def names(self) -> Sequence[str]:
        """One per example; of a file, the image's path relative to images/SPLIT, without its ending."""

    def __len__(self) -> int: ...

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (image uint8[H,W,3], label uint8[H,W]); graph code, index is an int64 scalar.

        Raises:
          tf.errors.OpError: the example is unreadable, sizes differ, or a label is outside 0..K-1 and 255; see `check`.
        """

    def check(self, index: int) -> None:
        """Raises a ValueError that says what is wrong with an example, and in which file."""


def open_source(dataset: ConfigDict, split: str) -> Source:
    """Opens one split of a recipe's dataset. A folder is checked here, once per process (files added later are not seen).

    Args:
      dataset: config.dataset.
      split: a subfolder of images/ and labels/, or a split of the scenes or the TFDS dataset.

    Raises:
      ValueError: the split is not there, or something in it is wrong: which file, and what to do.
    """
    num_classes = datasets.describe(dataset).num_classes
    root = os.path.expanduser(dataset.root).rstrip("/")
    if dataset.name == "folder":
        return _open_folder(root, split, num_classes)
    if dataset.name == "scenes":
        return _open_scenes(split, num_classes)
    if dataset.name == "tfds":
        return _open_tfds(dataset.tfds_name, root, split, num_classes)
    if not root or not tf.io.gfile.isdir(root):
        raise ValueError(
            f"dataset.name={dataset.name!r}: no files at --config.dataset.root={dataset.root!r}, expected a directory with "
            f"{datasets.LAYOUTS[dataset.name]}"
        )
    raise ValueError(
        f"dataset.name={dataset.name!r} at --config.dataset.root={dataset.root!r}: this version does not read "
        f"{datasets.LAYOUTS[dataset.name]} yet, only images/SPLIT and labels/SPLIT with --config.dataset.name=folder"
    )


class Folder:
    """ROOT/images/SPLIT/NAME.{jpg,jpeg,png} with ROOT/labels/SPLIT/NAME.png, 8-bit gray or palette PNGs of class indices.

    ROOT may be local or gs://; NAME may hold subfolders.
    """

    def __init__(self, root: str, split: str, num_classes: int):
        if not root:
            raise ValueError("dataset.root is empty: set --config.dataset.root to the directory that holds images/ and labels/")
        images = _files(f"{root}/images/{split}", (".jpg", ".jpeg", ".png"))
        if not tf.io.gfile.isdir(f"{root}/labels/{split}"):
            raise ValueError(
                f"{root}/labels/{split}: no such directory, so split {split!r} has no labels to train with or to be scored by; "
                f"--mode predict --input {root}/images/{split} segments its images, and --format writes what a benchmark's "
                "server scores"
            )
        labels = _files(f"{root}/labels/{split}", (".png",))
        for found, others, kind, partner in ((images, labels, "image", "label"), (labels, images, "label", "image")):
            if alone := sorted(found.keys() - others.keys()):
                raise ValueError(
                    f"{found[alone[0]]}: this {kind} has no {partner}, expected {root}/{partner}s/{split}/{alone[0]}.png"
                    f"{' (or .jpg)' if partner == 'image' else ''} ({len(alone)} of {len(found)} {kind}s have none)"
                )
        self.names = sorted(images)
        self.num_classes = num_classes
        self._images = tf.constant([images[name] for name in self.names])
        self._labels = tf.constant([labels[name] for name in self.names])
        self._files = [(images[name], labels[name]) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # Reads PNGs as well. The default transform differs from other decoders' (OpenCV, Pillow) by up to 6 levels, this not.
        image = tf.io.decode_jpeg(tf.io.read_file(self._images[index]), channels=3, dct_method="INTEGER_ACCURATE")
        contents = tf.io.read_file(self._labels[index])
        label = tf.cond(
            tf.strings.substr(contents, 25, 1) == "\x03",  # the color type in a PNG's header: 3 is palette
            lambda: tf.numpy_function(_palette_indices, [contents], tf.uint8, stateful=False),
            lambda: tf.io.decode_png(contents, channels=1)[..., 0],
        )
        return _checked(image, label, self.num_classes)

    def check(self, index: int, pixels: bool = True) -> None:
        """Raises a ValueError that names the file and what is wrong; without pixels, from the headers only."""
        image_file, label_file = self._files[index]
        check_pair(image_file, label_file, self.num_classes, pixels)

    def check_all(self) -> None:
        """Raises a ValueError about the first wrong pair of files, and says how many more there are."""
        stride = 1 if len(self) <= CHECK_ALL else len(self) // CHECK_SOME

        def problem(index: int) -> str | None:
            try:
                self.check(index, pixels=index % stride == 0)
            except ValueError as error:
                return str(error)
            return None

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            problems = [found for found in pool.map(problem, range(len(self))) if found]
        if problems:
            raise ValueError(problems[0] + (f" ({len(problems) - 1} more pairs are wrong, too)" if problems[1:] else ""))


@functools.lru_cache
def _open_folder(root: str, split: str, num_classes: int) -> Folder:
    start = time.monotonic()
    folder = Folder(root, split, num_classes)
    folder.check_all()
    logger.info(f"{root}, {split}: {len(folder)} pairs of files checked in {time.monotonic() - start:.1f} s")
    return folder


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples without files of their own: `read` returns the image uint8[H,W,3] and label uint8[H,W] of an index."""

    names: Sequence[str]
    num_classes: int
    read: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _checked(*self.read(index), self.num_classes)

    def check(self, index: int) -> None:
        try:
            image, label = (array.numpy() for array in self.read(tf.constant(index, tf.int64)))
        except (RuntimeError, tf.errors.OpError) as error:
            raise ValueError(f"{self.names[index]}: cannot be read ({str(error).splitlines()[0]})") from error
        if image.shape[:2] != label.shape:
            raise ValueError(f"{self.names[index]}: the image is {image.shape[:2]}, the label {label.shape} (height, width)")
        if problem := datasets.label_problem(np.bincount(label.ravel(), minlength=256).tolist(), self.num_classes):
            raise ValueError(f"{self.names[index]}: {problem}")


def _open_scenes(split: str, num_classes: int) -> Examples:
    if split not in scenes.SPLITS:
        raise ValueError(f"dataset.name='scenes' has no split {split!r}: expected one of {', '.join(scenes.SPLITS)}")

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.numpy_function(lambda i: scenes.scene(split, int(i)), [index], (tf.uint8, tf.uint8), stateful=False)

    return Examples(_numbered(split, scenes.SPLITS[split]), num_classes, read)


def _open_tfds(name: str, root: str, split: str, num_classes: int) -> Examples:
    try:
        builder = tfds.builder(name, data_dir=root or None)
        if name == "pspnet_scenes" and not builder.is_prepared():
            builder = tfds.builder(name, data_dir=root or None, file_format="array_record")
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"dataset.tfds_name={name!r}: TFDS knows no dataset of this name, nor is one at {root!r}") from error
    where = f"dataset.tfds_name={name!r} at {builder.data_path}"
    features = builder.info.features
    if not builder.is_prepared():
        raise ValueError(
            f"{where}: not prepared, run `tfds build {name} --file_format=array_record` with --data_dir={root or '...'}"
        )
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{where}: its files are {builder.info.file_format.value}, which cannot be read in any order; build it again, in "
            "another directory, with --file_format=array_record"
        )
    kinds = {key: (len(feature.shape), feature.shape[2:], feature.np_dtype) for key, feature in features.items()}
    if (kinds.get("image"), kinds.get("label")) != ((3, (3,), np.uint8), (3, (1,), np.uint8)):
        raise ValueError(f"{where}: has features {', '.join(features)}, expected image uint8[H,W,3] and label uint8[H,W,1]")
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except ValueError as error:
        raise ValueError(f"{where}: has no split {split!r}, expected one of {', '.join(builder.info.splits)}") from error

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        record = tf.numpy_function(lambda i: records[i], [index], tf.string, stateful=False)
        example = features.deserialize_example(tf.ensure_shape(record, []))
        return example["image"], example["label"][..., 0]

    return Examples(_numbered(split, len(records)), num_classes, read)


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{index:05d}" for index in range(count)]


def _files(directory: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Returns {path relative to the directory, without ending: whole path} of the files with these endings."""
    if not tf.io.gfile.isdir(directory):
        raise ValueError(f"{directory}: no such directory; dataset.root must hold images/SPLIT and labels/SPLIT")
    found: dict[str, str] = {}
    for parent, _, files in tf.io.gfile.walk(directory):
        for file in files:
            path = f"{parent}/{file}"
            name, ending = os.path.splitext(path[len(directory) + 1 :])
            if ending.lower() not in endings or file.startswith("."):
                continue
            if name in found:
                raise ValueError(f"{path} and {found[name]}: two files of one name, whose label is ambiguous; remove one")
            found[name] = path
    if not found:
        raise ValueError(f"{directory}: holds no {', '.join(endings)} files")
    return found


def _palette_indices(contents: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contents)))


def _checked(image: tf.Tensor, label: tf.Tensor, num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    image = tf.ensure_shape(image, [None, None, 3])
    label = tf.ensure_shape(label, [None, None])
    same_size = tf.reduce_all(tf.shape(image)[:2] == tf.shape(label))
    in_range = tf.cast(tf.reduce_max(label + 1), tf.int32) <= num_classes  # in uint8, 255 + 1 is 0
    with tf.control_dependencies([tf.debugging.Assert(same_size & in_range, ["sizes differ, or a label is out of range"])]):
        return tf.identity(image), tf.identity(label)
