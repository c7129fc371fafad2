"""Examples by index: from files, the built-in scenes, or a TFDS dataset.

A source hands out examples by index, in any order, and checks what it hands out: no wrong label reaches the network silently.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import cv2
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import checks, layouts, scenes
from pspnet_jax.data.checks import check_pair
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHECK_ALL = 5000  # up to this many pairs, every pixel of every label is looked at before training starts
CHECK_SOME = 1000  # of a larger folder, about this many, evenly spread; the others are looked at when they are loaded


class Source(Protocol):
    """Random access to labeled images."""

    @property
    def names(self) -> Sequence[str]:
        """One per example, see `layouts.Pair`."""

    def __len__(self) -> int: ...

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (image uint8[H,W,3], label uint8[H,W]); graph code, index is an int64 scalar.

        Raises:
          tf.errors.OpError: the example is unreadable, sizes differ, or a label is outside 0..K-1 and 255; see `check`.
        """

    def check(self, index: int) -> None:
        """Raises a ValueError that says what is wrong with an example, and in which file."""

    def files(self, index: int) -> Sequence[str]:
        """The files that an example is read from, which say by their time and size whether it may have changed."""


def open_source(dataset: ConfigDict, split: str, check: bool = True) -> Source:
    """Opens one split of a recipe's dataset. Files are checked here, once per process (those added later are not seen).

    Args:
      dataset: config.dataset.
      split: see `layouts.list_pairs`; or a split of the scenes or the TFDS dataset.
      check: whether to; otherwise all files are taken, for those who look at each themselves.

    Raises:
      ValueError: the split is not there, its classes are others, or something in it is wrong: which file, and what to do.
    """
    num_classes = datasets.describe(dataset).num_classes
    datasets.check_classes(dataset)
    root = os.path.expanduser(dataset.root).rstrip("/")
    if dataset.name in layouts.LAYOUTS:
        extra_root, on_error = os.path.expanduser(dataset.extra_root).rstrip("/"), dataset.on_error if check else ""
        return _open_files(dataset.name, root, extra_root, split, num_classes, on_error)
    if dataset.name == "scenes":
        return _open_scenes(split, num_classes)
    if dataset.name == "tfds":
        return _open_tfds(dataset.tfds_name, root, split, num_classes)
    raise ValueError(f"dataset.name={dataset.name!r}: expected one of {', '.join((*layouts.LAYOUTS, 'scenes', 'tfds'))}")


class Files:
    """Pairs of files: images JPEG or PNG; labels 8-bit gray or palette PNGs, or SBD's .mat files.

    Attributes:
      names: of the pairs, in order.
      images: their image files.
      skipped: a sentence for each pair that was left out because something is wrong with it.
    """

    def __init__(self, benchmark: str, pairs: Sequence[layouts.Pair], num_classes: int, on_error: str = "stop"):
        """Checks the pairs.

        Args:
          benchmark: whose values the raw labels have.
          pairs: all with labels.
          num_classes: K.
          on_error: "stop"; "skip", which leaves wrong pairs out; or "", which does not check them.

        Raises:
          ValueError: about the first wrong pair, and how many more there are; with "skip", when most are wrong, or a label's
            values are, which is no damage.
        """
        self.num_classes, self._benchmark = num_classes, benchmark
        self._pairs = list(pairs)
        self.skipped = self._check_all(on_error == "skip") if on_error else []
        self.names = [pair.name for pair in self._pairs]
        self.images = [pair.image for pair in self._pairs]
        self._images = tf.constant(self.images)
        self._labels = tf.constant([pair.label for pair in self._pairs])
        self._raw = tf.constant([pair.raw for pair in self._pairs])
        self._classes = datasets.classes_of_raw_values(benchmark) if any(pair.raw for pair in pairs) else None

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = _decode_image(tf.io.read_file(self._images[index]))
        contents = tf.io.read_file(self._labels[index])
        gray_png = (tf.strings.substr(contents, 1, 3) == "PNG") & (tf.strings.substr(contents, 25, 1) == "\x00")
        label = tf.cond(
            gray_png,  # the color type in its header
            lambda: tf.io.decode_png(contents, channels=1)[..., 0],
            lambda: tf.numpy_function(checks.decode_label, [contents], tf.uint8, stateful=False),
        )
        if self._classes is not None:
            to_classes = functools.partial(cv2.LUT, lut=self._classes)  # takes a tenth of tf.gather's time
            label = tf.cond(
                self._raw[index], lambda: tf.numpy_function(to_classes, [label], tf.uint8, stateful=False), lambda: label
            )
        return _checked(image, label, self.num_classes)

    def files(self, index: int) -> Sequence[str]:
        return self._pairs[index].image, self._pairs[index].label

    def check(self, index: int, pixels: bool = True) -> None:
        """Raises a ValueError that names the file and what is wrong; without pixels, from the headers only."""
        pair = self._pairs[index]
        check_pair(pair.image, pair.label, self.num_classes, pixels, self._benchmark if pair.raw else None)

    def _check_all(self, skip: bool) -> list[str]:
        """Returns a sentence for each pair that it left out."""
        everything = skip or len(self._pairs) <= CHECK_ALL
        stride = 1 if everything else len(self._pairs) // CHECK_SOME

        def problem(index: int) -> ValueError | None:
            try:
                self.check(index, pixels=index % stride == 0)
            except ValueError as error:
                return error
            return None

        found = []
        with concurrent.futures.ThreadPoolExecutor(32) as pool, progress("checking files", len(self._pairs)) as advance:
            for error in pool.map(problem, range(len(self._pairs))):
                found.append(error)
                advance(1)
        problems = sorted(filter(None, found), key=lambda error: not isinstance(error, checks.WrongValues))
        if problems and not (skip and len(problems) <= len(found) // 2 and not isinstance(problems[0], checks.WrongValues)):
            raise ValueError(f"{problems[0]}" + (f" ({len(problems) - 1} more pairs are wrong, too)" if problems[1:] else ""))
        self._pairs = [pair for pair, error in zip(self._pairs, found, strict=True) if not error]
        return list(map(str, problems))


@functools.lru_cache
def _open_files(name: str, root: str, extra_root: str, split: str, num_classes: int, on_error: str) -> Files:
    start = time.monotonic()
    pairs = layouts.list_pairs(name, root, split, extra_root)
    if unlabeled := [pair.image for pair in pairs if not pair.label]:
        raise ValueError(
            f"{unlabeled[0]}: split {split!r} has no labels to train with or to be scored by"
            f"{f', as there is no {root}/labels/{split}' if name == 'folder' else ''}; "
            f"--mode predict with --config.eval.split={split} segments its images, and --format writes what a benchmark's "
            "server scores"
        )
    files = Files(name, pairs, num_classes, on_error)
    if not on_error:
        return files
    logger.info(f"{root}, {split}: {len(files)} pairs of files checked in {time.monotonic() - start:.1f} s")
    for sentence in files.skipped[:5]:
        logger.warning("skipped: %s", sentence)
    if len(files.skipped) > 5:
        logger.warning("skipped %s pairs in all", len(files.skipped))
    count = layouts.official_count(name, split)
    if count not in (None, len(files)):
        logger.warning(f"{name} {split} has {count:,} images officially, here {len(files):,}")
    return files


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples without files of their own: `read` returns the image uint8[H,W,3] and label uint8[H,W] of an index.

    `written` are files that are written anew whenever examples change.
    """

    names: Sequence[str]
    num_classes: int
    read: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    written: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _checked(*self.read(index), self.num_classes)

    def files(self, index: int) -> Sequence[str]:
        return self.written

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
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise ValueError(
            f"dataset.tfds_name={name!r}: TFDS knows no dataset of this name, nor is one at {root!r}; those named pspnet_... "
            "have to be prepared first, see pspnet_jax/data/builders.py"
        ) from error
    where = f"dataset.tfds_name={name!r} at {builder.data_path}"
    features = builder.info.features
    if not builder.is_prepared():
        raise ValueError(
            f"{where}: not prepared; run `tfds build {name} --file_format=array_record --data_dir={root or 'DIR'}`"
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
        record = tf.ensure_shape(tf.numpy_function(lambda i: records[i], [index], tf.string, stateful=False), [])
        example = features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
        return _decode_image(example["image"]), example["label"][..., 0]

    return Examples(_numbered(split, len(records)), num_classes, read, [f"{builder.data_path}/dataset_info.json"])


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{index:05d}" for index in range(count)]


def _decode_image(contents: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG or PNG to uint8[H,W,3]."""
    # Reads PNGs as well. The default transform differs from other decoders' (OpenCV, Pillow) by up to 6 levels, this not.
    return tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")


def _checked(image: tf.Tensor, label: tf.Tensor, num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    image = tf.ensure_shape(image, [None, None, 3])
    label = tf.ensure_shape(label, [None, None])
    same_size = tf.reduce_all(tf.shape(image)[:2] == tf.shape(label))
    in_range = tf.cast(tf.reduce_max(label + 1), tf.int32) <= num_classes  # in uint8, 255 + 1 is 0
    with tf.control_dependencies([tf.debugging.Assert(same_size & in_range, ["sizes differ, or a label is out of range"])]):
        return tf.identity(image), tf.identity(label)
