"""Reading a user's image, by one rule for training, evaluation and prediction: upright, RGB, 8 bits a channel.

TensorFlow's decoders (see data/reader.py) give the same pixels as Pillow's, but know no orientation: what they have decoded is
turned by `turn`.
"""

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import cv2
import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Size = tuple[int, int]  # height, width
TAIL = 2**17  # bytes at the end of a PNG that are searched for metadata, which may follow the pixels
CUT_SHORT = "its pixels are damaged or end early"
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_said = set[str]()  # about any image so far
_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what a PNG may say its orientation in


def read(path: epath.PathLike) -> np.ndarray:
    """Returns uint8[H, W, 3], RGB, turned upright as its orientation tag says.

    Raises:
      UserError: the file is no image, is damaged or too large, or its pixels are of a kind that `kind_problem` names.
    """
    try:
        contents = epath.Path(path).read_bytes()
        with Image.open(io.BytesIO(contents)) as image:
            if problem := kind_problem(image):
                raise ValueError(f"it {problem}")
            if image.format == "PNG" and not is_whole_png(contents):
                raise ValueError(CUT_SHORT)
            for remark in filter(None, (_frames(image), _transparency(image))):
                _say(remark, path)
            pixels = np.asarray(image.convert("RGB"))
            return turn(pixels, orientation(image))  # which is 1 now for a TIFF: Pillow turns those as it loads them
    except Exception as error:  # whatever Pillow raises over a damaged file
        raise UserError(f"{path}: cannot be read as an image ({reason(error)})") from error


def _frames(image: ImageFile.ImageFile) -> str:
    several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # a phone's JPEG with previews behind the picture
    return "holds several pictures, of which the first is read" if several else ""


def _transparency(image: ImageFile.ImageFile) -> str:
    if not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255:
        return ""
    return "has a fourth channel, as of transparency, which is left out: its pixels are read in the colors below it"


def _say(remark: str, path: epath.PathLike) -> None:
    if remark not in _said:
        _said.add(remark)
        logger.warning(f"{path}: {remark}; this is said of the first such image only")


def kind_problem(image: ImageFile.ImageFile) -> str | None:
    """Says which kind of pixels an image has, if it is one that is not read."""
    if image.mode == "CMYK":
        return "is a CMYK image; convert it to RGB"
    if image.mode.startswith(("I", "F")) or (image.format in ("PNG", "TIFF") and ";16" in raw_mode(image)):
        return "has 16 or more bits a channel; convert it to 8"
    return None


def raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns Pillow's name of the pixels in the file, such as "RGB;16B", of an image that is not loaded yet."""
    arguments = image.tile[0].args if image.tile else ""
    return arguments if isinstance(arguments, str) else str((arguments or ("",))[0])


def is_whole_png(contents: bytes) -> bool:
    """Decodes a PNG strictly, as TensorFlow does; where the pixels end early, Pillow takes the rest as 0 without a word."""
    return cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_UNCHANGED) is not None


def orientation(image: ImageFile.ImageFile) -> int:
    """Returns the EXIF orientation of an image, loaded or only opened, 1 (upright) to 8, from whatever Pillow finds it in.

    What makes no sense counts as 1. A PNG is not decoded for it, which Pillow would do.
    """
    try:
        late = image.format == "PNG" and image.fp is not None and any(name in _tail(image.fp) for name in _METADATA)
        exif = image.getexif() if late else Image.Image.getexif(image)
        tag = int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises over malformed EXIF, which says nothing about the pixels
        return 1
    return tag if 1 <= tag <= 8 else 1


def orientation_of(contents: bytes | np.ndarray) -> np.int64:
    """Returns `orientation` of a file's contents, or of an object array [] of them; 1 of what is no image."""
    contents = contents.item() if isinstance(contents, np.ndarray) else contents
    try:
        with Image.open(io.BytesIO(contents)) as image:
            return np.int64(orientation(image))
    except Exception:  # whoever decodes it finds out
        return np.int64(1)


def turn(image: np.ndarray, tag: int) -> np.ndarray:
    """Returns [H, W, C] turned upright from how a file with this orientation has it, as PIL.ImageOps.exif_transpose does."""
    if tag >= 5:  # the first row of the file is the left or right side
        image = image.swapaxes(0, 1)
    rows = slice(None, None, -1 if tag in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if tag in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])


def reason(error: Exception) -> str:
    """Says why Pillow could not read an image."""
    if isinstance(error, TOO_LARGE):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it is larger than the {most:.0f} million pixels that can be read; cut it into smaller images"
    return "its contents are no image" if isinstance(error, UnidentifiedImageError) else str(error)


def sizes(paths: Sequence[epath.PathLike]) -> list[Size]:
    """Returns the height and width of each image, upright, from its header; 0, 0 where that does not tell."""
    with ThreadPoolExecutor(16) as pool:  # a header is a small read that is waited for
        return list(pool.map(_size, paths))


def _size(path: epath.PathLike) -> Size:
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            width, height = image.size
            turned = orientation(image) >= 5 and image.format != "TIFF"  # of which Pillow tells the upright size
            return (width, height) if turned else (height, width)
    except Exception:  # whatever a decoder raises: whoever reads the image will say it
        return 0, 0


def _tail(file: IO[bytes]) -> bytes:
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    end = file.tell() if end is None else end  # TensorFlow's files do not return it
    file.seek(max(position, end - TAIL))
    tail = file.read()
    file.seek(position)
    return tail
