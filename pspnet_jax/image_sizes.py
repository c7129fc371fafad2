"""Sizes of image files from their headers, so that a job can go through them by size."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath
from PIL import ExifTags, Image

Size = tuple[int, int]  # height, width
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the two
THREADS = 16  # a header is a small read that is waited for


def sizes(paths: Sequence[epath.PathLike]) -> list[Size]:
    """Returns the height and width of each image, upright; 0, 0 where the file's header does not tell."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_size, paths))


def _size(path: epath.PathLike) -> Size:
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    except Exception:  # whatever a decoder raises: whoever reads the image will say it
        return 0, 0
    return (width, height) if turned else (height, width)
