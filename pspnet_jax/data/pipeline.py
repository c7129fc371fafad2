"""From sources to batches: order, augmentation, host shards, threads. Numpy arrays come out."""

import collections
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.data import augment
from pspnet_jax.data.cache import Read, Room, cached, classes_held
from pspnet_jax.data.order import AUGMENT, Order, generator
from pspnet_jax.data.sources import Source, open_source

T = TypeVar("T")
Work = tuple[T, Sequence[Callable[[], object]]]  # something, and the calls that complete it
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = CORES + 1  # one more than there are cores, as some wait for TensorFlow's


def train_batches(
    config: ConfigDict, *, start_step: int = 0, host: int = 0, hosts: int = 1, opened: tuple[Order, list[Read]] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Returns the augmented training batches of steps start_step, ..., total_steps - 1.

    Example i of step s has position p = s * batch_size + i in the endless sequence of `Order`. Which image it shows
    follows from (seed, p), and so does its augmentation; a run that resumes, or has other hosts, makes the same batches.

    Args:
      config: the whole config.
      start_step: the first step wanted; costs the same whichever it is.
      host: which host this is; it makes the batch's examples host * b, ..., (host + 1) * b - 1, with b = batch_size / hosts.
      hosts: number of hosts that share each batch.
      opened: by `open_training`, so that what is wrong with the data is known earlier.

    Returns:
      an iterator of {"image": uint8[b,h,w,3], "label": uint8[b,h,w]}, made by threads a few batches ahead of their use. A
      wrong example raises a ValueError there.

    Raises:
      ValueError: batch_size is not a multiple of hosts; or see `open_training`.
    """
    if config.batch_size % hosts:
        raise ValueError(f"batch_size={config.batch_size}: expected a multiple of the number of hosts, {hosts}")
    order, reads = opened or open_training(config)
    share, crop, mean = config.batch_size // hosts, config.augment.crop, config.normalize.mean

    def make(position: int, pixels: np.ndarray, classes: np.ndarray) -> None:
        dataset, index = order[position]
        drawn = augment.draw(generator(config.seed, AUGMENT, position), config.augment)
        augment.view(*reads[dataset](index), drawn, mean, pixels, classes)

    def batch(step: int) -> Work[dict[str, np.ndarray]]:
        images, labels = np.empty((share, *crop, 3), np.uint8), np.empty((share, *crop), np.uint8)
        first = step * config.batch_size + host * share
        calls = [functools.partial(make, first + i, images[i], labels[i]) for i in range(share)]
        return {"image": images, "label": labels}, calls

    return _completed(map(batch, range(start_step, config.total_steps)), ahead=max(2, -(-THREADS // share)))


def examples(config: ConfigDict, split: str, *, host: int = 0, hosts: int = 1) -> Iterator[dict]:
    """Returns every example of a split once, as it is: host h of H has examples h, h + H, and so on, which may be none.

    Returns:
      an iterator of {"image": uint8[H,W,3], "label": uint8[H,W], "name": str}, read-only, read by threads a few ahead of their
      use. A wrong example raises a ValueError there.

    Raises:
      ValueError: see open_source.
    """
    source = open_source(config.dataset, split)
    read = reader(source)

    def example(index: int) -> Work[dict]:
        pair: dict = {"name": source.names[index]}
        return pair, [lambda: pair.update(zip(("image", "label"), read(index), strict=True))]

    return _completed(map(example, range(host, len(source), hosts)), ahead=max(2, THREADS))


def open_training(config: ConfigDict) -> tuple[Order, list[Read]]:
    """Returns the order of the examples in dataset and dataset.mixture, and how to read those of each.

    Raises:
      ValueError: see open_source, Order and cache.py.
    """
    dataset = config.dataset.copy_and_resolve_references()
    dataset.class_names = datasets.describe(dataset).class_names
    counts, reads, held, room = [], [], [], Room(dataset)
    for part, split in training_parts(dataset):
        source = open_source(part, split)
        read = cached(reader(source), source, part, room)
        if dataset.balance:
            held.append(classes_held(read, source, len(dataset.class_names), part))
        counts.append(len(source))
        reads.append(read)
    weights = (1.0, *(weight for *_, weight in dataset.mixture))
    return Order(config.seed, counts, weights, dataset.balance, held), reads


def training_parts(dataset: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """Yields a config.dataset and a split for the training data: dataset's own, and each of dataset.mixture."""
    yield dataset, dataset.train_split
    for name, root, split, _ in dataset.mixture:
        part = dataset.copy_and_resolve_references()
        part.name, part.root = name, os.path.expanduser(root)
        yield part, split


def reader(source: Source) -> Read:
    """Returns a function that reads an example, in any thread, as arrays that share TensorFlow's memory.

    It raises a ValueError that names the example, and says what is wrong with it.
    """
    load = tf.function(source.load, input_signature=[tf.TensorSpec([], tf.int64)]).get_concrete_function()

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            image, label = load(tf.constant(index, tf.int64))
        except tf.errors.OpError as error:
            source.check(index)
            reason = re.sub(r"\{\{.*?\}\} ", "", error.message.split("\n\t [[")[0]).strip().splitlines()[-1]
            where = " or ".join(source.files(index)) or source.names[index]
            raise ValueError(f"{where}: cannot be loaded ({reason}); replace it or remove the pair") from error
        return np.asarray(image), np.asarray(label)

    return read


def _completed(work: Iterable[Work[T]], ahead: int) -> Iterator[T]:
    """Yields each thing in turn when its calls have been made, while threads make those of up to `ahead` further ones."""
    pool, leaving = ThreadPoolExecutor(THREADS, "input"), sys.is_finalizing  # when it is, this module's names are gone
    queue: collections.deque[tuple[T, list[Future[object]]]] = collections.deque()

    def next_completed() -> T:
        thing, futures = queue.popleft()
        for future in futures:
            future.result()
        return thing

    try:
        for thing, calls in work:
            queue.append((thing, [pool.submit(call) for call in calls]))
            if len(queue) > ahead:
                yield next_completed()
        while queue:
            yield next_completed()
    finally:  # also when the iterator is closed or dropped
        if not leaving():  # the interpreter has waited for the threads then
            pool.shutdown(cancel_futures=True)
