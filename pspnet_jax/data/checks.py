"""What can be wrong with an image and its label file, in one sentence that names the file, the fault and the likely cause."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import scipy.io
import tensorflow as tf
from PIL import Image, ImageFile

from pspnet_jax import datasets
from pspnet_jax.errors import UserError

EXIF_ORIENTATION = 0x0112
Values = Callable[[Sequence[int]], None]  # refuses a histogram of a label's values 0..255


class WrongValues(UserError):
    """A label is no class index where it has to be one: one wrong file, and likely all of them are wrong alike."""


def check_pair(image_file: str, label_file: str, num_classes: int, pixels: bool, benchmark: str | None) -> None:
    """Refuses a pair with the first thing that is wrong with it.

    Args:
      image_file: a JPEG or PNG.
      label_file: a PNG, or a .mat of SBD.
      num_classes: K.
      pixels: look at all pixels; else read the headers only.
      benchmark: whose raw values the label has; None: classes.

    Raises:
      WrongValues: the label's values are wrong, and nothing else.
      UserError: anything else.
    """

    def values(histogram: Sequence[int]) -> None:
        if benchmark:
            problem = datasets.raw_label_problem(benchmark, histogram)
        else:
            problem = datasets.label_problem(histogram, num_classes)
        if problem:
            raise WrongValues(f"{label_file}: {problem}")

    size = _inspect(image_file, label_file, lambda image: _image_problem(image, pixels))
    if label_file.endswith(".mat"):
        _check_mat(label_file, image_file, size, values)
    else:
        _inspect(label_file, image_file, lambda label: _label_problem(label, pixels, image_file, size, values))


def example_problem(image: np.ndarray, label: np.ndarray, num_classes: int) -> str | None:
    """Describes what is wrong with a loaded example, if anything is: its types, its sizes, or its label's values."""
    kinds = [(array.dtype, array.shape[2:], array.ndim) for array in (image, label)]
    if kinds != [(np.uint8, (3,), 3), (np.uint8, (), 2)]:
        found = [f"{array.dtype}{list(array.shape)}" for array in (image, label)]
        return f"has image {found[0]} and label {found[1]}, expected uint8[H, W, 3] and uint8[H, W]"
    if image.shape[:2] != label.shape:
        return f"the image is {image.shape[:2]}, the label {label.shape} (height, width)"
    if label.size and (label + np.uint8(1)).max() > num_classes:  # IGNORE + 1 is 0
        return datasets.label_problem(np.bincount(label.ravel(), minlength=256).tolist(), num_classes)
    return None


def decode_label(contents: bytes) -> np.ndarray:
    """Decodes a label file's contents to uint8[H,W]: a palette PNG by its indices, SBD's .mat by its GTcls.Segmentation.

    Raises:
      ValueError: it is neither.
    """
    if contents.startswith(b"\x89PNG"):
        return np.asarray(Image.open(io.BytesIO(contents)))
    try:
        return np.asarray(scipy.io.loadmat(io.BytesIO(contents))["GTcls"][0, 0]["Segmentation"], np.uint8)
    except Exception as error:  # whatever scipy raises over a damaged file
        raise ValueError(f"no palette PNG, and no .mat file with GTcls.Segmentation ({error})") from error


def _check_mat(file: str, image_file: str, size: tuple[int, int], values: Values) -> None:
    with _opened(file, image_file) as stream:
        label = decode_label(stream.read())
    if problem := _size_problem(label.shape[::-1], image_file, size):
        raise UserError(f"{file}: {problem}")
    values(np.bincount(label.ravel(), minlength=256).tolist())


def _inspect(file: str, partner: str, find_problem: Callable[[ImageFile.ImageFile], str | None]) -> tuple[int, int]:
    """Returns (width, height) of an image file, or raises a UserError with the problem found in it."""
    with _opened(file, partner) as stream, Image.open(stream) as image:
        size = image.size  # which reading a draft changes
        if problem := find_problem(image):
            raise UserError(f"{file}: {problem}")
        return size


@contextlib.contextmanager
def _opened(file: str, partner: str) -> Iterator[BinaryIO]:
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            yield stream
    except UserError:
        raise
    except tf.errors.NotFoundError as error:
        raise UserError(f"{file}: no such file, which has to go with {partner}") from error
    except Exception as error:  # whatever Pillow or scipy raises over a damaged file
        raise UserError(f"{file}: cannot be read, damaged or cut short ({error}); replace it or remove the pair") from error


def _image_problem(image: ImageFile.ImageFile, pixels: bool) -> str | None:
    if image.format not in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG with further pictures behind it, from phones
        return f"is a {image.format} file despite its name; convert it to JPEG or PNG"
    if image.mode == "CMYK":
        return "is a CMYK image; convert it to RGB"
    if "16" in image.mode or "16" in str(image.tile[0][3]):
        return "has 16 bits a channel; convert it to 8"
    orientation = image.getexif().get(EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    if orientation != 1:
        return f"has EXIF orientation {orientation}, so it may be turned against its label; turn the pixels and drop the tag"
    if pixels and image.format == "PNG":
        image.verify()  # checksums, without decoding
    elif pixels:
        image.draft(None, (1, 1))  # an eighth of the size: reads the whole file in less time
        image.load()
    return None


def _label_problem(
    label: ImageFile.ImageFile, pixels: bool, image_file: str, size: tuple[int, int], values: Values
) -> str | None:
    if label.format != "PNG":
        return f"is a {label.format} file despite its name; labels must be PNGs of class indices"
    if label.mode in ("RGB", "RGBA"):
        return (
            f"is an {label.mode} picture, probably labels drawn in colors; expected one channel: replace each color by its "
            "class index"
        )
    kind = label.tile[0][3]
    if label.mode != "P" and kind != "L":
        return f"has pixels of kind {kind!r}; expected an 8-bit gray or a palette PNG of class indices"
    problem = _size_problem(label.size, image_file, size)
    if pixels and not problem:
        values(label.histogram())
    return problem


def _size_problem(label: tuple[int, ...], image_file: str, image: tuple[int, int]) -> str | None:
    if label == image:
        return None
    return f"is {label[0]}x{label[1]}, but its image {image_file} is {image[0]}x{image[1]}; both must have one size"
