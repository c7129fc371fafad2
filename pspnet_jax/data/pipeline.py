"""From sources to tf.data datasets: positions -> examples -> augmented examples -> batches of one host."""

import atexit
import contextlib
import dataclasses
import os
import re
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import augment, survey
from pspnet_jax.data.cache import CacheBudget, Read, cached
from pspnet_jax.data.order import AUGMENT, Order, generator
from pspnet_jax.data.sources import Source, open_source, training_parts
from pspnet_jax.errors import UserError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = CORES + 1  # for Python, which waits for TensorFlow in them: in TensorFlow's own, it could wait for itself
AHEAD = 2  # batches, or examples in evaluation, that lie ready beside those being made


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The opened training data.

    Attributes:
      order: which example of which dataset each position shows.
      reads: a function for each dataset: index -> image uint8[H,W,3], label uint8[H,W].
      examples_per_epoch: number of examples after which the first dataset has been shown once.
    """

    order: Order
    reads: Sequence[Read]
    examples_per_epoch: int


def open_training(config: ConfigDict, source: Source | None = None) -> TrainingData:
    """Opens the training data of a recipe, which checks it.

    Args:
      config: the whole config.
      source: a reader of your own instead of config.dataset's training split; dataset.mixture comes beside it.

    Raises:
      UserError: see open_source, Order and cache.py; or balance is on, and no label has a class in it.
    """
    num_classes = datasets.describe(config.dataset).num_classes
    if source and source.num_classes != num_classes:
        raise UserError(f"this source has {source.num_classes} classes, dataset.class_names {num_classes}; both mean the same")
    sources: list[Source] = []
    reads, presence, budget = [], [], CacheBudget(config.dataset)
    for dataset, split in training_parts(config.dataset):
        part = source if source and not sources else open_source(dataset, split)
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
    return TrainingData(order, reads, round(len(sources[0]) * sum(weights)))


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

    def example(number: int) -> tuple[np.ndarray, np.ndarray]:
        """The example that is this host's `number`-th since step 0."""
        step, i = divmod(number, share)
        position = step * config.batch_size + host * share + i
        dataset, index = opened.order[position]
        params = augment.sample_augmentation(generator(config.seed, AUGMENT, position), config.augment)
        return augment.apply_augmentation(*opened.reads[dataset](index), params, crop, config.normalize.mean)

    numbers = tf.data.Dataset.range(start_step * share, config.total_steps * share)
    spec = {"image": tf.TensorSpec((*crop, 3), tf.uint8), "label": tf.TensorSpec(crop, tf.uint8)}
    return _mapped(numbers, example, spec).batch(share, drop_remainder=True).prefetch(AHEAD)


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
    opened = source or open_source(config.dataset, split)

    def example(index: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        return *opened.read(index), opened.names[index].encode()

    spec = {
        "image": tf.TensorSpec((None, None, 3), tf.uint8),
        "label": tf.TensorSpec((None, None), tf.uint8),
        "name": tf.TensorSpec((), tf.string),
    }
    return _mapped(tf.data.Dataset.range(host, len(opened), hosts), example, spec).prefetch(AHEAD)


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
    try:
        for element in dataset.as_numpy_iterator():
            yield {key: value.decode() if isinstance(value, bytes) else value for key, value in element.items()}
    except tf.errors.OpError as error:
        if match := re.search(r"\(error (\d+)\)", str(error)):
            raise _raised.pop(int(match[1])) from None
        raise


def _mapped(numbers: tf.data.Dataset, function: Callable[[int], tuple], spec: dict[str, tf.TensorSpec]) -> tf.data.Dataset:
    """Maps numbers by a Python function, many at once and in order, to elements of the form that `spec` gives."""

    alive = weakref.ref(function)  # what numpy_function is given lives as long as the process, and with it a cache in memory

    def keeping_errors(number: np.int64) -> tuple:
        try:
            call = alive()
            assert call is not None
            return call(int(number))
        except Exception as error:  # TensorFlow would make text of it
            _raised[id(error)] = error
            raise RuntimeError(f"{error} (error {id(error)})") from None

    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(keeping_errors, [number], [s.dtype for s in spec.values()], stateful=False)
        return {key: tf.ensure_shape(value, s.shape) for (key, s), value in zip(spec.items(), values, strict=True)}

    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = THREADS
    options.experimental_optimization.inject_prefetch = False
    mapped = numbers.map(element, num_parallel_calls=tf.data.AUTOTUNE)
    mapped.function = function  # lives as long as the dataset and its iterators
    return mapped.with_options(options)


_raised: dict[int, Exception] = {}  # on their way through TensorFlow, by id
_open: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """TensorFlow's threads call Python, which they cannot any more once the interpreter is gone."""
    for iterator in list(_open):
        with contextlib.suppress(ValueError):  # it is in use, by another thread
            iterator.close()
