"""Prediction of images that are too large for the memory: block by block, with the windows of the whole image.

A block consists of whole windows. It is predicted like an image of its own, which has its windows at the same places, and
provides the labels of those pixels that no other window covers. The windows between two blocks belong to both.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image

from pspnet_jax import files
from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw
from pspnet_jax.infer.plan import Axis, ceil_div
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.large_files import LargeTiff, is_large, open_image, write_labels
from pspnet_jax.progress import progress

MAX_BLOCK = 2**31  # bytes of a block: K sums of scores, and twice its channels, as each pixel is float32
MAX_OVERLAY = 2048  # pixels of the long side


def needs_blocks(path: epath.PathLike) -> bool:
    """Returns whether a file is a TIFF with more pixels than an image that is read as a whole may have."""
    return is_large(path, 2 * (Image.MAX_IMAGE_PIXELS or math.inf))


def result_paths(output: epath.Path, name: str) -> list[epath.Path]:
    return [output / "index" / f"{name}.tif", output / "overlay" / f"{name}.jpg"]


def predict(segmenter: Segmenter, path: epath.PathLike, results: Sequence[epath.Path], signature: str) -> None:
    """Predicts a large TIFF, and writes its labels with `write_labels` and a reduced overlay.

    Args:
      segmenter: predicts the blocks.
      path: the image.
      results: see `result_paths`.
      signature: the description of the labels' file.

    Raises:
      UserError: the image cannot be read by windows, or config.eval scales it.
    """
    if any(map(files.is_remote, results)):
        raise UserError(f"{results[0]}: the labels of a large image are only written locally; choose a local --output")
    image = open_image(path, segmenter.predictor.pixel_format)
    height, width = image.shape[:2]
    _require_original_size(segmenter, f"{path}: {width}x{height} pixels")
    step = ceil_div(max(height, width), MAX_OVERLAY)
    small = ceil_div(height, step), ceil_div(width, step)
    reduced = np.zeros((*small, image.shape[2]), image.dtype), np.zeros(small, np.uint8)
    with progress(f"predicting {results[0].stem}", height * width / 1e6, "megapixels") as advance:
        bands = _bands(segmenter, image, reduced, step, advance)
        write_labels(results[0], bands, (height, width), segmenter.info.colors, signature, image.georeference)
    overlay = draw.overlay(*reduced, segmenter.info.colors)
    draw.save(Image.fromarray(overlay), results[1], "JPEG", quality=95, subsampling=0)


def _bands(
    segmenter: Segmenter, image: LargeTiff, reduced: Sequence[np.ndarray], step: int, advance: Callable[[float], None]
) -> Iterator[np.ndarray]:
    """Yields the labels uint8[h,W] of all rows; copies every step-th row and column of the pixels and labels to `reduced`."""
    [view] = segmenter.predictor.views(*image.shape[:2])
    longest = math.isqrt(MAX_BLOCK // (4 * (len(segmenter.classes) + 2 * image.shape[2])))
    for rows, read_rows in split(view.rows, longest):
        band = np.empty((rows.stop - rows.start, image.shape[1]), np.uint8)
        blocks = (
            {"name": f"columns {columns.start}...", "image": image[read_rows, read_columns], "place": (columns, read_columns)}
            for columns, read_columns in split(view.columns, longest)
        )
        for result in segmenter.results(blocks):
            columns, read_columns = result.example["place"]
            inner = _shift(rows, -read_rows.start), _shift(columns, -read_columns.start)
            band[:, columns] = result.labels[inner]
            top, left = ceil_div(rows.start, step), ceil_div(columns.start, step)
            for target, pixels in zip(reduced, (result.image[inner], result.labels[inner]), strict=True):
                chosen = pixels[-rows.start % step :: step, -columns.start % step :: step]
                target[top : top + chosen.shape[0], left : left + chosen.shape[1]] = chosen
            advance(band[:, columns].size / 1e6)
        yield band


def split(axis: Axis, longest: int) -> Iterator[tuple[slice, slice]]:
    """Yields for each block the pixels that it provides and those of its windows, at most `longest` or two windows."""
    longest, starts, first = max(longest, 2 * axis.window), np.array(axis.starts), 0
    while first < axis.source:
        begin = starts[np.searchsorted(starts, first - axis.window, "right")]
        last = starts[starts <= begin + longest - axis.window][-1]
        end = min(last + axis.window, axis.source)
        following = starts[starts > last]
        stop = following[0] if len(following) else end
        yield slice(first, stop), slice(begin, end)
        first = stop


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _require_original_size(segmenter: Segmenter, what: str) -> None:
    settings = segmenter.predictor.settings
    wanted: dict[str, object] = {"inference": "windows", "scales": (1.0,), "base_size": 0, "short_size": 0}
    if settings.protocol != "semseg":
        wanted |= {"protocol": "semseg"} if settings.protocol == "caffe" else {"flip": False}
    wrong = {field: value for field, value in wanted.items() if settings[field] != value}
    if wrong:
        flags = " ".join(f"--config.eval.{field}={value}" for field, value in wrong.items())
        raise UserError(f"{what} are predicted in blocks of the original size; set {flags.replace('(1.0,)', '1.0')}")
