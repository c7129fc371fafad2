"""Random scale, rotation, blur, mirror and crop of an image and its label, in NumPy and OpenCV.

What it means, step by step (hszhao/semseg, util/transform.py, with the centers of half pixels made exact):
  1. scale by s: the canvas is round(H*s) x round(W*s), and its pixel x shows the source at (x + 0.5)/s - 0.5; images bilinear
     without antialiasing, labels nearest, edges replicated;
  2. rotate what is on the canvas about its center; where the source does not reach, the image is the mean, the label IGNORE;
  3. blur the canvas by (1, 4, 6, 4, 1)/16 down and across, reflected at its border; 4. mirror it;
  5. pad a canvas smaller than the crop on both sides (an odd pixel goes below or right), with mean and IGNORE, and crop.
What it does: scale, rotation, mirror and crop are one affine map, evaluated only where the crop shows the canvas. The image is
rounded once, at the end, from values that are exact to a few hundredths of a gray level: the map's coordinates are float32.

The blur's weights are what cv2.GaussianBlur(image, (5, 5), 0) computes there, in float32 as in uint8: given sigma 0, OpenCV has
a fixed table for up to 7 taps. Its formula for sigma, 1.1 for 5 taps, would give (0.071, 0.244, 0.370, 0.244, 0.071).
"""

from typing import NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE

if int(cv2.__version__.split(".")[0]) < 5:  # opencv-python 4 may lie over the version that was asked for
    raise ImportError(
        f"OpenCV is {cv2.__version__}, whose bilinear maps are coarse; run pip install 'opencv-python-headless>=5'"
    )
cv2.setNumThreads(0)  # a call runs in its caller's thread: the pipeline has one for each core
RADIUS = 2  # pixels that the blur reaches


class Draw(NamedTuple):
    """What chance decides about one example."""

    scale: float
    degrees: float  # counterclockwise; 0: not rotated
    blur: bool
    mirror: bool
    offset: np.ndarray  # float64[2] from 0 to 1: where, of all places it fits, the crop is; vertical, horizontal


def draw(random: np.random.Generator, augment: ConfigDict) -> Draw:
    """Draws from the distributions in config.augment; a neutral value there gives exactly 1, 0 or False."""
    u = random.random(7)
    low, high = augment.scale
    return Draw(
        scale=low + (high - low) * u[0],
        degrees=augment.rotate_degrees * (2 * u[2] - 1) if u[1] < augment.rotate_probability else 0.0,
        blur=bool(u[3] < augment.blur_probability),
        mirror=bool(u[4] < augment.mirror_probability),
        offset=u[5:],
    )


def view(
    image: np.ndarray,
    label: np.ndarray,
    draw: Draw,
    mean: tuple[float, float, float],
    pixels: np.ndarray,
    classes: np.ndarray,
) -> None:
    """Writes a view of an example. Points, sizes and bounds are (vertical, horizontal), here and below.

    Args:
      image: uint8[H,W,3], of any size.
      label: uint8[H,W].
      draw: which view.
      mean: what padding looks like, rounded; config.normalize.mean.
      pixels: uint8[h,w,3] to write to, contiguous; (h, w) is the crop.
      classes: uint8[h,w] to write to.
    """
    crop, fill = np.array(classes.shape), np.round(mean)
    canvas = np.maximum(np.round(np.array(label.shape) * draw.scale), 1).astype(int)
    start = (draw.offset * (np.maximum(canvas - crop, 0) + 1)).astype(int) - np.maximum(crop - canvas, 0) // 2
    low, high = np.maximum(start, 0), np.minimum(start + crop, canvas)  # what the crop shows of the canvas
    if (high - low < crop).any():
        _paint(pixels, fill)
        classes[:] = IGNORE
    shown = _slices(low - start, high - start)
    a, b = _canvas_to_source(draw, canvas)
    turned = draw.degrees != 0
    _show_classes(label, a, a @ low + b, turned, classes[shown])
    if not draw.blur:
        _show_pixels(image, a, a @ low + b, turned, fill, pixels[shown])
        return
    first, last = np.maximum(low - RADIUS, 0), np.minimum(high + RADIUS, canvas)
    region = np.empty((*(last - first), 3), np.float32)
    _show_pixels(image, a, a @ first + b, turned, fill, region)
    # Reflected at the region's border: where that is not the canvas', the two pixels concerned are cut off.
    cv2.GaussianBlur(region, (2 * RADIUS + 1, 2 * RADIUS + 1), 0, dst=region)
    cv2.convertScaleAbs(region[_slices(low - first, high - first)], dst=pixels[shown])  # rounds


def _canvas_to_source(draw: Draw, canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (a, b), float64[2,2] and float64[2]: pixel q of the mirrored canvas shows the source at a q + b."""
    angle, center = np.radians(draw.degrees), (canvas - 1) / 2
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    a = rotation * (1, -1 if draw.mirror else 1) / draw.scale
    return a, (center + 0.5) / draw.scale - 0.5 - a @ center


def _show_classes(label: np.ndarray, a: np.ndarray, b: np.ndarray, turned: bool, classes: np.ndarray) -> None:
    """Writes to uint8[h,w], at its pixel p, the label at a p + b."""
    if turned:
        box, b, _ = _box(label.shape, a, b, classes.shape)
        _warp(label[box], a, b, classes, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, IGNORE)
    else:
        rows, columns = (np.floor(a[i, i] * np.arange(n) + b[i] + 0.5).astype(int) for i, n in enumerate(classes.shape))
        classes[:] = label.take(rows, 0, mode="clip").take(columns, 1, mode="clip")


def _show_pixels(image: np.ndarray, a: np.ndarray, b: np.ndarray, turned: bool, fill: np.ndarray, pixels: np.ndarray) -> None:
    """Writes to [h,w,3], uint8 or float32, at its pixel p, the image at a p + b; where a turned one does not reach, `fill`."""
    box, b, beyond = _box(image.shape[:2], a, b, pixels.shape[:2])
    source = image[box]
    _warp(source.astype(pixels.dtype, copy=False), a, b, pixels, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
    if turned and beyond:
        outside = np.empty(pixels.shape[:2], np.uint8)  # to the pixel where the label is IGNORE
        _warp(np.zeros(source.shape[:2], np.uint8), a, b, outside, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, 1)
        padding = np.empty_like(pixels, subok=False)
        _paint(padding, fill)
        cv2.copyTo(padding, outside, pixels)


def _box(
    source: tuple[int, ...], a: np.ndarray, b: np.ndarray, size: tuple[int, ...]
) -> tuple[tuple[slice, slice], np.ndarray, bool]:
    """Returns the source pixels that `size` pixels p at a p + b are interpolated from, at least one; b from there on; and
    whether they lie beyond the source, too."""
    reach = a * (np.array(size) - 1)
    low = np.floor(b + np.minimum(reach, 0).sum(axis=1)).astype(int)
    high = np.floor(b + np.maximum(reach, 0).sum(axis=1)).astype(int) + 2
    beyond = (low < 0).any() or (high > source).any()
    low = np.clip(low, 0, np.array(source) - 1)
    return _slices(low, np.clip(high, low + 1, source)), b - low, beyond


def _warp(
    source: np.ndarray, a: np.ndarray, b: np.ndarray, pixels: np.ndarray, interpolation: int, border: int, value: int = 0
) -> None:
    """Writes to each pixel p the source at a p + b, a point that OpenCV 5 computes in float32 (4 rounds it to 1/32 pixel)."""
    matrix = np.column_stack([a[::-1, ::-1], b[::-1]])  # OpenCV's points are (horizontal, vertical)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(source, matrix, pixels.shape[1::-1], dst=pixels, flags=flags, borderMode=border, borderValue=value)


def _paint(pixels: np.ndarray, color: np.ndarray) -> None:
    """Sets all of [h,w,3] to a color, row by row: far faster than NumPy's loop over triples."""
    pixels.reshape(len(pixels), -1)[:] = np.tile(color, pixels.shape[1])


def _slices(low: np.ndarray, high: np.ndarray) -> tuple[slice, slice]:
    return slice(low[0], high[0]), slice(low[1], high[1])
