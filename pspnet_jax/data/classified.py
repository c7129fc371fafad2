"""Images with one class each, from TFDS datasets such as imagenet2012, to pretrain a backbone (see `pretrain`)."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from pspnet_jax.data.order import Order
from pspnet_jax.data.pipeline import PREFETCH, as_numpy, mapped
from pspnet_jax.data.reader import decode_image
from pspnet_jax.data.tfds_source import prepared_builder
from pspnet_jax.errors import UserError

Batches = Iterator[dict[str, np.ndarray]]
CENTER = 224 / 256  # side of the square at the center that is evaluated, relative to the short side
PADDING = -1  # label of the examples that fill up the last batch


class ClassifiedImages:
    """One split of a TFDS dataset with the features image and label, a class index, stored as array_record.

    Attributes:
      class_names: of the K classes.
      fingerprint: identifies the records.
    """

    def __init__(self, dataset: ConfigDict, split: str):
        builder = prepared_builder(dataset.tfds_name, os.path.expanduser(dataset.root).rstrip("/"))
        where, features = f"dataset.tfds_name={dataset.tfds_name!r} at {builder.data_path}", builder.info.features
        if not {"image", "label"} <= features.keys() or not isinstance(features["label"], tfds.features.ClassLabel):
            raise UserError(f"{where}: has features {', '.join(features)}; expected image, and label as a class index")
        try:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except ValueError as error:
            raise UserError(f"{where}: has no split {split!r}; expected one of {', '.join(builder.info.splits)}") from error
        self.class_names: list[str] = features["label"].names
        self.fingerprint = f"{builder.info.full_name}/{split}, {len(self)} images"
        self._features = features

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index_of: Callable[[int], int], number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the image uint8[H,W,3] and label int32[] of the example with index `index_of(number)`, in a graph."""
        record = tf.numpy_function(lambda i: self._records[index_of(int(i))], [number], tf.string, stateful=False)
        decoders = {"image": tfds.decode.SkipDecoding()}
        example = self._features.deserialize_example(tf.ensure_shape(record, []), decoders=decoders)
        return decode_image(example["image"], upright=True), tf.cast(example["label"], tf.int32)


def train_batches(config: ConfigDict, data: ClassifiedImages, start_step: int = 0, host: int = 0, hosts: int = 1) -> Batches:
    """Yields the augmented training batches of the steps from start_step on: random crops, resized and perhaps flipped.

    A crop has a share of the image's area from augment.scale and an aspect ratio from 3/4 to 4/3 (Szegedy et al. 2015,
    section 6). Like the order of the images, it depends only on the seed and the example's position, as in `pipeline`.

    Yields:
      {"image": uint8[b,h,w,3], "label": int32[b]} with b = batch_size / hosts and (h, w) = augment.crop.
    """
    share, order, augment = config.batch_size // hosts, Order(config.seed, [len(data)]), config.augment

    def position(number: Any) -> Any:
        return number // share * config.batch_size + host * share + number % share

    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        image, label = data.example(lambda n: order[position(n)][1], number)
        seeds = tf.random.split(tf.stack([tf.constant(config.seed, tf.int64), position(number)]))  # else, crops decide on flips
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros((1, 0, 4)),
            seeds[0],
            0.0,
            (3 / 4, 4 / 3),
            augment.scale,
            100,
            use_image_if_no_bounding_boxes=True,
        )
        image = _resize(tf.slice(image, begin, size), augment.crop)
        flip = tf.random.stateless_uniform((), seeds[1]) < augment.flip_probability
        return {"image": tf.cond(flip, lambda: image[:, ::-1], lambda: image), "label": label}

    numbers = tf.data.Dataset.range(start_step * share, config.total_steps * share)
    return as_numpy(mapped(numbers, element).batch(share, drop_remainder=True).prefetch(PREFETCH))


def eval_batches(config: ConfigDict, data: ClassifiedImages, host: int = 0, hosts: int = 1) -> Batches:
    """Yields the center of each image once, in batches as in training; the last ones are filled up with label `PADDING`.

    All hosts get the same number of batches.
    """
    share = config.batch_size // hosts
    numbers = tf.data.Dataset.range(-(-len(data) // config.batch_size) * share)

    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        index = number * hosts + host
        image, label = data.example(lambda n: min(n * hosts + host, len(data) - 1), number)
        shape = tf.shape(image)[:2]
        side = tf.cast(tf.round(CENTER * tf.cast(tf.reduce_min(shape), tf.float32)), tf.int32)
        top, left = tf.unstack((shape - side) // 2)
        image = _resize(image[top : top + side, left : left + side], config.eval.crop)
        return {"image": image, "label": tf.where(index < len(data), label, PADDING)}

    return as_numpy(mapped(numbers, element).batch(share, drop_remainder=True).prefetch(PREFETCH))


def _resize(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    resized = tf.round(tf.image.resize(image, size, antialias=True))
    return tf.ensure_shape(tf.saturate_cast(resized, tf.uint8), (*size, 3))
