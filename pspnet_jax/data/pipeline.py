"""From sources to tf.data datasets: positions -> examples -> augmented examples -> batches of one host."""

import atexit
import contextlib
import dataclasses
import functools
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
from pspnet_jax.data import augment, stamps, survey
from pspnet_jax.data.cache import CacheBudget, Read, cached
from pspnet_jax.data.order import AUGMENT, Order, generator
from pspnet_jax.data.reader import last_line
from pspnet_jax.data.sources import Example, Source, open_source, training_parts
from pspnet_jax.data.totals import Totals
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = CORES + 1  # for readers in Python
INDEX, NAME = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.string)
IMAGE, LABEL = tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((None, None), tf.uint8)
AHEAD = 2  # batches, or examples in evaluation, that lie ready beside those being made


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The opened training data.

    Attributes:
      order: which example of which dataset each position shows.
      sources: the datasets.
      reads: a function for each dataset: index -> image uint8[H,W,3], label uint8[H,W]; `source.read`, or a cache of it.
      examples_per_epoch: number of examples after which the first dataset has been shown once.
      fingerprint: digest of the names and sizes of all files, the same on all hosts; "" where there are none.
    """

    order: Order
    sources: Sequence[Source]
    reads: Sequence[Read]
    examples_per_epoch: int
    fingerprint: str = ""


def open_training(config: ConfigDict, source: Source | None = None) -> TrainingData:
    """Opens the training data of a recipe, which checks it.

    Args:
      config: the whole config.
      source: a reader of your own instead of config.dataset's training split; dataset.mixture comes beside it.

    Raises:
      UserError: see open_source, Order and cache.py; balance is on, and no label has a class in it; or only one class occurs.
    """
    num_classes = datasets.describe(config.dataset).num_classes
    if source is not None and source.num_classes != num_classes:
        raise UserError(f"this source has {source.num_classes} classes, dataset.class_names {num_classes}; both mean the same")
    sources: list[Source] = []
    reads, presence, budget = [], [], CacheBudget(config.dataset)
    for dataset, split in training_parts(config.dataset):
        part = open_source(dataset, split) if source is None or sources else source
        if not len(part):
            raise UserError(f"split {split!r} has no examples to train on")
        read = cached(part, dataset, budget)
        if dataset.balance:
            presence.append(survey.class_counts(part, dataset, read) > 0)
            if not presence[-1].any():
                raise UserError(
                    f"dataset.balance={dataset.balance}: no label of {dataset.root} has a class in it; expected 0 there"
                )
        sources.append(part)
        reads.append(read)
    weights = (1.0, *(weight for *_, weight in config.dataset.mixture))
    order = Order(config.seed, list(map(len, sources)), weights, config.dataset.balance, presence)
    _check_totals([part.totals or survey.sample_totals(part, read) for part, read in zip(sources, reads, strict=True)], config)
    prints = [part.fingerprint for part in sources]
    fingerprint = stamps.digest(prints) if any(prints) else ""
    return TrainingData(order, sources, reads, round(len(sources[0]) * sum(weights)), fingerprint)


def _check_totals(parts: Sequence[Totals], config: ConfigDict) -> None:
    """Refuses training data from whose labels together nothing can be learned; what only some of them show is a warning."""
    totals = functools.reduce(operator.add, parts)
    if problem := totals.problem(datasets.describe(config.dataset).class_names):
        if totals.labels >= totals.of:
            raise UserError(problem)
        logger.warning(problem)


def train_dataset(
    config: ConfigDict, *, start_step: int = 0, host: int = 0, hosts: int = 1, data: TrainingData | None = None
) -> tf.data.Dataset:
    """Returns the augmented training batches of steps start_step, ..., total_steps - 1.

    Example i of step s has position p = s * batch_size + i in the endless sequence of `Order`. Which image it shows
    follows from (seed, p), and so does its augmentation; a run that resumes, or has other hosts, makes the same batches.

    Args:
      config: the whole config.
      start_step: the first step wanted; costs the same whichever it is.
      host: which host this is; it makes the batch's examples host * b, ..., (host + 1) * b - 1, with b = batch_size / hosts.
      hosts: number of hosts that share each batch.
      data: by `open_training`, which is called without it.

    Returns:
      a dataset of {"image": uint8[b,h,w,3], "label": uint8[b,h,w]}, (h, w) being the crop; see `as_numpy`.

    Raises:
      UserError: batch_size is not a multiple of hosts; or see `open_training`.
    """
    if config.batch_size % hosts:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the number of hosts, {hosts}")
    opened, share, crop = data or open_training(config), config.batch_size // hosts, config.augment.crop

    def position(number: int) -> int:
        """The position of the example that is this host's `number`-th since step 0."""
        step, i = divmod(int(number), share)
        return step * config.batch_size + host * share + i

    def choose(number: int) -> tuple[int, int]:
        return opened.order[position(number)]

    def crop_of(number: int, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        params = augment.sample_augmentation(generator(config.seed, AUGMENT, position(number)), config.augment)
        return augment.apply_augmentation(image, label, params, crop, config.normalize.mean)

    def read_again(batch: int) -> None:
        for number in range((start_step + batch) * share, (start_step + batch + 1) * share):
            dataset, index = choose(number)
            crop_of(number, *opened.reads[dataset](index))

    loads = [_load(source, read) for source, read in zip(opened.sources, opened.reads, strict=True)]
    image_spec, label_spec = tf.TensorSpec((*crop, 3), tf.uint8), tf.TensorSpec(crop, tf.uint8)

    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        dataset, index = _python(choose, [number], [INDEX, INDEX])
        branches = [functools.partial(load, index) for load in loads]
        image, label = tf.switch_case(tf.cast(dataset, tf.int32), branches) if len(loads) > 1 else branches[0]()
        image, label = _python(crop_of, [number, image, label], [image_spec, label_spec])
        return {"image": image, "label": label}

    numbers = tf.data.Dataset.range(start_step * share, config.total_steps * share)
    mapped = _mapped(numbers, element, all(map(_in_graph, opened.sources, opened.reads)))
    dataset = mapped.batch(share, drop_remainder=True).prefetch(AHEAD)
    return _keeping(dataset, choose, crop_of, loads, read_again=read_again)


def eval_dataset(
    config: ConfigDict, split: str = "", *, host: int = 0, hosts: int = 1, source: Source | None = None
) -> tf.data.Dataset:
    """Returns every example of a split once, as it is: host h of H has examples h, h + H, and so on, which may be none.

    Args:
      config: the whole config.
      split: see `open_source`; not needed with a source.
      host: which host this is.
      hosts: number of hosts that share the split.
      source: the opened split, which knows its length; a reader of your own, too.

    Returns:
      a dataset of {"image": uint8[H,W,3], "label": uint8[H,W], "name": string}; see `as_numpy`.

    Raises:
      UserError: see open_source.
    """
    opened = open_source(config.dataset, split) if source is None else source
    load = _load(opened, opened.read)

    def name_of(index: int) -> bytes:
        return opened.names[int(index)].encode()

    def element(index: tf.Tensor) -> dict[str, tf.Tensor]:
        image, label = load(index)
        (name,) = _python(name_of, [index], [NAME])
        return {"image": image, "label": label, "name": name}

    dataset = _mapped(tf.data.Dataset.range(host, len(opened), hosts), element, opened.in_graph).prefetch(AHEAD)
    return _keeping(dataset, load, name_of, read_again=lambda count: opened.read(host + count * hosts))


def as_numpy(dataset: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    """Yields the elements of a dataset of dicts as numpy arrays, which are read-only, and strings.

    Closing or dropping the iterator ends the work that is under way for it.

    Raises:
      UserError: about a wrong example, in its place; whatever else was raised in Python comes out as it was.
    """
    iterator = _as_numpy(dataset)
    _open.add(iterator)
    return iterator


def _as_numpy(dataset: tf.data.Dataset) -> Generator[dict[str, Any], None, None]:
    count = 0
    try:
        for element in dataset.as_numpy_iterator():
            yield {key: value.decode() if isinstance(value, bytes) else value for key, value in element.items()}
            count += 1
    except tf.errors.OpError as error:
        if read_again := getattr(dataset, "read_again", None):  # not there if the caller has made another dataset of ours
            read_again(count)  # raises what is wrong with it, which TensorFlow has made text of
            raise UserError(
                f"an example could not be read ({last_line(error)}), and a moment later it could; start the same command again"
            ) from error
        raise


def _in_graph(source: Source, read: Read) -> bool:
    """Whether TensorFlow alone can load what `read` returns: the source has a graph, and no cache lies before it."""
    return source.in_graph and read == source.read


def _load(source: Source, read: Read) -> Callable[[tf.Tensor], Sequence[tf.Tensor]]:
    """Returns graph code: an index -> the image and label that `read` returns."""
    if _in_graph(source, read):
        return source.checked_tensors

    def call(index: int) -> Example:
        return read(int(index))

    return lambda index: _python(call, [index], [IMAGE, LABEL])


def _python(function: Callable[..., Any], inputs: list[tf.Tensor], specs: list[tf.TensorSpec]) -> list[tf.Tensor]:
    """Calls a Python function of arrays in a graph, which does not keep it alive: see `_keeping`."""
    alive = weakref.ref(function)

    def call(*arrays: Any) -> Any:
        python = alive()
        assert python is not None, "the dataset is gone"
        return python(*arrays)

    values = tf.numpy_function(call, inputs, [spec.dtype for spec in specs], stateful=False)
    return [tf.ensure_shape(value, spec.shape) for value, spec in zip(values, specs, strict=True)]


def _keeping(dataset: tf.data.Dataset, *python: object, read_again: Callable[[int], object]) -> tf.data.Dataset:
    """Makes Python objects live as long as the dataset: TensorFlow would keep them, caches included, until the process ends.

    `read_again` reads the n-th element in Python, to raise what is wrong with it.
    """
    dataset.python, dataset.read_again = python, read_again
    return dataset


def _mapped(numbers: tf.data.Dataset, element: Callable[[tf.Tensor], Any], in_graph: bool) -> tf.data.Dataset:
    """Maps numbers to elements, many at once and in order.

    Readers in Python call TensorFlow and wait for it; in TensorFlow's shared threads that could deadlock: they get their own.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_optimization.inject_prefetch = False
    if not in_graph:
        options.threading.private_threadpool_size = THREADS
    graph_code = tf.autograph.experimental.do_not_convert(element)
    return numbers.map(graph_code, num_parallel_calls=tf.data.AUTOTUNE).with_options(options)


_open: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """TensorFlow's threads call Python, which they cannot any more once the interpreter is gone."""
    for iterator in list(_open):
        with contextlib.suppress(ValueError):  # it is in use, by another thread
            iterator.close()
