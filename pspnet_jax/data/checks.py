"""Checks of an image and its label. An error is one sentence that names the file, the fault and the likely cause."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import scipy.io
import tensorflow as tf
from PIL import Image

from pspnet_jax import datasets, image_files
from pspnet_jax.data import label_files
from pspnet_jax.data.label_files import LabelReader, WrongValues
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.large_files import LargeTiff, is_large, open_image, strips

COLORED = (
    "has colors instead of class indices; set dataset.label_map, or replace each color with its class index; if it is a photo, "
    "replace it with the label"
)
LINE = 9  # pixels; 0 is a boundary if hardly any square of this size is all 0, but most of the rest is in squares without 0


class CheckedPair(NamedTuple):
    """Properties of a valid pair.

    Attributes:
      orientation: of the image, see `image_files.orientation`.
      pixels: int64[256], the label's number of pixels of each class and of 255; None if only the headers were read.
      palette: (R, G, B) of the values that occur in a palette label.
      outlines: whether value 0 occurs only in lines between areas of other values; None if that is unknown.
    """

    orientation: int = 1
    pixels: np.ndarray | None = None
    palette: Mapping[int, tuple[int, ...]] = {}
    outlines: bool | None = None


def check_pair(
    image_file: str,
    label_file: str,
    num_classes: int,
    read_pixels: bool,
    benchmark: str | None,
    reader: LabelReader | None = None,
    pixel_format: image_files.PixelFormat = image_files.RGB8,
) -> CheckedPair:
    """Checks a pair, and raises an error about its first fault.

    Args:
      image_file: see `image_files`.
      label_file: a PNG, or a .mat file of SBD; with a reader, any file that it reads.
      num_classes: K.
      read_pixels: whether to read all pixels, or only the headers.
      benchmark: the benchmark whose raw values the label has; None if it has class indices.
      reader: of labels that have neither.
      pixel_format: of the image.

    Raises:
      WrongValues: only the label's values are wrong.
      UserError: anything else is wrong.
    """
    with _opened(image_file, label_file) as file:
        contents = b""
        if is_large(image_file):
            header = _check_large_image(image_file, read_pixels, pixel_format)
        else:
            contents = file.read() if read_pixels else b""
            header = _check_image(io.BytesIO(contents) if read_pixels else file, image_file, contents, pixel_format)
    with _opened(label_file, image_file) as file:
        if reader and is_large(label_file):
            label_size, found = _check_large_label(label_file, read_pixels, reader)
        else:
            kind = os.path.splitext(label_file)[1].lower()
            read_all = read_pixels or kind in (".npy", ".mat")  # which have no header with the size
            label_contents = file.read() if read_all and kind != ".json" else b""
            if contents and contents == label_contents:
                raise UserError("is a copy of its image; replace it with the label")
            label_size, found = _check_label(label_file, image_file, file, label_contents, reader)
        if label_size != header.upright_size:
            raise UserError(_size_problem(label_size, image_file, header))
        problem, found = None, found._replace(orientation=header.orientation)
        if found.pixels is not None and benchmark:
            problem = datasets.raw_label_problem(benchmark, found.pixels)
            pixels = np.bincount(datasets.classes_of_raw_values(benchmark), found.pixels, 256).astype(np.int64)
            found = found._replace(pixels=pixels, outlines=None)
        elif found.pixels is not None:
            problem = datasets.label_problem(found.pixels, num_classes)
        if problem:
            raise WrongValues(problem)
    return found


def example_problem(
    image: np.ndarray, label: np.ndarray, num_classes: int, pixel_format: image_files.PixelFormat = image_files.RGB8
) -> str | None:
    """Returns a description of what is wrong with a loaded example's dtypes, shapes or label values, or None."""
    kinds = [(array.dtype, array.shape[2:], array.ndim) for array in (image, label)]
    channels, dtype = pixel_format
    if kinds != [(dtype, (channels,), 3), (np.uint8, (), 2)]:
        found = [f"{array.dtype}{list(array.shape)}" for array in (image, label)]
        return f"has image {found[0]} and label {found[1]}, expected {dtype}[H, W, {channels}] and uint8[H, W]"
    if image.shape[:2] != label.shape:
        return f"the image is {image.shape[:2]}, but the label is {label.shape} (height, width)"
    if isinstance(label, LargeTiff):
        return None  # its values are checked in each window
    if not label.size:
        return "has no pixels"
    return datasets.label_problem(histogram(label), num_classes) if has_wrong_value(label, num_classes) else None


def has_wrong_value(label: np.ndarray, num_classes: int) -> bool:
    """Returns whether a value of uint8[H,W] is neither in 0..K-1 nor `datasets.IGNORE`."""
    return bool((label + np.uint8(1)).max(initial=0) > num_classes)  # IGNORE + 1 is 0


def histogram(label: np.ndarray | LargeTiff) -> np.ndarray:
    """Returns int64[256], the number of pixels of each value of uint8[H,W]."""
    # bincount makes a copy in int64, so it gets a million pixels at a time
    parts = (part for strip in strips(label) for part in np.array_split(strip.ravel(), max(1, strip.size >> 20)))
    return np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)


def is_read_in_graph(file: str, pixel_format: image_files.PixelFormat) -> bool:
    """Returns whether TensorFlow alone decodes an image file; otherwise, `image_files.decode` does."""
    return pixel_format == image_files.RGB8 and file.lower().endswith((".jpg", ".jpeg", ".png"))


def decode_label(contents: bytes) -> np.ndarray:
    """Decodes a label file's contents to uint8[H,W].

    These are the values or palette indices of a PNG, which may repeat them as R = G = B, or GTcls.Segmentation of SBD's .mat.

    Raises:
      UserError: a PNG has colors or larger values.
      ValueError: the contents are neither.
    """
    if contents.startswith(b"\x89PNG"):
        label = label_files.decode_image(contents, keep_indices=True)
        if label.ndim == 3:
            if (label != label[..., :1]).any():
                raise UserError(COLORED)
            label = label[..., 0]
        if label.size and label.max() > datasets.IGNORE:
            raise UserError(f"has value {label.max()}; expected at most {datasets.IGNORE}; set dataset.label_map")
        return label.astype(np.uint8, copy=False)
    try:
        return np.asarray(scipy.io.loadmat(io.BytesIO(contents))["GTcls"][0, 0]["Segmentation"], np.uint8)
    except Exception as error:  # whatever scipy raises for a damaged file
        raise ValueError(f"neither a palette PNG nor a .mat file with GTcls.Segmentation ({error})") from error


@contextlib.contextmanager
def _opened(file: str, partner: str) -> Iterator[BinaryIO]:
    """Opens a file, and turns every error in the block into a UserError that begins with the file's name."""
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            yield stream
    except UserError as error:
        raise type(error)(str(error) if str(error).startswith(f"{file}: ") else f"{file}: {error}") from None
    except tf.errors.NotFoundError as error:
        if os.path.islink(file):
            raise MissingFileError(f"{file}: is a broken link to {os.readlink(file)}") from error
        raise MissingFileError(f"{file}: no such file; it belongs to {partner}") from error
    except (tf.errors.PermissionDeniedError, tf.errors.FailedPreconditionError) as error:
        raise UserError(f"{file}: cannot be read ({error.message.split('; ')[-1]})") from error
    except Exception as error:  # whatever Pillow or scipy raises for a damaged file
        if isinstance(error, image_files.TOO_LARGE):
            raise UserError(f"{file}: cannot be read ({image_files.reason(error)})") from error
        cause = image_files.reason(error) if tf.io.gfile.stat(file).length else "the file is empty"
        raise UserError(
            f"{file}: cannot be read because it is damaged or cut short ({cause}); replace it or remove the pair"
        ) from error


def _check_image(file: BinaryIO, name: str, contents: bytes, pixel_format: image_files.PixelFormat) -> image_files.Header:
    """Returns the header of an image; checks the pixels too if the contents are given."""
    header = image_files.read_header(file)
    readable = header.kind in ("JPEG", "MPO", "PNG")  # MPO: a phone's JPEG, with previews
    readable = readable or (header.kind == "GIF" and image_files.count_frames(name) == 1)
    if is_read_in_graph(name, pixel_format) and not readable:
        raise UserError(f"is a {header.kind} file despite its name; rename it, or convert it to JPEG or PNG")
    if problem := pixel_format.problem(header.stored):
        raise UserError(problem)
    if contents and header.kind in ("JPEG", "MPO") and pixel_format == image_files.RGB8:
        with Image.open(io.BytesIO(contents)) as image:
            image.draft(None, (1, 1))  # decodes the whole file at an eighth of its size, which is faster
            image.load()
    elif contents and header.kind == "PNG" and pixel_format == image_files.RGB8:
        if not image_files.is_whole_png(contents):
            raise ValueError(image_files.CUT_SHORT)
    elif contents:
        image_files.decode(contents, name, pixel_format)
    return header


def _check_large_image(path: str, read_pixels: bool, pixel_format: image_files.PixelFormat) -> image_files.Header:
    """Does the same as `_check_image` for a large TIFF."""
    image = open_image(path, pixel_format)
    for _ in image.strips() if read_pixels else ():
        pass
    return image.header


def open_large_label(path: str, reader: LabelReader) -> LargeTiff:
    """Opens a large TIFF as a label uint8[H,W]; reading a window raises `WrongValues` if the map lacks a value in it."""

    def convert(stored: np.ndarray) -> np.ndarray:
        return reader.to_classes(label_files.normalize(stored[..., :1] if stored.shape[2] < 3 else stored))

    label = LargeTiff(path, convert)
    if problem := None if reader.keep_indices else label.problem("PALETTE"):
        raise UserError(f"{path}: {problem}")
    return label


def _check_large_label(path: str, read_pixels: bool, reader: LabelReader) -> tuple[tuple[int, ...], CheckedPair]:
    """Returns the same as `_check_label` for a large TIFF."""
    label = open_large_label(path, reader)
    return label.shape, CheckedPair(pixels=histogram(label) if read_pixels else None)


def _check_label(
    label_file: str, image_file: str, file: BinaryIO, contents: bytes, reader: LabelReader | None
) -> tuple[tuple[int, ...], CheckedPair]:
    """Returns (height, width) and the label's properties; of its pixels, if the contents are given or the file is no image.

    With a reader, pixels are counted by class, otherwise by value.
    """
    is_tiff = reader is not None and label_file.lower().endswith((".tif", ".tiff"))
    if is_tiff and not contents:
        header = image_files.read_header(file)  # also of those that Pillow cannot read
        _require_upright(header.orientation)
        return header.size, CheckedPair()
    if label_file.lower().endswith((".npy", ".mat", ".json")) or (is_tiff and label_files.needs_tifffile(contents)):
        classes = reader.read(label_file, image_file, contents) if reader else decode_label(contents)
        return classes.shape, CheckedPair(pixels=histogram(classes))
    with Image.open(io.BytesIO(contents) if contents else file) as label:
        if not reader and label.format != "PNG":
            raise UserError(f"is a {label.format} file despite its name; labels must be PNGs of class indices")
        _require_upright(image_files.orientation(label))
        if not contents:
            return label.size[::-1], CheckedPair()
        if label.format == "PNG" and not image_files.is_whole_png(contents):
            raise ValueError(image_files.CUT_SHORT)
        if reader:
            classes, palette = reader.read(label_file, image_file, contents), {}
            if label.mode == "P" and reader.keep_indices:
                palette = label_files.palette(label, np.flatnonzero(label.histogram()).tolist())
            return classes.shape, CheckedPair(pixels=histogram(classes), palette=palette)
        is_plain = label.mode == "P" or image_files.raw_mode(label) == "L"
        values = label if is_plain else Image.fromarray(decode_label(contents))
        counts = np.array(values.histogram())
        palette = label_files.palette(values, np.flatnonzero(counts).tolist())
        return label.size[::-1], CheckedPair(1, counts, palette, _outlines(np.asarray(values), counts[0]))


def _require_upright(tag: int) -> None:
    if tag != 1:
        raise UserError(
            f"has EXIF orientation {tag}, but labels are read without turning them; turn it upright, or remove the tag"
        )


def _outlines(label: np.ndarray, zeros: int) -> bool | None:
    """Returns `CheckedPair.outlines`."""
    if not zeros:
        return None
    if 4 * zeros > label.size:
        return False
    square, mask = np.ones((LINE, LINE), np.uint8), (label == 0).astype(np.uint8)
    inside = cv2.countNonZero(cv2.erode(1 - mask, square))
    return 100 * cv2.countNonZero(cv2.erode(mask, square)) < zeros and 2 * inside > label.size - zeros


def _size_problem(label: tuple[int, ...], image_file: str, header: image_files.Header) -> str:
    tag, (height, width) = header.orientation, header.upright_size
    turned = f" after turning it upright by its EXIF orientation {tag}" if tag >= 5 else ""
    alike = label == header.size
    remedy = "turn the label too, or remove the image's orientation tag" if alike else "both must have the same size"
    return f"is {label[1]}x{label[0]}, but its image {image_file} is {width}x{height}{turned}; {remedy}"
