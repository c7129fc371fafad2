"""`Source`, the base class of everything that reads examples by index.

To read data of your own, subclass it as `sources.Source`; nothing needs to be registered::

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

import re
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from pspnet_jax import image_files
from pspnet_jax.data import checks
from pspnet_jax.data.palettes import ValueColors
from pspnet_jax.data.totals import Totals
from pspnet_jax.errors import UserError

Example = tuple[np.ndarray, np.ndarray]  # image [H,W,C], see `Source.pixel_format`, and label uint8[H,W]


class Source:
    """Labeled images by index, readable in any order and from any thread. A subclass defines `names`, `num_classes` and `load`.

    Attributes:
      names: one per example, see `layouts.Pair`.
      num_classes: K.
      pixel_format: of the images.
      in_graph: whether `tensors` is implemented, which loads an example without Python and is faster.
      by_windows: whether some images and labels are `LargeTiff`s, of which training reads only the windows that it needs.
      totals: the number of pixels of each class, if known.
      image_sizes: size in bytes of each image file, which is the first of `files`; None without image files.
      palette: the colors of the label values if labels have palettes, see `palettes.Palettes.seen`.
      fingerprint: digest of the names and sizes of the files, or the name of a TFDS dataset; "" for scenes.
      reading: whatever else decides what is read from the files, such as a label map.
    """

    names: Sequence[str]
    num_classes: int
    pixel_format = image_files.RGB8
    in_graph = False
    by_windows = False
    totals: Totals | None = None
    image_sizes: Sequence[int] | None = None
    palette: ValueColors | None = None
    fingerprint = ""
    reading = ""

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Example:
        """Returns image [H,W,C] and label uint8[H,W] with values 0..K-1 and 255. `read` explains any exception."""
        raise NotImplementedError

    def read(self, index: int) -> Example:
        """Returns the image and label from `load` after checking them, so that no wrong label reaches the network.

        Raises:
          UserError: names the example and what is wrong with it.
        """
        try:
            image, label = self.load(index)
        except Exception as error:  # whatever a decoder raises
            self.check(index)
            where, reason = self.where(index), last_line(error)
            raise UserError(f"{where}: cannot be loaded ({reason}); replace it or remove the pair") from error
        if problem := checks.example_problem(image, label, self.num_classes, self.pixel_format):
            self.check(index)
            raise UserError(f"{self.where(index)}: {problem}")
        return image, label

    def read_label(self, index: int) -> np.ndarray:
        """Returns the label that `read` returns; a subclass may do so without decoding the image."""
        return self.read(index)[1]

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Does the same as `load` in a TensorFlow graph, if `in_graph` is set; index is an int64 scalar."""
        raise NotImplementedError

    def checked_tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the result of `tensors`, and fails if sizes differ or a label is wrong; `read` then gives the reason."""
        image, label = self.tensors(index)
        image, label = tf.ensure_shape(image, [None, None, self.pixel_format.channels]), tf.ensure_shape(label, [None, None])
        same_size = tf.reduce_all(tf.shape(image)[:2] == tf.shape(label))
        in_range = tf.cast(tf.reduce_max(label + 1), tf.int32) <= self.num_classes  # in uint8, 255 + 1 is 0
        with tf.control_dependencies([tf.debugging.Assert(same_size & in_range, ["a wrong example"])]):
            return tf.identity(image), tf.identity(label)

    def check(self, index: int) -> checks.CheckedPair | None:
        """Checks an example more thoroughly than `load` does, and raises a UserError if it finds a fault."""
        return None

    def where(self, index: int) -> str:
        """Returns how messages refer to an example."""
        return self.names[index]

    def files(self, index: int) -> Sequence[str]:
        """Returns the files that an example is read from; without files, nothing about it is cached between runs."""
        return ()


def last_line(error: Exception) -> str:
    """Returns the last line of an error's message, without the names of TensorFlow's nodes."""
    message = error.message.split("\n\t [[")[0] if isinstance(error, tf.errors.OpError) else str(error)
    return re.sub(r"\{\{.*?\}\} ", "", message).strip().split("\n")[-1]


def numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{index:05d}" for index in range(count)]


def decode_image(contents: tf.Tensor, orientation: tf.Tensor | None = None, upright: bool = False) -> tf.Tensor:
    """Decodes a JPEG or PNG to uint8[H,W,3] and turns it upright.

    The orientation is read from the contents unless it is given (an int64 scalar) or the image is known to be upright.
    """
    # Decodes PNGs too. With the default transform, JPEGs differ from OpenCV's and Pillow's by up to 6 gray levels.
    image = tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
    if upright:
        return image
    if orientation is None:
        orientation = tf.numpy_function(image_files.orientation_of, [contents], tf.int64, stateful=False)
    inputs = [image, orientation]
    return tf.cond(
        orientation == 1, lambda: image, lambda: tf.numpy_function(image_files.turn, inputs, tf.uint8, stateful=False)
    )
