"""Random scale, rotation, blur, horizontal flip, colors and crop of an image and its label, in NumPy and OpenCV.

The definition, step by step (as in hszhao/semseg, util/transform.py, but with exact half-pixel centers):
  1. Scale by s: the canvas is round(H*s) x round(W*s), and its pixel x shows the source at (x + 0.5)/s - 0.5. Images are
     interpolated bilinearly without antialiasing, labels by nearest neighbor; edges are replicated.
  2. Rotate the canvas about its center. Outside the source, the image is filled with the mean and the label with IGNORE.
  3. Blur the canvas with the kernel (1, 4, 6, 4, 1)/16 in both directions, reflected at its border.
  4. Flip it horizontally.
  5. Change the colors (see `colors`). As in mmsegmentation, this is after the flip and before padding, which keeps the mean.
  6. Pad a canvas smaller than the crop with the mean and IGNORE on both sides (an odd pixel goes below or right), and crop.
The implementation composes scale, rotation, flip and crop into one affine map and evaluates it only inside the crop. The image
is rounded once, before its colors change. Coordinates are float32, so values before rounding are exact to a few hundredths of a
gray level.

The kernel is the one that semseg's cv2.GaussianBlur(image, (5, 5), 0) uses, for float32 and uint8: for sigma 0, OpenCV has a
fixed table of kernels up to size 7. Its formula (sigma 1.1 at size 5) would give (0.071, 0.244, 0.370, 0.244, 0.071).
"""

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from pspnet_jax.data.colors import ColorParams, apply_colors, sample_colors
from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

if int(cv2.__version__.split(".")[0]) < 5:  # an installed opencv-python 4 can overwrite the required version
    raise UserError(f"OpenCV {cv2.__version__} rounds coordinates too coarsely; run pip install 'opencv-python-headless>=5'")
cv2.setNumThreads(0)  # OpenCV runs in the calling thread, because the pipeline already has a thread for each core
RADIUS = 2  # of the blur kernel, in pixels


class AugmentationParams(NamedTuple):
    """The random choices for one example."""

    scale: float
    degrees: float  # counterclockwise; 0 means no rotation
    blur: bool
    flip: bool
    offset: np.ndarray  # float64[2] in [0, 1): vertical and horizontal position of the crop within the range that fits
    colors: ColorParams | None = None  # None keeps the colors


def sample_augmentation(random: np.random.Generator, augment: ConfigDict) -> AugmentationParams:
    """Samples from the distributions in config.augment; neutral settings give exactly scale 1, 0 degrees and False."""
    u = random.random(7)
    low, high = augment.scale
    return AugmentationParams(
        scale=low + (high - low) * u[0],
        degrees=augment.rotate_degrees * (2 * u[2] - 1) if u[1] < augment.rotate_probability else 0.0,
        blur=bool(u[3] < augment.blur_probability),
        flip=bool(u[4] < augment.flip_probability),
        offset=u[5:],
        colors=sample_colors(random, augment),
    )


def apply_augmentation(
    image: np.ndarray, label: np.ndarray, params: AugmentationParams, crop: tuple[int, int], mean: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the augmented crop of an example. Points and sizes are (vertical, horizontal) throughout this module.

    Args:
      image: [H,W,C] of uint8, uint16 or float32, of any size; or a `LargeTiff`, of which only a window is read.
      label: uint8[H,W], or a `LargeTiff`.
      params: see `sample_augmentation`.
      crop: height and width (h, w) of the result.
      mean: one value per channel, the color of the padding; rounded for integers.

    Returns:
      [h,w,C] of the image's type and uint8[h,w].
    """
    out_image, out_label = _empty((*crop, image.shape[2]), image.dtype), _empty(crop)
    size, fill = np.array(crop), np.array(mean) if image.dtype == np.float32 else np.round(mean)
    canvas = np.maximum(np.round(np.array(label.shape) * params.scale), 1).astype(int)
    start = (params.offset * (np.maximum(canvas - size, 0) + 1)).astype(int) - np.maximum(size - canvas, 0) // 2
    low, high = np.maximum(start, 0), np.minimum(start + size, canvas)  # the part of the canvas that the crop shows
    if (high - low < size).any():
        _fill(out_image, fill)
        out_label[:] = IGNORE
    shown = _slices(low - start, high - start)
    a, b = _canvas_to_source(params, canvas)
    rotated = params.degrees != 0
    _warp_label(label, a, a @ low + b, rotated, out_label[shown])
    if not params.blur:
        _warp_image(image, a, a @ low + b, rotated, fill, out_image[shown])
    else:
        first, last = np.maximum(low - RADIUS, 0), np.minimum(high + RADIUS, canvas)
        region = np.empty((*(last - first), image.shape[2]), np.float32)
        _warp_image(image, a, a @ first + b, rotated, fill, region)
        # The blur reflects at the region's border. Where that is not the canvas's, the affected pixels are cut off below.
        cv2.GaussianBlur(region, (2 * RADIUS + 1, 2 * RADIUS + 1), 0, dst=region)
        blurred = region[_slices(low - first, high - first)]
        if image.dtype == np.uint8:
            cv2.convertScaleAbs(blurred, dst=out_image[shown])  # rounds
        else:
            out_image[shown] = blurred if image.dtype == np.float32 else np.rint(blurred)
    if params.colors:
        apply_colors(out_image[shown], params.colors)
    return out_image, out_label


def _canvas_to_source(params: AugmentationParams, canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the affine map from pixels q of the flipped canvas to source points a q + b: float64[2,2] and float64[2]."""
    angle, center = np.radians(params.degrees), (canvas - 1) / 2
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    a = rotation * (1, -1 if params.flip else 1) / params.scale
    return a, (center + 0.5) / params.scale - 0.5 - a @ center


def _warp_label(label: np.ndarray, a: np.ndarray, b: np.ndarray, rotated: bool, out: np.ndarray) -> None:
    """Writes the label at a p + b to pixel p of uint8[h,w]."""
    if rotated:
        box, b, _ = _source_box(label.shape, a, b, out.shape)
        _warp(label[box], a, b, out, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, IGNORE)
    else:
        places = (np.floor(a[i, i] * np.arange(n) + b[i] + 0.5).astype(int) for i, n in enumerate(out.shape))
        rows, columns = (place.clip(0, side - 1) for place, side in zip(places, label.shape, strict=True))
        source = label[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        out[:] = source.take(rows - rows.min(), 0, mode="clip").take(columns - columns.min(), 1, mode="clip")


def _warp_image(image: np.ndarray, a: np.ndarray, b: np.ndarray, rotated: bool, fill: np.ndarray, out: np.ndarray) -> None:
    """Writes the image at a p + b, or `fill` outside a rotated image, to pixel p of [h,w,C], of its type or float32."""
    box, b, beyond = _source_box(image.shape[:2], a, b, out.shape[:2])
    source = image[box]
    _warp(source.astype(out.dtype, copy=False), a, b, out, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
    if rotated and beyond:
        outside = np.empty(out.shape[:2], np.uint8)  # exactly the pixels where the label is IGNORE
        _warp(np.zeros(source.shape[:2], np.uint8), a, b, outside, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, 1)
        padding = np.empty_like(out, subok=False)
        _fill(padding, fill)
        cv2.copyTo(padding, outside, out)


def _source_box(
    source: tuple[int, ...], a: np.ndarray, b: np.ndarray, size: tuple[int, ...]
) -> tuple[tuple[slice, slice], np.ndarray, bool]:
    """Returns the source region, of at least one pixel, from which an output of this size is interpolated; b relative to the
    region's corner; and whether the output extends beyond the source."""
    reach = a * (np.array(size) - 1)
    low = np.floor(b + np.minimum(reach, 0).sum(axis=1)).astype(int)
    high = np.floor(b + np.maximum(reach, 0).sum(axis=1)).astype(int) + 2
    beyond = (low < 0).any() or (high > source).any()
    low = np.clip(low, 0, np.array(source) - 1)
    return _slices(low, np.clip(high, low + 1, source)), b - low, beyond


def _warp(
    source: np.ndarray, a: np.ndarray, b: np.ndarray, out: np.ndarray, interpolation: int, border: int, value: int = 0
) -> None:
    """Writes the source at q = a p + b to each pixel p of `out`. OpenCV 5 computes q in float32; OpenCV 4 rounds q to 1/32."""
    matrix = np.column_stack([a[::-1, ::-1], b[::-1]])  # OpenCV's points are (horizontal, vertical)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    options = {"flags": flags, "borderMode": border, "borderValue": value}
    warp = functools.partial(cv2.warpAffine, M=matrix, dsize=out.shape[1::-1], **options)
    if source.shape[2:] in ((), (1,), (3,), (4,)):
        warp(source, dst=out)
        return
    whole = source.shape[2] // 4 * 4  # for other numbers of channels, OpenCV 5 rounds q to 1/32, too
    parts = [slice(i, i + 4) for i in range(0, whole, 4)] + [slice(i, i + 1) for i in range(whole, source.shape[2])]
    for part in parts:
        out[..., part] = warp(np.ascontiguousarray(source[..., part])).reshape(*out.shape[:2], -1)


def _empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.uint8) -> np.ndarray:
    """Returns uninitialized memory aligned to 64 bytes, which TensorFlow can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, color: np.ndarray) -> None:
    """Fills [h,w,3] with a color, row by row, which is much faster than NumPy's broadcasting over triples."""
    out.reshape(len(out), -1)[:] = np.tile(color, out.shape[1])


def _slices(low: np.ndarray, high: np.ndarray) -> tuple[slice, slice]:
    return slice(low[0], high[0]), slice(low[1], high[1])
