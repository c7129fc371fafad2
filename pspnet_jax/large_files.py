"""TIFFs of any size, read by windows and written by tiles, so that none is in memory as a whole."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import ExifTags

from pspnet_jax import files, image_files
from pspnet_jax.datasets import Color
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import Header, PixelFormat

WHOLE = 2**24  # pixels; training reads windows of TIFFs with more
MAX_PIECE = 2**26  # pixels in a tile or strip, of which a reader decodes one at a time
TILE = 512  # height and width of the tiles that are written
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737, 50844)  # the tags of GeoTIFF, and rational polynomials
Tag = tuple[int, int, int, Any, bool]  # as tifffile takes it


def is_large(path: epath.PathLike, pixels: float | None = None) -> bool:
    """Returns whether a file is a TIFF of more than so many pixels, by default `WHOLE`."""
    if not _is_tiff(path):
        return False
    import tifffile  # takes a third of a second

    try:
        with epath.Path(path).open("rb") as file, tifffile.TiffFile(file) as tiff:
            return tiff.pages.first.imagelength * tiff.pages.first.imagewidth > (WHOLE if pixels is None else pixels)
    except Exception:  # whatever tifffile raises for a damaged file; reported when it is read
        return False


def find_large(paths: Sequence[epath.PathLike]) -> set[int]:
    """Returns the indices of the files that `is_large` finds, in parallel, because it is mostly waiting in a bucket."""
    tiffs = [index for index, path in enumerate(paths) if _is_tiff(path)]
    with ThreadPoolExecutor(16) as pool:
        large = pool.map(is_large, [paths[index] for index in tiffs])
        return {index for index, found in zip(tiffs, large, strict=True) if found}


def _is_tiff(path: epath.PathLike) -> bool:
    return os.fspath(path).lower().endswith((".tif", ".tiff"))


def open_image(path: epath.PathLike, expected: PixelFormat) -> "LargeTiff":
    """Opens an image [H,W,C] of the expected format.

    Raises:
      UserError: see `LargeTiff`; or the file has another format.
    """

    def convert(stored: np.ndarray) -> np.ndarray:
        image_files.require_finite(stored)
        return expected.fit(stored)

    image = LargeTiff(path, convert, (expected.channels,), expected.dtype)
    if problem := image.problem("PALETTE", "MINISWHITE") or expected.problem(image.header.stored):
        raise UserError(f"{path}: {problem}")
    return image


class LargeTiff:
    """The first image of a TIFF, of which `image[rows, columns]` reads a window, in any thread.

    Attributes:
      shape: height, width and possibly channels.
      ndim, dtype: of the pixels.
      header: what the file tells about its pixels.
      georeference: its tags, for `write_labels`.
    """

    def __init__(
        self,
        path: epath.PathLike,
        convert: Callable[[np.ndarray], np.ndarray],
        channels: tuple[int, ...] = (),
        dtype: str = "uint8",
    ):
        """Reads the header.

        Args:
          path: the file.
          convert: makes the pixels [h,w,*channels] of a window from the stored ones, [h,w,c].
          channels: number of channels, or () without that axis.
          dtype: of the converted pixels.

        Raises:
          UserError: the image is not upright, or is stored in pieces that are too large.
        """
        import tifffile

        self._path, self._convert = epath.Path(path), convert
        with self._path.open("rb") as file, tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first
            self._decode: Callable[..., Any] = page.decode
            self._compression, self._tables = page.compression, page.jpegtables
            self._offsets, self._counts, self._missing = page.dataoffsets, page.databytecounts, page.nodata
            tags = [tag for tag in page.tags if tag.code in GEOREFERENCE]
            self.georeference: list[Tag] = [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags]
            if page.tags.valueof(ExifTags.Base.Orientation, default=1) != 1:
                raise UserError(f"{path}: is not upright; turn it, and remove its tag Orientation")
            self._photometric = getattr(page.photometric, "name", "")
            self._planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
        size = (page.imagelength, page.imagewidth)
        self.header = Header("TIFF", size, 1, PixelFormat(page.samplesperpixel, str(page.dtype)))
        self._piece = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, size[0]), size[1])
        if math.prod(self._piece) > MAX_PIECE:
            raise UserError(
                f"{path}: is stored in strips of {self._piece[0]:,} rows, which are too large to read one at a time; store it "
                "in tiles, for example with gdal_translate -co TILED=YES -co COMPRESS=DEFLATE"
            )
        self.shape, self.ndim, self.dtype = (*size, *channels), 2 + len(channels), np.dtype(dtype)

    def problem(self, *kinds: str) -> str | None:
        """Returns a sentence about pixels whose photometric interpretation is one of some kinds, which windows ignore."""
        return f"is a {self._photometric} TIFF; convert it to gray (MINISBLACK) or RGB" if self._photometric in kinds else None

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """Returns the pixels in ranges of rows and columns.

        Raises:
          UserError: the file cannot be read, is damaged, or its pixels cannot be converted.
        """
        try:
            with image_files.needing_codecs(self._compression):
                stored = self._read(window)
            return self._convert(stored)
        except UserError as error:
            raise type(error)(f"{self._path}: {error}") from error
        except Exception as error:  # whatever a decoder raises
            raise UserError(f"{self._path}: cannot be read ({error}); replace it") from error

    def _read(self, window: tuple[slice, slice]) -> np.ndarray:
        """Returns the stored pixels [h,w,c]."""
        (top, bottom, _), (left, right, _) = (part.indices(side) for part, side in zip(window, self.shape[:2], strict=True))
        height, width = self._piece
        down, across = (math.ceil(side / length) for side, length in zip(self.shape[:2], self._piece, strict=True))
        rows, columns = range(top // height, math.ceil(bottom / height)), range(left // width, math.ceil(right / width))
        channels, dtype = self.header.stored
        found = np.full((bottom - top, right - left, channels), self._missing, dtype)
        with self._path.open("rb") as file:
            for plane, row, column in itertools.product(range(self._planes), rows, columns):
                index = (plane * down + row) * across + column
                if not self._counts[index]:
                    continue  # this piece of a sparse file is not stored
                file.seek(self._offsets[index])
                [pixels], *_ = self._decode(file.read(self._counts[index]), index, jpegtables=self._tables)
                y, x = row * height - top, column * width - left
                pixels = pixels[max(-y, 0) : bottom - top - y, max(-x, 0) : right - left - x]
                y, x = max(y, 0), max(x, 0)
                target = found if self._planes == 1 else found[..., plane : plane + 1]
                target[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all pixels."""
        return self[:, :].astype(dtype or self.dtype, copy=False)

    def strips(self) -> Iterator[np.ndarray]:
        """Yields all rows in order, a million pixels or one piece's height at a time."""
        height = self._piece[0] * max(1, 2**20 // (self._piece[0] * self.shape[1]))
        for top in range(0, self.shape[0], height):
            yield self[top : top + height, :]


def strips(array: "np.ndarray | LargeTiff") -> Iterable[np.ndarray]:
    """Returns all rows in order, in one or more arrays."""
    return array.strips() if isinstance(array, LargeTiff) else (array,)


def read_description(path: epath.PathLike) -> str:
    """Returns a TIFF's tag ImageDescription."""
    import tifffile

    with epath.Path(path).open("rb") as file, tifffile.TiffFile(file) as tiff:
        return tiff.pages.first.description


def write_labels(
    path: epath.PathLike,
    bands: Iterable[np.ndarray],
    size: tuple[int, int],
    colors: Sequence[Color],
    description: str,
    georeference: Sequence[Tag],
) -> None:
    """Writes labels as a tiled and compressed BigTIFF, whose values are class indices and whose palette has the colors.

    Args:
      path: the file, which is complete or not there.
      bands: uint8[h,W] with all rows, in order.
      size: height and width.
      colors: of the classes.
      description: its tag ImageDescription.
      georeference: tags of a `LargeTiff` of the same size, which make it a GeoTIFF.
    """
    import tifffile

    palette = np.zeros((3, 256), np.uint16)
    palette[:, : len(colors)] = 257 * np.transpose(colors)
    with files.atomic(path) as temporary, tifffile.TiffWriter(os.fspath(temporary), bigtiff=True) as writer:
        writer.write(
            _tiles(bands),
            shape=size,
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="palette",
            colormap=palette,
            compression="zlib",
            description=description,
            software="pspnet_jax",
            metadata=None,
            extratags=georeference,
        )


def _tiles(bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields tiles from left to right and from top to bottom; those at the end of an axis may be smaller."""
    rows = itertools.chain.from_iterable(bands)
    while chosen := list(itertools.islice(rows, TILE)):
        strip = np.stack(chosen)
        yield from (strip[:, left : left + TILE] for left in range(0, strip.shape[1], TILE))
