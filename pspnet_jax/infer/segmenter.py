"""A network that is ready to segment images, and its results. The command line's predictions and evaluations use it, too."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, overload

import jax
import numpy as np
from etils import epath
from PIL import Image

from pspnet_jax import files, image_files
from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import PixelFormat
from pspnet_jax.infer import draw
from pspnet_jax.infer.predictor import Example, Predictor

THREADS = 2 + (os.cpu_count() or 1)
AHEAD = min(2 * THREADS, 16)  # maximum number of images read ahead
Item = TypeVar("Item")
Made = TypeVar("Made")
EXPECTED = "a path, a PIL image or an array such as uint8[H, W, 3]"
ImageLike = str | os.PathLike | Image.Image | np.ndarray
OnError = Callable[[Example, UserError], None]


class Segmenter:
    """A network with its weights on the devices.

    Attributes:
      predictor: computes the labels.
      variables: the weights, on every device of the predictor.
      info: the classes that the network predicts.
    """

    def __init__(self, predictor: Predictor, variables: Any, info: DatasetInfo):
        """Copies the weights (NumPy arrays or replicated jax.Arrays) to the devices of the predictor."""
        self.predictor, self.info = predictor, info
        self.variables = predictor.place(variables)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes 0 to K-1."""
        return self.info.class_names

    @overload
    def __call__(self, images: ImageLike) -> "Result": ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Sequence[ImageLike]) -> "list[Result]": ...
    @overload
    def __call__(self, images: Iterator[ImageLike]) -> "Iterator[Result]": ...
    def __call__(self, images: Any) -> Any:
        """Segments an image, or several, each at its own size.

        Args:
          images: an image, which is a file (local or gs://), a PIL image, or an array uint8[H, W, 3] in RGB (or as the
            `pixel_format` of the predictor says); or a list or an iterator of images. Files and PIL images are turned upright
            by their EXIF orientation.

        Returns:
          The result of an image; the list of results of a list; or, for an iterator, an iterator over the results, which reads
          some images ahead and keeps none afterwards. Results have the order of the images.

        Raises:
          UserError: an image cannot be read, is of another format, or needs more memory than there is; or the network's scores
            are not finite.
        """
        if _is_image(images):
            [result] = self._in_order([images])
            return result
        if not isinstance(images, Iterable):
            raise UserError(f"an image is of type {type(images).__name__}; expected {EXPECTED}, or several of these")
        return list(self._in_order(images)) if isinstance(images, Sequence) else self._in_order(images)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Reads images. It outlives the iterators, one of which a script may leave before its end."""
        return ThreadPoolExecutor(THREADS)

    def _in_order(self, images: Iterable[ImageLike]) -> Iterator["Result"]:
        """Yields the images' results in order, when the devices have computed them."""
        waiting, expected = dict[int, Result](), 0
        expected_format = self.predictor.pixel_format
        taken = (_take(number, image, expected_format) for number, image in enumerate(images))
        read = ahead(self._threads, functools.partial(_read, expected_format), taken)
        for result in self.results(future.result() for _, future in read):
            waiting[result.example["number"]] = result  # with several devices, some images overtake others
            while expected in waiting:
                first = waiting.pop(expected)
                try:
                    first.labels  # noqa: B018 -- waits for the devices
                except UserError as error:
                    raise UserError(f"{first.example['name']}: {error}") from error
                expected += 1
                yield first

    def results(self, examples: Iterable[Example], on_error: OnError | None = None) -> Iterator["Result"]:
        """Yields the results of examples, each when the devices have begun to compute the group of images after its own.

        With one device, the results are in the order of the examples; with several, some examples overtake others.

        Args:
          examples: each with image [H, W, C] and name.
          on_error: called for an example that cannot be computed, which is then left out. None: the error is raised.
        """
        previous: list[Result] = []
        for group in self.predictor.groups(self.variables, examples):
            current = self._start(group, on_error)
            yield from previous
            previous = current
        yield from previous

    def _start(self, group: Sequence[Example], on_error: OnError | None) -> list["Result"]:
        """Starts the computation of a group's labels."""
        images = [example["image"] for example in group]
        try:
            with self.predictor.explain_out_of_memory(images):
                labels = self.predictor.labels(self.variables, images)
        except UserError as error:
            if len(group) > 1:  # a single image may be the cause
                return [result for example in group for result in self._start([example], on_error)]
            if on_error is None:
                raise UserError(f"{group[0]['name']}: {error}") from error
            on_error(group[0], error)
            return []
        return [Result(self, example, labels, i) for i, example in enumerate(group)]


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Made], items: Iterable[Item]
) -> Iterator[tuple[Item, Future[Made]]]:
    """Yields the items with what the pool's threads make of them, in order; they work on at most `AHEAD` items in advance."""
    working, remaining = collections.deque[tuple[Item, Future[Made]]](), iter(items)
    while True:
        for item in itertools.islice(remaining, AHEAD - len(working)):
            working.append((item, pool.submit(function, item)))
        if not working:
            return
        yield working.popleft()


def _is_image(given: object) -> bool:
    return isinstance(given, str | os.PathLike | Image.Image) or hasattr(given, "__array__")


def _take(number: int, image: ImageLike, expected: PixelFormat) -> Example:
    """Returns an example with a file's path, or with a copy of an image in memory, which its iterator may close or reuse.

    It also has a number and a name, for messages.
    """
    if isinstance(image, str | os.PathLike):
        from pspnet_jax.infer import video  # imports this module

        if os.fspath(image).lower().endswith(video.SUFFIXES):
            raise UserError(f"{image}: is a video; pass its frames, infer.video.frames(...), or use infer.video.write_overlay")
        return {"number": number, "name": str(path := files.absolute(image)), "image": path}
    name = f"image {number}"
    if not _is_image(image):
        raise UserError(f"{name}: is of type {type(image).__name__}; expected {EXPECTED}")
    if not isinstance(image, Image.Image):
        return {"number": number, "name": name, "image": np.array(image)}
    try:
        return {"number": number, "name": name, "image": image_files.pixels(image, name, expected)}
    except Exception as error:  # whatever Pillow raises for a damaged file, which it reads only now
        raise UserError(f"{name}: cannot be read ({image_files.reason(error)})") from error


def _read(expected: PixelFormat, example: Example) -> Example:
    """Reads the image, if the example has its path."""
    image = example["image"]
    return example if isinstance(image, np.ndarray) else {**example, "image": image_files.read(image, expected)}


class Confidence(NamedTuple):
    """How sure the network is about each pixel."""

    highest: np.ndarray  # f32[H, W], probability of the most probable class
    entropy: np.ndarray  # f32[H, W], of the classes' probabilities, in nats: 0 (certain) to log(K) (all are equally probable)


class Result:
    """The segmentation of an image.

    Attributes:
      example: the image [H, W, C], its name, and any other fields of its source.
    """

    def __init__(self, segmenter: Segmenter, example: Example, labels: jax.Array, index: int):
        """Takes the labels uint8[M, S, T] of a group of images, on the devices, and the image's index among them."""
        self.example = example
        self._segmenter, self._pending = segmenter, (labels, index)

    @property
    def image(self) -> np.ndarray:
        """The image, [H, W, C]."""
        return self.example["image"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes 0 to K-1."""
        return self._segmenter.classes

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The most probable class of each pixel, uint8[H, W] with values 0 to K-1.

        Raises:
          UserError: the network's scores are not finite, or memory ran out.
        """
        height, width, _ = self.image.shape
        labels, index = self._pending
        with self._segmenter.predictor.explain_out_of_memory([self.image]):
            label = np.array(np.asarray(labels)[index, :height, :width])
        if (label == IGNORE).any():
            raise UserError("the network's scores are not finite (NaN), so there is no most probable class")
        del self._pending  # frees the memory of the group
        return label

    def probabilities(self) -> np.ndarray:
        """Returns the probability of each class at each pixel, f32[H, W, K]. They are not kept: the network is run again."""
        return self._from_probabilities(lambda probabilities: probabilities)

    @functools.cached_property
    def confidence(self) -> Confidence:
        """The highest probability and the entropy at each pixel, from `probabilities`."""
        return Confidence(*self._from_probabilities(_confidence))

    def _from_probabilities(self, function: Callable[[jax.Array], Any]) -> Any:
        """Applies a function to the probabilities, on the devices."""
        predictor, (height, width, _) = self._segmenter.predictor, self.image.shape
        with predictor.explain_out_of_memory([self.image]):
            probabilities = predictor.probabilities(self._segmenter.variables, [self.image])[0, :height, :width]
            return jax.tree.map(np.asarray, function(probabilities))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """Returns the image with the class colors drawn over it: (1 - alpha) * image + alpha * colors."""
        return Image.fromarray(draw.overlay(self.image, self.labels, self._segmenter.info.colors, alpha))

    def save(self, path: epath.PathLike) -> None:
        """Writes the labels to a PNG whose values are class indices and whose palette has the class colors.

        Args:
          path: a name that ends in .png, local or gs://; an existing file is replaced.

        Raises:
          UserError: the name has another ending.
          OSError: the file cannot be written.
        """
        if not os.fspath(path).lower().endswith(".png"):
            raise UserError(
                f"{path}: labels are written as PNG; choose a name that ends in .png (pictures: overlay().save(...))"
            )
        draw.save(draw.palette_image(self.labels, self._segmenter.info.colors), files.absolute(path))


@jax.jit
def _confidence(probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the highest probability and the entropy f32[H, W] of probabilities f32[H, W, K]."""
    return probabilities.max(-1), jax.scipy.special.entr(probabilities).sum(-1)
