"""Sorting a split by image size for whole-image inference, which compiles the network once per size."""

from collections.abc import Sequence

import tensorflow as tf

from pspnet_jax import image_files
from pspnet_jax.data.sources import Example, Source


class BySize(Source):
    """Another source's examples, sorted by image size; examples without an image file (scenes, TFDS) keep their order.

    Attributes:
      sizes: height and width of each image from its file's header; (0, 0) if unknown.
    """

    def __init__(self, source: Source):
        """Reads the headers of the images."""
        files = [next(iter(source.files(index)), "") for index in range(len(source))]
        distinct = list(dict.fromkeys(files))
        known = dict(zip(distinct, image_files.sizes(distinct), strict=True))
        self._order = sorted(range(len(source)), key=lambda index: known[files[index]])
        self.sizes = [known[files[index]] for index in self._order]
        self.names = [source.names[index] for index in self._order]
        self.num_classes, self.in_graph, self._source = source.num_classes, source.in_graph, source
        self.fingerprint, self.pixel_format = source.fingerprint, source.pixel_format

    def load(self, index: int) -> Example:
        return self._source.load(self._order[index])

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return self._source.tensors(tf.constant(self._order, tf.int64)[index])

    def check(self, index: int) -> None:
        self._source.check(self._order[index])

    def where(self, index: int) -> str:
        return self._source.where(self._order[index])

    def files(self, index: int) -> Sequence[str]:
        return self._source.files(self._order[index])
