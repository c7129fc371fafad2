"""What can be wrong with an image and its label file, in one sentence that names the file, the fault and the likely cause."""

from collections.abc import Callable

import tensorflow as tf
from PIL import Image, ImageFile

from pspnet_jax import datasets

EXIF_ORIENTATION = 0x0112


def check_pair(image_file: str, label_file: str, num_classes: int, pixels: bool) -> None:
    """Raises a ValueError about the first thing wrong with a pair; without pixels, only their headers are read."""
    size = _inspect(image_file, lambda image: _image_problem(image, pixels))
    _inspect(label_file, lambda label: _label_problem(label, pixels, image_file, size, num_classes))


def _inspect(file: str, find_problem: Callable[[ImageFile.ImageFile], str | None]) -> tuple[int, int]:
    """Returns (width, height) of an image file, or raises a ValueError with the problem found in it."""
    try:
        with tf.io.gfile.GFile(file, "rb") as stream, Image.open(stream) as image:
            size, problem = image.size, find_problem(image)
    except (OSError, SyntaxError, tf.errors.OpError) as error:
        raise ValueError(f"{file}: cannot be read, damaged or cut short ({error}); replace it or remove the pair") from error
    if problem:
        raise ValueError(f"{file}: {problem}")
    return size


def _image_problem(image: ImageFile.ImageFile, pixels: bool) -> str | None:
    if image.format not in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG with further pictures behind it, from phones
        return f"is a {image.format} file despite its name; convert it to JPEG or PNG"
    if image.mode == "CMYK":
        return "is a CMYK image; convert it to RGB"
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
    label: ImageFile.ImageFile, pixels: bool, image_file: str, size: tuple[int, int], num_classes: int
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
    if label.size != size:
        (width, height), (other_width, other_height) = label.size, size
        return f"is {width}x{height}, but its image {image_file} is {other_width}x{other_height}; both must have one size"
    return datasets.label_problem(label.histogram(), num_classes) if pixels else None
