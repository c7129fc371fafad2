"""Reading users' images in the same way for training, evaluation and prediction: upright, RGB, 8 bits per channel.

TensorFlow's decoders (see data/reader.py) give the same pixels as Pillow's, but ignore the orientation tag; `turn` applies it.
"""

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import cv2
import numpy as np
from etils import epath
from PIL import ExifTags, Image, UnidentifiedImageError

from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Size = tuple[int, int]  # height, width
TAIL = 2**17  # bytes at the end of a PNG that are searched for metadata, which may follow the pixels
CUT_SHORT = "its pixels are damaged or end early"
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_warned = set[str]()  # remarks that have been logged
_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # markers of the PNG chunks that can hold an orientation


def read(path: epath.PathLike) -> np.ndarray:
    """Returns uint8[H,W,3], RGB, turned upright by its orientation tag.

    Raises:
      UserError: the file is not an image, is damaged or too large, or has a pixel format that `pixel_format_problem` rejects.
    """
    try:
        contents = epath.Path(path).read_bytes()
        with Image.open(io.BytesIO(contents)) as image:
            if image.format == "PNG" and not pixel_format_problem(image) and not is_whole_png(contents):
                raise ValueError(CUT_SHORT)
            return pixels(image, path)
    except Exception as error:  # whatever Pillow raises for a damaged file
        raise UserError(f"{path}: cannot be read as an image ({reason(error)})") from error


def pixels(image: Image.Image, name: object) -> np.ndarray:
    """Returns a Pillow image as `read` does.

    Args:
      image: loaded or only opened.
      name: where it is from, for a remark that is logged about what is ignored.

    Raises:
      UserError: it has a pixel format that `pixel_format_problem` rejects.
    """
    if problem := pixel_format_problem(image):
        raise UserError(f"it {problem}")
    for remark in filter(None, (_frames_remark(image), _alpha_remark(image))):
        _warn_once(remark, name)
    rgb = np.asarray(image.convert("RGB"))
    return turn(rgb, orientation(image))  # 1 for a TIFF, which Pillow has turned while loading it


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Returns uint8[h,w,3] of 1 to 4 stored channels: gray is repeated, and alpha ignored."""
    if pixels.dtype != np.uint8:
        raise UserError(f"has {pixels.dtype} pixels; convert it to 8 bits per channel")
    return pixels[..., [0, 0, 0]] if pixels.shape[2] < 3 else pixels[..., :3]


def _frames_remark(image: Image.Image) -> str:
    several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # MPO: a phone's JPEG followed by previews
    return "contains several images, of which only the first is read" if several else ""


def _alpha_remark(image: Image.Image) -> str:
    if not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255:
        return ""
    return "has a fourth channel, such as transparency, which is ignored; transparent pixels keep their RGB values"


def _warn_once(remark: str, name: object) -> None:
    if remark not in _warned:
        _warned.add(remark)
        logger.warning(f"{name}: {remark} (logged only for the first such image)")


def pixel_format_problem(image: Image.Image) -> str | None:
    """Returns what is wrong with an image's pixel format, or None if it is supported."""
    if image.mode == "CMYK":
        return "is a CMYK image; convert it to RGB"
    if image.mode.startswith(("I", "F")) or (image.format in ("PNG", "TIFF") and ";16" in raw_mode(image)):
        return "has 16 or more bits per channel; convert it to 8"
    return None


def raw_mode(image: Image.Image) -> str:
    """Returns Pillow's name for the stored pixel format of an image that is not loaded yet, such as "RGB;16B"."""
    tiles = getattr(image, "tile", ())  # empty if the image is loaded, or not from a file
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str((arguments or ("",))[0])


def is_whole_png(contents: bytes) -> bool:
    """Returns whether a PNG decodes completely, as TensorFlow requires; Pillow silently fills missing pixels with 0."""
    return cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_UNCHANGED) is not None


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) to 8, of an image that is loaded or only opened; 1 if it is invalid.

    Every kind of metadata that Pillow supports is read. A PNG is only decoded if metadata follows the pixels.
    """
    try:
        file = getattr(image, "fp", None)
        late = image.format == "PNG" and file is not None and any(name in _read_tail(file) for name in _METADATA)
        exif = image.getexif() if late else Image.Image.getexif(image)
        tag = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises for malformed EXIF; the pixels may still be valid
        return 1
    return tag if 1 <= tag <= 8 else 1


def orientation_of(contents: bytes | np.ndarray) -> np.int64:
    """Returns the `orientation` of a file's contents, given as bytes or as a scalar object array; 1 if it is not an image."""
    contents = contents.item() if isinstance(contents, np.ndarray) else contents
    try:
        with Image.open(io.BytesIO(contents)) as image:
            return np.int64(orientation(image))
    except Exception:  # reported when the image is decoded
        return np.int64(1)


def turn(image: np.ndarray, tag: int) -> np.ndarray:
    """Turns [H,W,C], as stored in a file with this orientation tag, upright, as PIL.ImageOps.exif_transpose does."""
    if tag >= 5:  # the first stored row is the left or right side of the image
        image = image.swapaxes(0, 1)
    rows = slice(None, None, -1 if tag in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if tag in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])


def reason(error: Exception) -> str:
    """Returns why Pillow could not read an image."""
    if isinstance(error, TOO_LARGE):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it is larger than the limit of {limit:.0f} million pixels; cut it into smaller images"
    return "its contents are not an image" if isinstance(error, UnidentifiedImageError) else str(error)


def sizes(paths: Sequence[epath.PathLike]) -> list[Size]:
    """Returns the height and width of each upright image from its header; (0, 0) if they cannot be read."""
    with ThreadPoolExecutor(16) as pool:  # reading a header is mostly waiting
        return list(pool.map(_size, paths))


def _size(path: epath.PathLike) -> Size:
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            width, height = image.size
            turned = orientation(image) >= 5 and image.format != "TIFF"  # for TIFF, Pillow reports the upright size
            return (width, height) if turned else (height, width)
    except Exception:  # whatever a decoder raises; reported when the image is read
        return 0, 0


def _read_tail(file: IO[bytes]) -> bytes:
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    end = file.tell() if end is None else end  # TensorFlow's files do not return it
    file.seek(max(position, end - TAIL))
    tail = file.read()
    file.seek(position)
    return tail
