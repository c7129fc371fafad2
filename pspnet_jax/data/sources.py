"""Examples by index: from files, the built-in scenes, a TFDS dataset, or a reader of your own.

A reader of your own is a subclass of `Source` that has names and loads an example; nothing has to be registered:

    class Archive(sources.Source):
        num_classes = 3

        def __init__(self, path):
            self.arrays = np.load(path)  # images uint8[N,H,W,3], labels uint8[N,H,W]
            self.names = [f"{i:05d}" for i in range(len(self.arrays["labels"]))]

        def load(self, index):
            return self.arrays["images"][index], self.arrays["labels"][index]

    data = pipeline.open_training(config, source=Archive("train.npz"))
    batches = pipeline.as_numpy(pipeline.train_dataset(config, data=data))
    examples = pipeline.as_numpy(pipeline.eval_dataset(config, source=Archive("val.npz")))
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict, FrozenConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import checks, layouts, scenes, screening
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Example = tuple[np.ndarray, np.ndarray]  # image uint8[H,W,3] and label uint8[H,W]


class Source:
    """Labeled images by index, in any order and from any thread: a subclass provides the attributes and `load`.

    Attributes:
      names: one per example, see `layouts.Pair`.
      num_classes: K.
      in_graph: whether `tensors` loads an example by TensorFlow alone, which is faster than Python.
    """

    names: Sequence[str]
    num_classes: int
    in_graph = False

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Example:
        """Returns image uint8[H,W,3] and label uint8[H,W], of 0..K-1 and 255; what it raises becomes a sentence in `read`."""
        raise NotImplementedError

    def read(self, index: int) -> Example:
        """Returns what `load` does, after a look at it, so that no wrong label reaches the network silently.

        Raises:
          UserError: names the example and says what is wrong with it.
        """
        try:
            image, label = self.load(index)
        except Exception as error:  # whatever a decoder raises
            self.check(index)
            where, reason = self.where(index), _reason(error)
            raise UserError(f"{where}: cannot be loaded ({reason}); replace it or remove the pair") from error
        if problem := checks.example_problem(image, label, self.num_classes):
            self.check(index)
            raise UserError(f"{self.where(index)}: {problem}")
        return image, label

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Does the same as `load` as graph code, where `in_graph` is set; index is an int64 scalar."""
        raise NotImplementedError

    def checked_tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `tensors` does, unless sizes differ or a label is wrong; `read` then says in a sentence what it is."""
        image, label = self.tensors(index)
        image, label = tf.ensure_shape(image, [None, None, 3]), tf.ensure_shape(label, [None, None])
        same_size = tf.reduce_all(tf.shape(image)[:2] == tf.shape(label))
        in_range = tf.cast(tf.reduce_max(label + 1), tf.int32) <= self.num_classes  # in uint8, 255 + 1 is 0
        with tf.control_dependencies([tf.debugging.Assert(same_size & in_range, ["a wrong example"])]):
            return tf.identity(image), tf.identity(label)

    def check(self, index: int) -> None:
        """Looks closer than `load` does, and raises a UserError that says what is wrong with an example, if it can tell."""

    def where(self, index: int) -> str:
        """What messages call an example."""
        return self.names[index]

    def files(self, index: int) -> Sequence[str]:
        """The files that change when the example does; without any, nothing about the example is kept from run to run."""
        return ()


def open_source(dataset: ConfigDict, split: str, check: bool = True) -> Source:
    """Opens one split of a recipe's dataset. Files are checked, once for each set of files: see screening.py.

    Args:
      dataset: config.dataset.
      split: see `layouts.list_pairs`; or a split of the scenes or the TFDS dataset.
      check: whether to; otherwise all files are taken, for those who look at each themselves.

    Raises:
      UserError: the split is not there, its classes are others, or something in it is wrong: which file, and what to do.
    """
    if dataset.name in layouts.LAYOUTS:
        return _open_files(FrozenConfigDict(dataset), split, check)
    datasets.check_classes(dataset)
    if dataset.name in OTHERS:
        return OTHERS[dataset.name](dataset, split, datasets.describe(dataset).num_classes)
    raise UserError(f"dataset.name={dataset.name!r}: expected one of {', '.join((*layouts.LAYOUTS, *OTHERS))}")


def training_parts(dataset: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """Yields a config.dataset and a split for each part of the training data: dataset's own, and those of dataset.mixture."""
    yield dataset, dataset.train_split
    class_names = datasets.describe(dataset).class_names
    for name, root, split, _ in dataset.mixture:
        part = dataset.copy_and_resolve_references()
        part.name, part.root, part.class_names = name, os.path.expanduser(root), class_names
        yield part, split


class Files(Source):
    """Pairs of files: images JPEG or PNG; labels 8-bit gray or palette PNGs, or SBD's .mat files.

    Attributes:
      pairs: all with labels.
    """

    def __init__(self, benchmark: str, pairs: Sequence[layouts.Pair], num_classes: int):
        """Takes the pairs as they are; `benchmark` is a key of `datasets.RAW_VALUES` where there are raw labels."""
        self.pairs, self.num_classes, self._benchmark = pairs, num_classes, benchmark
        self.names = [pair.name for pair in pairs]
        self._classes = datasets.classes_of_raw_values(benchmark) if any(pair.raw for pair in pairs) else None

        self._images = tf.constant([pair.image for pair in pairs])
        self._labels = tf.constant([pair.label for pair in pairs])
        self._raw = tf.constant([pair.raw for pair in pairs])

    in_graph = True

    def load(self, index: int) -> Example:
        image, label = self._load(tf.constant(index, tf.int64))
        return np.asarray(image), np.asarray(label)

    @functools.cached_property
    def _load(self) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
        function = tf.function(self.tensors, input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
        return function.get_concrete_function()

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
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
        return _decode_image(tf.io.read_file(self._images[index])), label

    def check(self, index: int) -> None:
        _, image, label, raw = self.pairs[index]
        checks.check_pair(image, label, self.num_classes, True, self._benchmark if raw else None)

    def where(self, index: int) -> str:
        return " or ".join(self.files(index))

    def files(self, index: int) -> Sequence[str]:
        return self.pairs[index].image, self.pairs[index].label


@functools.lru_cache
def _open_files(dataset: FrozenConfigDict, split: str, check: bool) -> Files:
    name, num_classes = dataset.name, datasets.describe(dataset).num_classes
    root, extra_root = (os.path.expanduser(path).rstrip("/") for path in (dataset.root, dataset.extra_root))

    def list_pairs() -> list[layouts.Pair]:
        datasets.check_classes(dataset)
        pairs = layouts.list_pairs(name, root, split, extra_root)
        if unlabeled := [pair.image for pair in pairs if not pair.label]:
            raise UserError(
                f"{unlabeled[0]}: split {split!r} has no labels to train with or to be scored by"
                f"{f', as there is no {root}/labels/{split}' if name == 'folder' else ''}; "
                f"--mode predict with --config.eval.split={split} segments its images, and --format writes what a benchmark's "
                "server scores"
            )
        return pairs

    if not check:
        return Files(name, list_pairs(), num_classes)
    pairs = screening.screen(list_pairs, dataset, num_classes, f"{root}, {split}")
    count = layouts.official_count(name, split)
    if count not in (None, len(pairs)):
        logger.warning(f"{name} {split} has {count:,} images officially, here {len(pairs):,}")
    return Files(name, pairs, num_classes)


class Scenes(Source):
    """The built-in scenes of scenes.py, which are drawn when they are read."""

    def __init__(self, dataset: ConfigDict, split: str, num_classes: int):
        if split not in scenes.SPLITS:
            raise UserError(f"dataset.name='scenes' has no split {split!r}: expected one of {', '.join(scenes.SPLITS)}")
        self._split, self.num_classes = split, num_classes
        self.names = _numbered(split, scenes.SPLITS[split])

    def load(self, index: int) -> Example:
        return scenes.scene(self._split, index)

    def files(self, index: int) -> Sequence[str]:
        return (scenes.__file__,)


class Tfds(Source):
    """A TFDS dataset with the features image and label, in files that can be read in any order (array_record)."""

    def __init__(self, dataset: ConfigDict, split: str, num_classes: int):
        builder = _prepared_builder(dataset.tfds_name, os.path.expanduser(dataset.root).rstrip("/"))
        where, features = f"dataset.tfds_name={dataset.tfds_name!r} at {builder.data_path}", builder.info.features
        kinds = {key: (len(feature.shape), feature.shape[2:], feature.np_dtype) for key, feature in features.items()}
        if (kinds.get("image"), kinds.get("label")) != ((3, (3,), np.uint8), (3, (1,), np.uint8)):
            raise UserError(f"{where}: has features {', '.join(features)}, expected image uint8[H,W,3] and label uint8[H,W,1]")
        try:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except ValueError as error:
            raise UserError(f"{where}: has no split {split!r}, expected one of {', '.join(builder.info.splits)}") from error
        self.num_classes, self.names = num_classes, _numbered(split, len(self._records))
        self._files = (f"{builder.data_path}/dataset_info.json",)  # is written anew whenever the records are

        def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            example = features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
            return _decode_image(example["image"]), example["label"][..., 0]

        self._parse = tf.function(parse, autograph=False).get_concrete_function(tf.TensorSpec([], tf.string))

    in_graph = True

    def load(self, index: int) -> Example:
        image, label = self._parse(tf.constant(self._records[index]))
        return np.asarray(image), np.asarray(label)

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        record = tf.numpy_function(lambda i: self._records[i], [index], tf.string, stateful=False)
        image, label = self._parse(tf.ensure_shape(record, []))
        return image, label

    def files(self, index: int) -> Sequence[str]:
        return self._files


def _prepared_builder(name: str, root: str) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=root or None)
        if name == "pspnet_scenes" and not builder.is_prepared():
            builder = tfds.builder(name, data_dir=root or None, file_format="array_record")
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(
            f"dataset.tfds_name={name!r}: TFDS knows no dataset of this name, nor is one at {root!r}; those named pspnet_... "
            "have to be prepared first, see pspnet_jax/data/builders.py"
        ) from error
    where = f"dataset.tfds_name={name!r} at {builder.data_path}"
    if not builder.is_prepared():
        raise UserError(f"{where}: not prepared; run `tfds build {name} --file_format=array_record --data_dir={root or 'DIR'}`")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{where}: its files are {builder.info.file_format.value}, which cannot be read in any order; build it again, in "
            "another directory, with --file_format=array_record"
        )
    return builder


OTHERS = {"scenes": Scenes, "tfds": Tfds}  # beside the files of layouts.LAYOUTS


def _reason(error: Exception) -> str:
    """The last line of what an error says, without the names of TensorFlow's nodes."""
    said = error.message.split("\n\t [[")[0] if isinstance(error, tf.errors.OpError) else str(error)
    return re.sub(r"\{\{.*?\}\} ", "", said).strip().split("\n")[-1]


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{index:05d}" for index in range(count)]


def _decode_image(contents: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG or PNG to uint8[H,W,3]."""
    # Reads PNGs as well. The default transform differs from other decoders' (OpenCV, Pillow) by up to 6 levels, this not.
    return tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
