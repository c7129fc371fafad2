"""Sources of examples: files, the built-in scenes, and TFDS datasets. For a source of your own, see reader.py."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import cv2
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import datasets, image_files
from pspnet_jax.data import checks, label_files, layouts, scenes, screening, stamps
from pspnet_jax.data.reader import Example, Source, decode_image, numbered
from pspnet_jax.data.tfds_source import Tfds
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import RGB8, PixelFormat
from pspnet_jax.large_files import find_large, is_large, open_image

logger = logging.getLogger(__name__)


def open_source(dataset: ConfigDict, split: str, check: bool = True, channels: int = 3) -> Source:
    """Opens one split of a recipe's dataset.

    Args:
      dataset: config.dataset.
      split: see `layouts.list_pairs`; or a split of the scenes or of the TFDS dataset.
      check: whether to check the files, see screening.py; otherwise all are included.
      channels: of the images, config.model.channels.

    Raises:
      UserError: the split does not exist, has other classes than the recipe, or a file is wrong.
    """
    if dataset.name in layouts.LAYOUTS:
        return _open_files(dataset, split, check, PixelFormat(channels, dataset.image_dtype))
    datasets.check_classes(dataset)
    if dataset.name in NON_FILE_SOURCES:
        source = NON_FILE_SOURCES[dataset.name](dataset, split, datasets.describe(dataset).num_classes)
        check_pixel_format(source, channels, dataset.image_dtype)
        return source
    raise UserError(f"dataset.name={dataset.name!r}: expected one of {', '.join((*layouts.LAYOUTS, *NON_FILE_SOURCES))}")


def check_pixel_format(source: Source, channels: int, dtype: str) -> None:
    """Raises a UserError if a source's images are not those that the config names."""
    if source.pixel_format != (channels, dtype):
        channels, dtype = source.pixel_format
        raise UserError(
            f"the images of {source.names[0]} to {source.names[-1]} are {dtype} with {channels} channels; set "
            f"--config.model.channels={channels} --config.dataset.image_dtype={dtype}"
        )


def training_parts(dataset: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """Yields (config.dataset, split) for each part of the training data: the dataset itself and those of dataset.mixture."""
    yield dataset, dataset.train_split
    class_names = datasets.describe(dataset).class_names
    for name, root, split, _ in dataset.mixture:
        part = dataset.copy_and_resolve_references()
        part.name, part.root, part.class_names = name, os.path.expanduser(root), class_names
        yield part, split


class Files(Source):
    """Pairs of files: images of `image_files` with labels as 8-bit gray or palette PNGs, as SBD's .mat files, or with a reader.

    Attributes:
      pairs: the files; every pair has a label.
    """

    def __init__(
        self,
        dataset: ConfigDict,
        pairs: Sequence[layouts.Pair],
        screened: screening.Screened | None = None,
        pixel_format: PixelFormat = RGB8,
    ):
        """Stores the pairs without checking them.

        Args:
          dataset: config.dataset, which names the classes and says how labels are read.
          pairs: the files.
          screened: the result of checking these pairs, if they were checked.
          pixel_format: of the images.
        """
        class_names = datasets.describe(dataset).class_names
        self.num_classes, self._benchmark, self.pairs, self.pixel_format = len(class_names), dataset.name, pairs, pixel_format
        self._reader = label_files.reader(dataset, class_names, [pair.label for pair in pairs])
        self.reading = repr(self._reader.classes) if self._reader else ""
        if screened:
            self.totals, self.fingerprint, self.image_sizes = screened.totals, screened.fingerprint, screened.sizes
            self.palette = screened.palette
        else:
            self.image_sizes = stamps.sizes(stamps.stats([pair.image for pair in pairs]))
        self.names = [pair.name for pair in pairs]
        self._classes = datasets.classes_of_raw_values(dataset.name) if any(pair.raw for pair in pairs) else None

        self._images = tf.constant([pair.image for pair in pairs])
        self._labels = tf.constant([pair.label for pair in pairs])
        self._raw = tf.constant([pair.raw for pair in pairs])
        self._orientations = tf.constant(screened.orientations, tf.int64) if screened else None
        self._upright = screened is not None and set(screened.orientations) == {1}
        self._large = find_large([pair.image for pair in pairs])
        self.by_windows, self.in_graph = bool(self._large), not self._large
        self._is_read_in_graph = [checks.is_read_in_graph(pair.image, pixel_format) for pair in pairs]

    def load(self, index: int) -> Example:
        if index in self._large:
            return self._open_large(index)
        image, label = self._load(tf.constant(index, tf.int64))
        return np.asarray(image), np.asarray(label)

    def _open_large(self, index: int) -> Example:
        """Opens an image, and its label unless that is a file of another kind, to be read by windows."""
        image_file, label_file = self.files(index)
        image: Any = open_image(image_file, self.pixel_format)
        if self._reader and is_large(label_file):
            return image, cast(Any, checks.open_large_label(label_file, self._reader))
        return image, self._label(tf.constant(index)).numpy()

    def read_label(self, index: int) -> np.ndarray:
        if index not in self._large:
            with contextlib.suppress(Exception):  # explained by `read`
                label = self._load_label(tf.constant(index, tf.int64)).numpy()
                if not checks.has_wrong_value(label, self.num_classes):
                    return label
        return super().read_label(index)

    @functools.cached_property
    def _load_label(self) -> Callable[[tf.Tensor], tf.Tensor]:
        return tf.function(self._label, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64))

    @functools.cached_property
    def _load(self) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
        return tf.function(self.tensors, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64))

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return self._image(index), self._label(index)

    def _label(self, index: tf.Tensor) -> tf.Tensor:
        if self._reader:
            files = self._labels[index], self._images[index]
            json = tf.strings.regex_full_match(files[0], r"(?i).*\.json")
            contents = tf.cond(json, lambda: b"", lambda: tf.io.read_file(files[0]))
            return tf.numpy_function(self._reader.read, [*files, contents], tf.uint8, stateful=False)
        contents = tf.io.read_file(self._labels[index])
        gray_png = (tf.strings.substr(contents, 1, 3) == "PNG") & (tf.strings.substr(contents, 24, 2) == b"\x08\x00")
        label = tf.cond(
            gray_png,  # 8 bits and color type 0 in its header
            lambda: tf.io.decode_png(contents, channels=1)[..., 0],
            lambda: tf.numpy_function(checks.decode_label, [contents], tf.uint8, stateful=False),
        )
        if self._classes is not None:
            to_classes = functools.partial(cv2.LUT, lut=self._classes)  # takes a tenth of tf.gather's time
            label = tf.cond(
                self._raw[index], lambda: tf.numpy_function(to_classes, [label], tf.uint8, stateful=False), lambda: label
            )
        return label

    def _image(self, index: tf.Tensor) -> tf.Tensor:
        """Returns an image, decoded by TensorFlow if `checks.is_read_in_graph`, or else by the function of prediction."""
        orientation = None if self._orientations is None else self._orientations[index]
        contents, name = tf.io.read_file(self._images[index]), self._images[index]
        decode = functools.partial(_decode, self.pixel_format)  # without `self`, which TensorFlow would keep

        def in_graph() -> tf.Tensor:
            return decode_image(contents, orientation, self._upright)

        def in_python() -> tf.Tensor:
            return tf.numpy_function(decode, [contents, name], self.pixel_format.dtype, stateful=False)

        if len(kinds := set(self._is_read_in_graph)) == 1:
            return in_graph() if kinds == {True} else in_python()
        return tf.cond(tf.constant(self._is_read_in_graph)[index], in_graph, in_python)

    def check(self, index: int) -> checks.CheckedPair:
        _, image, label, raw = self.pairs[index]
        benchmark = self._benchmark if raw else None
        return checks.check_pair(image, label, self.num_classes, True, benchmark, self._reader, self.pixel_format)

    def where(self, index: int) -> str:
        return " or ".join(self.files(index))

    def files(self, index: int) -> Sequence[str]:
        return self.pairs[index].image, self.pairs[index].label


def _decode(pixel_format: PixelFormat, contents: bytes, name: bytes) -> np.ndarray:
    return image_files.decode(contents, name.decode(), pixel_format)


def _open_files(dataset: ConfigDict, split: str, check: bool, pixel_format: PixelFormat) -> Files:
    name, root = dataset.name, os.path.expanduser(dataset.root).rstrip("/")

    def list_pairs() -> list[layouts.Pair]:
        datasets.check_classes(dataset)
        pairs = layouts.list_pairs(dataset, split)
        if unlabeled := [pair.image for pair in pairs if not pair.label]:
            raise UserError(
                f"{unlabeled[0]}: split {split!r} has no labels for training or evaluation"
                f"{', because the directory of dataset.labels does not exist' if name == 'folder' else ''}; "
                f"--mode predict with --config.eval.split={split} segments its images, and --format writes the files that a "
                "benchmark's server expects"
            )
        return pairs

    screened = screening.screen(list_pairs, dataset, f"{root}, {split}", pixel_format) if check else None
    pairs = screened.pairs if screened else list_pairs()
    if check and (problem := layouts.count_problem(name, split, len(pairs))):
        logger.warning(problem)
    return Files(dataset, pairs, screened, pixel_format)


class Scenes(Source):
    """The built-in scenes of scenes.py, rendered as they are read."""

    def __init__(self, dataset: ConfigDict, split: str, num_classes: int):
        if split not in scenes.SPLITS:
            raise UserError(f"dataset.name='scenes' has no split {split!r}: expected one of {', '.join(scenes.SPLITS)}")
        self._split, self.num_classes = split, num_classes
        self.names = numbered(split, scenes.SPLITS[split])

    def load(self, index: int) -> Example:
        return scenes.scene(self._split, index)

    def files(self, index: int) -> Sequence[str]:
        return (scenes.__file__,)


NON_FILE_SOURCES = {"scenes": Scenes, "tfds": Tfds}
