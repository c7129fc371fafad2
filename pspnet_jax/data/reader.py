"""What reads examples by index: the class to derive a reader of your own from, as `sources.Source`.

It has names and loads an example; nothing has to be registered::

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
from pspnet_jax.data.palettes import Known
from pspnet_jax.data.totals import Totals
from pspnet_jax.errors import UserError

Example = tuple[np.ndarray, np.ndarray]  # image uint8[H,W,3] and label uint8[H,W]


class Source:
    """Labeled images by index, in any order and from any thread: a subclass provides the attributes and `load`.

    Attributes:
      names: one per example, see `layouts.Pair`.
      num_classes: K.
      in_graph: whether `tensors` loads an example by TensorFlow alone, which is faster than Python.
      totals: the pixels of each class in the labels, where they are known.
      image_sizes: bytes of the file of each image, which is the first of `files`, where each has one.
      palette: the colors of the labels' values, where palettes say them, see `palettes.Palettes.seen`.
      fingerprint: digest of the names and sizes of the files; "" where there are none.
    """

    names: Sequence[str]
    num_classes: int
    in_graph = False
    totals: Totals | None = None
    image_sizes: Sequence[int] | None = None
    palette: Known | None = None
    fingerprint = ""

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
            where, reason = self.where(index), last_line(error)
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

    def check(self, index: int) -> checks.Look | None:
        """Looks closer than `load` does, and raises a UserError that says what is wrong with an example, if it can tell."""
        return None

    def where(self, index: int) -> str:
        """What messages call an example."""
        return self.names[index]

    def files(self, index: int) -> Sequence[str]:
        """The files that change when the example does; without any, nothing about the example is kept from run to run."""
        return ()


def last_line(error: Exception) -> str:
    """The last line of what an error says, without the names of TensorFlow's nodes."""
    said = error.message.split("\n\t [[")[0] if isinstance(error, tf.errors.OpError) else str(error)
    return re.sub(r"\{\{.*?\}\} ", "", said).strip().split("\n")[-1]


def numbered(split: str, count: int) -> list[str]:
    return [f"{split}_{index:05d}" for index in range(count)]


def decode_image(contents: tf.Tensor, orientation: tf.Tensor | None = None, upright: bool = False) -> tf.Tensor:
    """Decodes a JPEG or PNG to uint8[H,W,3], upright.

    The orientation is looked for in the contents, unless it is given (an int64 scalar), or the image is known to be upright.
    """
    # Reads PNGs as well. The default transform differs from other decoders' (OpenCV, Pillow) by up to 6 levels, this not.
    image = tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")
    if upright:
        return image
    if orientation is None:
        orientation = tf.numpy_function(image_files.orientation_of, [contents], tf.int64, stateful=False)
    inputs = [image, orientation]
    return tf.cond(
        orientation == 1, lambda: image, lambda: tf.numpy_function(image_files.turn, inputs, tf.uint8, stateful=False)
    )
