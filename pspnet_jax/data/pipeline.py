"""From a source to batches: order, augmentation, host shards. Numpy arrays come out."""

import atexit
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax.data.augment import augment
from pspnet_jax.data.sources import Source, open_source


def train_batches(config: ConfigDict, *, start_step: int = 0, host: int = 0, hosts: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """Returns the augmented training batches of steps start_step, ..., total_steps - 1.

    Example i of step s has position p = s * batch_size + i in an endless sequence of shuffled epochs. Which image it shows
    follows from (seed, p), and so does its augmentation; a run that resumes, or has other hosts, makes the same batches.

    Args:
      config: the whole config.
      start_step: the first step wanted; costs the same whichever it is.
      host: which host this is; it makes the batch's examples host * b, ..., (host + 1) * b - 1, with b = batch_size / hosts.
      hosts: number of hosts that share each batch.

    Returns:
      an iterator of {"image": uint8[b,h,w,3], "label": uint8[b,h,w]}, read-only. A wrong example raises a ValueError there.

    Raises:
      ValueError: see open_source; or batch_size is not a multiple of hosts.
    """
    if config.batch_size % hosts:
        raise ValueError(f"batch_size={config.batch_size}: expected a multiple of the number of hosts, {hosts}")
    source = open_source(config.dataset, config.dataset.train_split)

    def order(first_step: int, end_step: int) -> tf.data.Dataset:
        return _order(len(source), config.seed, config.batch_size, range(first_step, end_step), host, hosts)

    def example(position: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        image, label = augment(*source.load(index), tf.stack([config.seed, position]), config)
        return {"image": image, "label": label}

    def indices(number: int) -> Iterable[int]:
        step = start_step + number
        return (index for _, index in order(step, step + 1).as_numpy_iterator())

    singles = order(start_step, config.total_steps).map(example, tf.data.AUTOTUNE, deterministic=True)
    return _arrays(singles.batch(config.batch_size // hosts).prefetch(2), source, indices)


def examples(config: ConfigDict, split: str, *, host: int = 0, hosts: int = 1) -> Iterator[dict]:
    """Returns every example of a split once, as it is: host h of H has examples h, h + H, and so on, which may be none.

    Returns:
      an iterator of {"image": uint8[H,W,3], "label": uint8[H,W], "name": str}. A wrong example raises a ValueError there.

    Raises:
      ValueError: see open_source.
    """
    source = open_source(config.dataset, split)
    shard = range(host, len(source), hosts)

    def example(index: tf.Tensor) -> dict[str, tf.Tensor]:
        image, label = source.load(index)
        return {"image": image, "label": label}

    dataset = tf.data.Dataset.range(host, len(source), hosts).map(example, tf.data.AUTOTUNE, deterministic=True).prefetch(2)
    arrays = _arrays(dataset, source, lambda number: [shard[number]])
    return ({**pair, "name": source.names[index]} for index, pair in zip(shard, arrays, strict=True))


def _order(count: int, seed: int, batch_size: int, steps: range, host: int, hosts: int) -> tf.data.Dataset:
    """Returns the positions that a host contributes to the batches of these steps, and the index of the example at each."""
    start, stop = steps.start * batch_size, steps.stop * batch_size

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        # tf.random.experimental.index_shuffle needs no list of the epoch, but has only 256 different orders of 367 examples.
        index = tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), tf.stack([seed, number]), alg="philox"
        )
        position = number * count + tf.range(count, dtype=tf.int64)
        ours = (position >= start) & (position < stop) & (position % batch_size // (batch_size // hosts) == host)
        return tf.data.Dataset.from_tensor_slices((position[ours], index[ours]))

    return tf.data.Dataset.range(start // count, -(-stop // count)).flat_map(epoch)


def _arrays(
    dataset: tf.data.Dataset, source: Source, indices: Callable[[int], Iterable[int]]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the dataset's elements as numpy arrays that share TensorFlow's memory.

    Args:
      indices: the examples in the n-th element. When it fails, they are looked at again to find the wrong file.
    """
    iterators = [dataset.as_numpy_iterator()]
    # Dropping the iterator ends its threads. At exit that must come early: Python functions that TensorFlow calls (for scenes,
    # TFDS and palettes) stall once the interpreter shuts down, and the iterator would wait for them forever.
    atexit.register(iterators.clear)
    try:
        for number in itertools.count():
            try:
                element = next(iterators[0], None)
            except tf.errors.OpError as error:
                names = []
                for index in indices(number):
                    source.check(index)
                    names.append(source.names[index])
                reason = error.message.splitlines()[0]
                raise ValueError(f"one of the examples {', '.join(names)} cannot be loaded: {reason}") from error
            if element is None:
                return
            yield element
    finally:
        if iterators:  # not at exit
            iterators.clear()
            atexit.unregister(iterators.clear)
