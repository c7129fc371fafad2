"""Reading users' images in the same way for training, evaluation and prediction: upright, with the pixels that a config names.

TensorFlow's decoders (see data/reader.py) give the same pixels as Pillow's, but ignore the orientation tag; `turn` applies it.
Pillow reads files with 8 bits per channel. tifffile reads other TIFFs, and OpenCV 16-bit PNGs and JPEG 2000, of which Pillow
drops bits.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from etils import epath
from PIL import ExifTags, Image, UnidentifiedImageError

from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # about files that tifffile reads
Size = tuple[int, int]  # height, width
SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")
DTYPES = ("uint8", "uint16", "float32")  # of pixels, see config.dataset.image_dtype
TAIL = 2**17  # bytes at the end of a PNG that are searched for metadata, which may follow the pixels
CUT_SHORT = "its pixels are damaged or end early"
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
FOURTH_CHANNEL = "has a fourth channel, such as transparency, which is ignored"
SEVERAL_IMAGES = "contains several images, of which only the first is read"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of a file
_warned = set[str]()  # remarks that have been logged
_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # markers of the PNG chunks that can hold an orientation


class PixelFormat(NamedTuple):
    """The kind of pixels that a network takes, or that a file holds."""

    channels: int = 3  # config.model.channels
    dtype: str = "uint8"  # config.dataset.image_dtype

    def problem(self, stored: "PixelFormat") -> str | None:
        """Returns why a file cannot be read as this format, or None.

        For 3 channels, gray is repeated, and a fourth channel is ignored; for 1 channel, a second one (alpha) is ignored.
        """
        if stored.dtype != self.dtype:
            choice = f", or train with dataset.image_dtype={stored.dtype!r}" if stored.dtype in DTYPES else ""
            return f"has {stored.dtype} pixels, but dataset.image_dtype={self.dtype!r}; convert it{choice}"
        if stored.channels in {1: (1, 2), 3: (1, 2, 3, 4)}.get(self.channels, (self.channels,)):
            return None
        found = f"{stored.channels} channel{'s' * (stored.channels > 1)}"
        return f"has {found}, but model.channels={self.channels}; convert it, or train with model.channels={stored.channels}"

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Returns [H,W,C] of an image [H,W] or [H,W,c] that has no `problem`."""
        image = image.reshape(*image.shape[:2], -1)
        return image[..., [0, 0, 0]] if self.channels == 3 and image.shape[2] < 3 else image[..., : self.channels]


RGB8 = PixelFormat()


class Header(NamedTuple):
    """What an image file tells about its pixels."""

    kind: str  # Pillow's name of the file format, such as "JPEG"
    size: Size  # as stored
    orientation: int  # see `orientation`
    stored: PixelFormat
    for_tifffile: bool = False  # whether it is a TIFF whose channels are not colors, or of which pieces are not stored

    @property
    def upright_size(self) -> Size:
        return self.size[::-1] if self.orientation >= 5 else self.size


def read(path: epath.PathLike, expected: PixelFormat = RGB8) -> np.ndarray:
    """Returns the pixels of an image file, [H,W,C] of the expected format, turned upright by its orientation tag.

    Raises:
      UserError: the file is not an image, is damaged or too large, or has a `PixelFormat.problem`.
    """
    try:
        return decode(epath.Path(path).read_bytes(), path, expected)
    except Exception as error:  # whatever a decoder raises for a damaged file
        raise UserError(f"{path}: cannot be read as an image ({reason(error)})") from error


def decode(contents: bytes, name: object, expected: PixelFormat = RGB8) -> np.ndarray:
    """Does the same as `read` for the contents of the file `name`, but lets exceptions of decoders pass."""
    header = read_header(io.BytesIO(contents))
    if problem := expected.problem(header.stored):
        raise UserError(problem)
    if header.kind == "TIFF" and (header.for_tifffile or expected.dtype != "uint8" or expected.channels not in (1, 3)):
        image = decode_tiff(contents, header, name)
    elif expected.dtype == "uint16":
        image = _decode_with_opencv(contents)
    else:
        if header.kind == "PNG" and not is_whole_png(contents):
            raise ValueError(CUT_SHORT)
        with Image.open(io.BytesIO(contents)) as opened:
            return pixels(opened, name, expected)
    require_finite(image)
    if expected.channels == 3 and header.stored.channels == 4:
        _warn_once(FOURTH_CHANNEL, name)
    return turn(expected.fit(image), header.orientation)


def require_finite(image: np.ndarray) -> None:
    """Raises UserError if a pixel is NaN or infinite."""
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise UserError("has pixels that are not finite (NaN); replace them, for example with 0")


def read_header(file: IO[bytes]) -> Header:
    """Returns the header of an image file.

    Raises:
      UserError: its pixels are of a kind that no config can name.
    """
    first = file.read(4)
    file.seek(0)
    if first in TIFF:
        return _tiff_header(file)
    with Image.open(file) as image:
        return Header(str(image.format), image.size[::-1], orientation(image), _stored(image))


def count_frames(path: epath.PathLike) -> int:
    """Returns the number of images in a file, of which only the first is used; 1 if Pillow cannot read it."""
    with contextlib.suppress(Exception), epath.Path(path).open("rb") as file, Image.open(file) as image:
        return _count_frames(image)
    return 1


def _count_frames(image: Image.Image) -> int:
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's JPEG followed by previews


def _tiff_header(file: IO[bytes]) -> Header:
    import tifffile  # takes a third of a second

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if page.photometric == tifffile.PHOTOMETRIC.SEPARATED:
            raise UserError("is a CMYK image; convert it to RGB")
        if page.imagelength * page.imagewidth > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
            raise Image.DecompressionBombError
        is_palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE
        has_bands = page.samplesperpixel > (1 if page.photometric == tifffile.PHOTOMETRIC.MINISBLACK else 4)
        is_sparse = 0 in page.databytecounts and not is_palette
        stored = PixelFormat(3 if is_palette else page.samplesperpixel, str(page.dtype).replace("bool", "uint8"))
        size, tag = (page.imagelength, page.imagewidth), page.tags.valueof(ExifTags.Base.Orientation, default=1)
        return Header("TIFF", size, tag if 1 <= tag <= 8 else 1, stored, has_bands or is_sparse)


def _stored(image: Image.Image) -> PixelFormat:
    """Returns the pixel format of an image that is loaded or only opened."""
    if image.mode == "CMYK":
        raise UserError("is a CMYK image; convert it to RGB")
    channels = {"P": 3, "PA": 4}.get(image.mode, len(image.getbands()))
    channels += image.has_transparency_data and channels in (1, 3)
    is_deep = image.mode.startswith("I;16") or (image.format == "PNG" and ";16" in raw_mode(image))
    if image.format == "JPEG2000" and (file := getattr(image, "fp", None)):
        position = file.tell()
        file.seek(0)
        _, _, parameters = file.read(TAIL).partition(b"\xff\x4f\xff\x51")  # the start of the code stream
        file.seek(position)
        is_deep = parameters[38:39] > b"\x07"  # bits of the first channel, minus 1
    return PixelFormat(channels, "uint16" if is_deep else {"I": "int32", "F": "float32"}.get(image.mode, "uint8"))


def decode_tiff(contents: bytes, header: Header, name: object) -> np.ndarray:
    """Returns the first image of a TIFF as stored, [H,W] or [H,W,C]."""
    import tifffile  # takes a third of a second

    with tifffile.TiffFile(io.BytesIO(contents)) as tiff:
        page = tiff.pages.first
        if len(tiff.pages) > 1:
            _warn_once(SEVERAL_IMAGES, name)
        scaled = page.dtype == np.uint8 and tifffile.EXTRASAMPLE.UNASSALPHA in page.extrasamples  # by alpha, in OpenCV
        if page.compression == tifffile.COMPRESSION.LZW and not (header.for_tifffile or scaled) and header.orientation == 1:
            image = _decode_with_opencv(contents)  # in a third of the time, and without the optional package imagecodecs
            if image.shape == page.shape and image.dtype == page.dtype:
                return image
        with needing_codecs(page.compression):
            return np.moveaxis(page.asarray(), 0, -1) if page.axes == "SYX" else page.asarray()


@contextlib.contextmanager
def needing_codecs(compression: Any) -> Iterator[None]:
    """Raises a UserError, instead of one of tifffile's, where a TIFF's compression needs the optional package imagecodecs."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or "imagecodecs" in str(error):
            kind = getattr(compression, "name", compression)
            raise UserError(f'is compressed by {kind}, which needs one more package: pip install "pspnet_jax[tiff]"') from error
        raise


def _decode_with_opencv(contents: bytes) -> np.ndarray:
    """Returns an image as stored, [H,W] or [H,W,C] in the order RGB."""
    image = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError(CUT_SHORT)
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]


def pixels(image: Image.Image, name: object, expected: PixelFormat = RGB8) -> np.ndarray:
    """Returns a Pillow image as `read` does.

    Args:
      image: loaded or only opened.
      name: where it is from, for a remark that is logged about what is ignored.
      expected: the format of the result.

    Raises:
      UserError: it has a `PixelFormat.problem`.
    """
    if problem := expected.problem(_stored(image)):
        raise UserError(problem)
    if expected.dtype == "uint16" and not image.mode.startswith("I;16"):
        raise UserError("loses 8 of its 16 bits in Pillow; pass the path of the file, or uint16[H, W, C]")
    if _count_frames(image) > 1:
        _warn_once(SEVERAL_IMAGES, name)
    if expected.channels == 3 and image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        _warn_once(f"{FOURTH_CHANNEL}; transparent pixels keep their RGB values", name)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[expected.channels] if expected.dtype == "uint8" else image.mode
    stored = np.asarray(image.convert(mode)).astype(expected.dtype, copy=False)  # 16 bits may be big-endian
    return turn(expected.fit(stored), orientation(image))  # Pillow has turned a TIFF while loading it


def _warn_once(remark: str, name: object) -> None:
    if remark not in _warned:
        _warned.add(remark)
        logger.warning(f"{name}: {remark} (logged only for the first such image)")


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


def orientation_of(contents: bytes) -> np.int64:
    """Returns the `orientation` of a file's contents; 1 if it is not an image."""
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
    """Returns why an image could not be read."""
    if isinstance(error, UserError):
        return f"it {error}"
    if isinstance(error, TOO_LARGE):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it is larger than the limit of {limit:.0f} million pixels; cut it into smaller images, or use a tiled TIFF"
    return "its contents are not an image" if isinstance(error, UnidentifiedImageError) else str(error)


def sizes(paths: Sequence[epath.PathLike]) -> list[Size]:
    """Returns the height and width of each upright image from its header; (0, 0) if they cannot be read."""
    with ThreadPoolExecutor(16) as pool:  # reading a header is mostly waiting
        return list(pool.map(_size, paths))


def _size(path: epath.PathLike) -> Size:
    try:
        with epath.Path(path).open("rb") as file:
            return read_header(file).upright_size
    except Exception:  # whatever a decoder raises; reported when the image is read
        return 0, 0


def _read_tail(file: IO[bytes]) -> bytes:
    position = file.tell()
    file.seek(0, io.SEEK_END)  # TensorFlow's files do not return the position
    file.seek(max(position, file.tell() - TAIL))
    tail = file.read()
    file.seek(position)
    return tail
