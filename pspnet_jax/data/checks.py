"""What can be wrong with an image and its label file, in one sentence that names the file, the fault and the likely cause."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
import scipy.io
import tensorflow as tf
from PIL import Image, ImageFile

from pspnet_jax import datasets, image_files
from pspnet_jax.errors import MissingFileError, UserError


class WrongValues(UserError):
    """A label is no class index where it has to be one: one wrong file, and likely all of them are wrong alike."""


Seen = tuple[list[int], dict[int, tuple[int, ...]]]  # pixels of each value in a label file; in a palette, the values' colors


class Look(NamedTuple):
    """What was seen of a pair with which nothing is wrong.

    Attributes:
      orientation: of the image, see `image_files.orientation`.
      values: int64[256], the label's pixels of each class and of 255; None where only the headers were read.
      palette: (R, G, B) of the values that occur in a palette label.
    """

    orientation: int
    values: np.ndarray | None = None
    palette: Mapping[int, tuple[int, ...]] = {}


def check_pair(image_file: str, label_file: str, num_classes: int, pixels: bool, benchmark: str | None) -> Look:
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
    with _opened(image_file, label_file) as file:
        contents = file.read() if pixels else b""
        size, tag = _check_image(io.BytesIO(contents) if pixels else file, contents)
    upright = size[::-1] if tag >= 5 else size
    with _opened(label_file, image_file) as file:
        label_contents = file.read() if pixels else b""
        if contents and contents == label_contents:
            raise UserError("is the same file as its image; put the label there")
        check = _check_mat if label_file.endswith(".mat") else _check_label
        label_size, seen = check(io.BytesIO(label_contents) if pixels else file, label_contents)
        if label_size != upright:
            raise UserError(_size_problem(label_size, image_file, size, tag))
        if not seen:
            return Look(tag)
        histogram, palette = seen
        if benchmark:
            problem = datasets.raw_label_problem(benchmark, histogram)
            values = np.bincount(datasets.classes_of_raw_values(benchmark), histogram, 256).astype(np.int64)
        else:
            problem, values = datasets.label_problem(histogram, num_classes), np.asarray(histogram)
        if problem:
            raise WrongValues(problem)
    return Look(tag, values, palette)


def example_problem(image: np.ndarray, label: np.ndarray, num_classes: int) -> str | None:
    """Describes what is wrong with a loaded example, if anything is: its types, its sizes, or its label's values."""
    kinds = [(array.dtype, array.shape[2:], array.ndim) for array in (image, label)]
    if kinds != [(np.uint8, (3,), 3), (np.uint8, (), 2)]:
        found = [f"{array.dtype}{list(array.shape)}" for array in (image, label)]
        return f"has image {found[0]} and label {found[1]}, expected uint8[H, W, 3] and uint8[H, W]"
    if image.shape[:2] != label.shape:
        return f"the image is {image.shape[:2]}, the label {label.shape} (height, width)"
    if not label.size:
        return "has no pixels"
    if (label + np.uint8(1)).max() > num_classes:  # IGNORE + 1 is 0
        return datasets.label_problem(np.bincount(label.ravel(), minlength=256).tolist(), num_classes)
    return None


def decode_label(contents: bytes) -> np.ndarray:
    """Decodes a label file's contents to uint8[H,W]: a palette PNG by its indices, SBD's .mat by its GTcls.Segmentation.

    Raises:
      ValueError: it is neither.
    """
    if contents.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(contents)) as label:
            if problem := _kind_problem(label):
                raise ValueError(problem)
            return np.asarray(label)
    try:
        return np.asarray(scipy.io.loadmat(io.BytesIO(contents))["GTcls"][0, 0]["Segmentation"], np.uint8)
    except Exception as error:  # whatever scipy raises over a damaged file
        raise ValueError(f"no palette PNG, and no .mat file with GTcls.Segmentation ({error})") from error


@contextlib.contextmanager
def _opened(file: str, partner: str) -> Iterator[BinaryIO]:
    """Opens a file; what goes wrong with it becomes a UserError that begins with its name."""
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            yield stream
    except UserError as error:
        raise type(error)(f"{file}: {error}") from None
    except tf.errors.NotFoundError as error:
        if os.path.islink(file):
            raise MissingFileError(f"{file}: a broken link, to {os.readlink(file)}") from error
        raise MissingFileError(f"{file}: no such file, which has to go with {partner}") from error
    except (tf.errors.PermissionDeniedError, tf.errors.FailedPreconditionError) as error:
        raise UserError(f"{file}: cannot be read ({error.message.split('; ')[-1]})") from error
    except Exception as error:  # whatever Pillow or scipy raises over a damaged file
        if isinstance(error, image_files.TOO_LARGE):
            raise UserError(f"{file}: cannot be read ({image_files.reason(error)})") from error
        cause = image_files.reason(error) if tf.io.gfile.stat(file).length else "the file is empty"
        raise UserError(f"{file}: cannot be read, damaged or cut short ({cause}); replace it or remove the pair") from error


def _check_image(file: BinaryIO, contents: bytes) -> tuple[tuple[int, int], int]:
    """Returns (width, height) as the file has them, and the orientation; looks at the pixels in the contents, if given."""
    with Image.open(file) as image:
        if image.format not in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG with further pictures behind it, from phones
            raise UserError(f"is a {image.format} file despite its name; convert it to JPEG or PNG")
        if problem := image_files.kind_problem(image):
            raise UserError(problem)
        size, kind, tag = image.size, image.format, image_files.orientation(image)
    if contents and kind == "PNG" and not image_files.is_whole_png(contents):
        raise ValueError(image_files.CUT_SHORT)
    if contents and kind != "PNG":
        with Image.open(io.BytesIO(contents)) as image:
            image.draft(None, (1, 1))  # an eighth of the size: reads the whole file in less time
            image.load()
    return size, tag


def _check_label(file: BinaryIO, contents: bytes) -> tuple[tuple[int, ...], Seen | None]:
    """Returns (width, height) and, given the contents, the histogram and a palette's colors of the values in it."""
    with Image.open(file) as label:
        if label.format != "PNG":
            raise UserError(f"is a {label.format} file despite its name; labels must be PNGs of class indices")
        if problem := _kind_problem(label):
            raise UserError(problem)
        if (tag := image_files.orientation(label)) != 1:
            raise UserError(
                f"has an EXIF orientation of {tag}, but labels are read as they are; turn it upright, or drop the tag"
            )
        if not contents:
            return label.size, None
        if not image_files.is_whole_png(contents):
            raise ValueError(image_files.CUT_SHORT)
        histogram, colors = label.histogram(), label.getpalette() or []
        return label.size, (histogram, {v: tuple(colors[3 * v : 3 * v + 3]) for v in range(len(colors) // 3) if histogram[v]})


def _check_mat(file: BinaryIO, contents: bytes) -> tuple[tuple[int, ...], Seen | None]:
    """Does the same with a .mat file, whose pixels have to be read in any case."""
    label = decode_label(contents or file.read())
    return label.shape[::-1], (np.bincount(label.ravel(), minlength=256).tolist(), {})


def _kind_problem(label: ImageFile.ImageFile) -> str | None:
    """Says which kind of pixels a label PNG has, if they are no class indices of 8 bits or of a palette."""
    if label.mode in ("RGB", "RGBA"):
        return _color_problem(label)
    kind = image_files.raw_mode(label)
    if label.mode == "P" or kind == "L":
        return None
    return f"has pixels of kind {kind!r}; expected an 8-bit gray or a palette PNG of class indices: convert it"


def _color_problem(label: ImageFile.ImageFile) -> str:
    red, green, blue = np.moveaxis(np.asarray(label)[..., :3], -1, 0)
    if (red == green).all() and (red == blue).all():
        return (
            f"is an {label.mode} picture whose red, green and blue are equal; expected one channel: save one of them as an "
            "8-bit gray PNG"
        )
    return (
        f"is an {label.mode} picture: labels drawn in colors, or a photo where a label belongs; expected one channel: replace "
        "each color by its class index"
    )


def _size_problem(label: tuple[int, ...], image_file: str, image: tuple[int, int], tag: int) -> str:
    if tag < 5:
        return f"is {label[0]}x{label[1]}, but its image {image_file} is {image[0]}x{image[1]}; both must have one size"
    cure = "both must have one size" if label != image else "turn the label as well, or drop the image's orientation tag"
    return (
        f"is {label[0]}x{label[1]}, but its image {image_file} is {image[1]}x{image[0]} once it is turned upright, as its EXIF "
        f"orientation {tag} asks for; {cure}"
    )
