"""From sources to tf.data datasets: positions -> examples -> augmented examples -> the batches of one process."""

import atexit
import contextlib
import dataclasses
import functools
import inspect
import logging
import operator
import os
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import augment, extra, stamps, survey
from pspnet_jax.data.cache import CacheBudget, Read, cached
from pspnet_jax.data.order import AUGMENT, EXTRA, Order, generator
from pspnet_jax.data.reader import last_line
from pspnet_jax.data.sources import Example, Source, check_pixel_format, open_source, training_parts
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = CORES + 1  # for sources that run Python
INDEX = tf.TensorSpec((), tf.int64)
LABEL = tf.TensorSpec((None, None), tf.uint8)
PREFETCH = 2  # batches, or examples in evaluation


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The opened training data.

    Attributes:
      order: the dataset and index of the example at each position.
      sources: the datasets.
      readers: a function for each dataset: index -> image [H,W,C], label uint8[H,W]; `source.read`, possibly cached.
      examples_per_epoch: number of examples after which each example of the first dataset has been used once.
      fingerprint: digest of the names and sizes of all files, the same on all hosts; "" without files.
    """

    order: Order
    sources: Sequence[Source]
    readers: Sequence[Read]
    examples_per_epoch: int
    fingerprint: str = ""


def open_training(config: ConfigDict, source: Source | None = None) -> TrainingData:
    """Opens and checks the training data of a recipe.

    Args:
      config: the whole config.
      source: a custom source that replaces config.dataset's training split; dataset.mixture still applies.

    Raises:
      UserError: see open_source, Order, cache.py and extra.py; or no class occurs in a dataset although dataset.balance is
        set; or only one class occurs in all labels.
    """
    num_classes = datasets.describe(config.dataset).num_classes
    if config.augment.extra:
        extra.load(config.augment.extra, num_classes)  # before the data is checked, which takes longer
    if source is not None and source.num_classes != num_classes:
        raise UserError(f"this source has {source.num_classes} classes, but dataset.class_names has {num_classes}")
    sources: list[Source] = []
    readers, presence, budget = [], [], CacheBudget(config.dataset)
    for dataset, split in training_parts(config.dataset):
        part = open_source(dataset, split, channels=config.model.channels) if source is None or sources else source
        check_pixel_format(part, config.model.channels, config.dataset.image_dtype)
        if not len(part):
            raise UserError(f"split {split!r} has no examples to train on")
        read = cached(part, dataset, budget)
        if dataset.balance:
            presence.append(survey.class_counts(part, dataset, read) > 0)
            if not presence[-1].any():
                raise UserError(
                    f"dataset.balance={dataset.balance}: no label of {dataset.root} contains a class; set dataset.balance=0"
                )
        sources.append(part)
        readers.append(read)
    weights = (1.0, *(weight for *_, weight in config.dataset.mixture))
    order = Order(config.seed, list(map(len, sources)), weights, config.dataset.balance, presence)
    known = [part.totals or survey.sample_totals(part, read) for part, read in zip(sources, readers, strict=True)]
    totals = functools.reduce(operator.add, known)
    if problem := totals.problem(datasets.describe(config.dataset).class_names):
        if totals.counted >= totals.total:
            raise UserError(problem)
        logger.warning(problem)  # of a sample
    fingerprints = [part.fingerprint for part in sources]
    fingerprint = stamps.digest(fingerprints) if any(fingerprints) else ""
    return TrainingData(order, sources, readers, round(len(sources[0]) * sum(weights)), fingerprint)


def train_dataset(
    config: ConfigDict, *, start_step: int = 0, host: int = 0, hosts: int = 1, data: TrainingData | None = None
) -> tf.data.Dataset:
    """Returns the augmented training batches of steps start_step, ..., total_steps - 1.

    Example i of step s has position p = s * batch_size + i in the endless sequence of `Order`. Its image and its augmentation
    depend only on (seed, p), so the batches stay the same after resuming and with another number of processes.

    Args:
      config: the whole config.
      start_step: the first step; starting at a late step takes no longer.
      host: index of this process; it makes examples host * b to (host + 1) * b - 1 of each batch, b = batch_size / hosts.
      hosts: number of processes that share each batch.
      data: from `open_training`, which is called if this is None.

    Returns:
      A dataset of {"image": [b,h,w,C] of dataset.image_dtype, "label": uint8[b,h,w]}, where (h, w) is the crop; see `as_numpy`.

    Raises:
      UserError: batch_size is not a multiple of hosts; or see `open_training`.
    """
    if config.batch_size % hosts:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the number of hosts, {hosts}")
    opened, share, crop = data or open_training(config), config.batch_size // hosts, config.augment.crop
    crops = _Crops(config, opened, host, share)

    def read_again(batch: int) -> None:
        for number in range((start_step + batch) * share, (start_step + batch + 1) * share):
            crops.read(number)

    loads = [_load(source, read) for source, read in zip(opened.sources, opened.readers, strict=True)]
    by_windows = any(source.by_windows for source in opened.sources)
    image_spec = tf.TensorSpec((*crop, config.model.channels), config.dataset.image_dtype)
    specs = [image_spec, tf.TensorSpec(crop, tf.uint8)]

    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        if by_windows:
            return dict(zip(("image", "label"), _call_python(crops.read, [number], specs), strict=True))
        dataset, index = _call_python(crops.example, [number], [INDEX, INDEX])
        branches = [functools.partial(load, index) for load in loads]
        image, label = tf.switch_case(tf.cast(dataset, tf.int32), branches) if len(loads) > 1 else branches[0]()
        image, label = _call_python(crops.augment, [number, image, label], specs)
        return {"image": image, "label": label}

    numbers = tf.data.Dataset.range(start_step * share, config.total_steps * share)
    examples = mapped(numbers, element, all(map(_in_graph, opened.sources, opened.readers)))
    dataset = examples.batch(share, drop_remainder=True).prefetch(PREFETCH)
    return _keep_alive(dataset, crops, loads, read_again=read_again)


class _Crops:
    """The augmented examples of one process, which has `share` in each batch, numbered from the first of step 0."""

    def __init__(self, config: ConfigDict, data: TrainingData, host: int, share: int):
        self._config, self._data, self._host, self._share = config, data, host, share
        num_classes = datasets.describe(config.dataset).num_classes
        self._extra = extra.load(config.augment.extra, num_classes) if config.augment.extra else None

    def _position(self, number: int) -> int:
        step, i = divmod(int(number), self._share)
        return step * self._config.batch_size + self._host * self._share + i

    def example(self, number: int) -> tuple[int, int]:
        """Returns the index of the dataset and that of the example in it."""
        return self._data.order[self._position(number)]

    def augment(self, number: int, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crop of an example."""
        config, position = self._config, self._position(number)
        params = augment.sample_augmentation(generator(config.seed, AUGMENT, position), config.augment)
        image, label = augment.apply_augmentation(image, label, params, config.augment.crop, config.normalize.mean)
        return self._extra(image, label, generator(config.seed, EXTRA, position)) if self._extra else (image, label)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads an example, and returns its crop."""
        dataset, index = self.example(number)
        return self.augment(number, *self._data.readers[dataset](index))


def eval_dataset(
    config: ConfigDict, split: str = "", *, host: int = 0, hosts: int = 1, source: Source | None = None
) -> tf.data.Dataset:
    """Returns every example of a split once, without augmentation; process h of H gets the examples h, h + H, ...

    Args:
      config: the whole config.
      split: see `open_source`; unused if a source is given.
      host: index of this process.
      hosts: number of processes that share the split.
      source: an opened split or a custom source.

    Returns:
      A dataset of {"image": [H,W,C], "label": uint8[H,W], "name": string}; see `as_numpy`.

    Raises:
      UserError: see open_source.
    """
    opened = open_source(config.dataset, split, channels=config.model.channels) if source is None else source
    load, names = _load(opened, opened.read), tf.constant(list(opened.names), tf.string)

    def element(index: tf.Tensor) -> dict[str, tf.Tensor]:
        image, label = load(index)
        return {"image": image, "label": label, "name": names[index]}

    dataset = mapped(tf.data.Dataset.range(host, len(opened), hosts), element, opened.in_graph).prefetch(PREFETCH)
    return _keep_alive(dataset, load, read_again=lambda count: opened.read(host + count * hosts))


def as_numpy(dataset: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """Yields the elements of a dataset of dicts, as read-only NumPy arrays and strings.

    Closing or deleting the iterator stops its background work.

    Raises:
      UserError: an example is wrong; raised when it is reached. Other exceptions from Python code are raised unchanged.
    """
    iterator = _as_numpy(dataset)
    _open_iterators.add(iterator)
    return iterator


def _as_numpy(dataset: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    count = 0
    try:
        for element in dataset.as_numpy_iterator():
            yield {key: value.decode() if isinstance(value, bytes) else value for key, value in element.items()}
            count += 1
    except tf.errors.OpError as error:
        if read_again := getattr(dataset, "read_again", None):  # missing if the caller has transformed our dataset
            read_again(count)  # raises the original exception, of which TensorFlow keeps only the text
            raise UserError(
                f"an example could not be read ({last_line(error)}), but a second attempt succeeded; run the same command again"
            ) from error
        raise


def _in_graph(source: Source, read: Read) -> bool:
    """Returns whether TensorFlow alone can load the examples: the source runs in the graph and `read` is not cached."""
    return source.in_graph and read == source.read


def _load(source: Source, read: Read) -> Callable[[tf.Tensor], Sequence[tf.Tensor]]:
    """Returns a TensorFlow function from an index to the image and label that `read` returns."""
    if _in_graph(source, read):
        return source.checked_tensors

    def call(index: int) -> Example:
        return read(int(index))

    channels, dtype = source.pixel_format
    return lambda index: _call_python(call, [index], [tf.TensorSpec((None, None, channels), dtype), LABEL])


def _call_python(function: Callable[..., Any], inputs: list[tf.Tensor], specs: list[tf.TensorSpec]) -> list[tf.Tensor]:
    """Calls a Python function or method of arrays in a graph, which keeps only a weak reference to it, see `_keep_alive`."""
    reference = (weakref.WeakMethod if inspect.ismethod(function) else weakref.ref)(function)

    def call(*arrays: Any) -> Any:
        python = reference()
        assert python is not None, "the dataset has been deleted"
        return python(*arrays)

    values = tf.numpy_function(call, inputs, [spec.dtype for spec in specs], stateful=False)
    return [tf.ensure_shape(value, spec.shape) for value, spec in zip(values, specs, strict=True)]


def _keep_alive(dataset: tf.data.Dataset, *python: object, read_again: Callable[[int], object]) -> tf.data.Dataset:
    """Ties Python objects to the dataset's lifetime; TensorFlow would keep them, caches included, until the process ends.

    `read_again` reads the n-th element in Python, to raise the original exception.
    """
    dataset.python, dataset.read_again = python, read_again
    return dataset


def mapped(numbers: tf.data.Dataset, element: Callable[[tf.Tensor], Any], in_graph: bool = True) -> tf.data.Dataset:
    """Maps numbers to elements, in parallel and in order.

    Python sources call TensorFlow and wait for it. They get threads of their own, because TensorFlow's shared threads could
    deadlock.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_optimization.inject_prefetch = False
    if not in_graph:
        options.threading.private_threadpool_size = THREADS
    graph_code = tf.autograph.experimental.do_not_convert(element)
    return numbers.map(graph_code, num_parallel_calls=tf.data.AUTOTUNE).with_options(options)


_open_iterators: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stops TensorFlow's threads, which call Python, before the interpreter shuts down."""
    for iterator in list(_open_iterators):
        with contextlib.suppress(ValueError):  # another thread is using it
            iterator.close()
