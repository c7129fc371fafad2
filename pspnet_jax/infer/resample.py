"""Resizing as numbers: which pixels each new pixel is a weighted sum of, for rows and for columns.

As data, not as code: images of many sizes share one compiled program.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIXED_POINT = 2048  # weight 1 in the integer arithmetic of cv2's resize
TIE = 2.0**-15  # gray levels; above float32's error in a sum of weighted ones, so that an exact half is rounded up


class Taps(NamedTuple):
    """Output i is the sum over t of weight[i, t] * input[pixel[i, t]]."""

    pixel: np.ndarray | jax.Array  # int32[..., n, T]
    weight: np.ndarray | jax.Array  # float32[..., n, T]


def bilinear(size: int, source: int) -> Taps:
    """Resizes `source` pixels to `size`: half-pixel centers, no antialiasing, edges repeated (cv2's INTER_LINEAR)."""
    return _between(_centers(size, source), source)


def bilinear_corners(size: int, source: int) -> Taps:
    """Resizes with the centers of the outermost pixels on each other (align_corners=True)."""
    return _between(np.arange(size) * ((source - 1) / max(size - 1, 1)), source)


def bilinear_fixed_point(size: int, source: int) -> Taps:
    """As `bilinear`, with cv2's weights for 8-bit images: whole multiples of 1/2048 (here of 1), from float32 positions."""
    pixel, weight = _between(_centers(size, source).astype(np.float32), source)
    return Taps(pixel, np.rint(weight * FIXED_POINT))


def bilinear_antialiased(size: int, source: int) -> Taps:
    """MATLAB's imresize(..., 'bilinear'): a triangle, as wide as a new pixel where that is larger; the image is mirrored
    at its edges."""
    slope = min(size / source, 1)
    centers = _centers(size, source)[:, None]
    pixel = np.floor(centers - 1 / slope) + 1 + np.arange(np.ceil(2 / slope))
    weight = np.maximum(0, 1 - slope * np.abs(centers - pixel))
    pixel = pixel % (2 * source)
    pixel = np.where(pixel < source, pixel, 2 * source - 1 - pixel)
    return Taps(pixel.astype(np.int32), (weight / weight.sum(1, keepdims=True)).astype(np.float32))


def _centers(size: int, source: int) -> np.ndarray:
    return (np.arange(size) + 0.5) * (source / size) - 0.5


def _between(position: np.ndarray, source: int) -> Taps:
    low = np.floor(position)
    pixel = np.clip(np.stack([low, low + 1], -1), 0, source - 1)
    return Taps(pixel.astype(np.int32), np.stack([low + 1 - position, position - low], -1).astype(np.float32))


def along(image: jax.Array, taps: Taps, axis: int) -> jax.Array:
    """Resizes [h, w, C] along axis 0 or 1; the result has the weights' type."""
    # gathers: products with dense matrices took 7 to 20 times longer on a CPU
    return functools.reduce(operator.add, _terms(image, taps, axis))


def _terms(image: jax.Array, taps: Taps, axis: int) -> list[jax.Array]:
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)
    each = zip(jnp.moveaxis(taps.pixel, -1, 0), jnp.moveaxis(taps.weight, -1, 0), strict=True)
    return [jnp.take(image, pixel, axis, mode="clip").astype(weight.dtype) * weight.reshape(shape) for pixel, weight in each]


def exactly(image: jax.Array, rows: Taps, columns: Taps, rows_first: jax.Array) -> jax.Array:
    """Resizes uint8[h, w, C] to f32[H, W, C], in floating point."""
    return along(along(image, rows, 0), columns, 1)


def in_gray_levels(image: jax.Array, rows: Taps, columns: Taps, rows_first: jax.Array) -> jax.Array:
    """As imresize does 8-bit images: rounded, half up, after each axis."""

    def gray(x: jax.Array, taps: Taps, axis: int) -> jax.Array:
        return jnp.floor(along(x, taps, axis) + (0.5 + TIE))

    return jnp.where(rows_first, gray(gray(image, rows, 0), columns, 1), gray(gray(image, columns, 1), rows, 0))


def in_fixed_point(image: jax.Array, rows: Taps, columns: Taps, rows_first: jax.Array) -> jax.Array:
    """As cv2 does 8-bit images: columns first; 4, then 16 bits cut off, the last 2 rounded. For `bilinear_fixed_point`."""
    rows, columns = (Taps(taps.pixel, taps.weight.astype(jnp.int32)) for taps in (rows, columns))
    terms = _terms(along(image, columns, 1) >> 4, rows, 0)
    return ((functools.reduce(operator.add, [term >> 16 for term in terms]) + 2) >> 2).astype(jnp.float32)
