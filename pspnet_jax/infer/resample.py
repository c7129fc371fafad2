"""Bilinear resampling along one axis, as indices and weights of the source pixels that make up each new pixel.

Indices and weights are passed as data, so that images of many sizes share one compiled program.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import numpy as np

Array = np.ndarray | jax.Array


class ResamplingWeights(NamedTuple):
    """New pixel i is the sum over t of weight[i, t] * pixels[indices[i, t]]."""

    indices: Array  # int32[..., n, T]
    weight: Array  # float32[..., n, T]


def bilinear(size: int, source: int) -> ResamplingWeights:
    """Weights from `source` to `size` pixels: half-pixel centers, no antialiasing, edges replicated (cv2's INTER_LINEAR)."""
    return _interpolate(_centers(size, source), source)


def bilinear_corners(size: int, source: int) -> ResamplingWeights:
    """Weights that align the centers of the outermost pixels (align_corners=True)."""
    return _interpolate(np.arange(size) * ((source - 1) / max(size - 1, 1)), source)


def bilinear_antialiased(size: int, source: int) -> ResamplingWeights:
    """Weights of MATLAB's imresize(..., 'bilinear'): a triangle filter, wider for downsampling; edges are reflected."""
    slope = min(size / source, 1)
    centers = _centers(size, source)[:, None]
    indices = np.floor(centers - 1 / slope) + 1 + np.arange(np.ceil(2 / slope))
    weight = np.maximum(0, 1 - slope * np.abs(centers - indices))
    indices = indices % (2 * source)
    indices = np.where(indices < source, indices, 2 * source - 1 - indices)
    return ResamplingWeights(indices.astype(np.int32), (weight / weight.sum(1, keepdims=True)).astype(np.float32))


def resample(image: Any, weights: ResamplingWeights, axis: int) -> Any:
    """Resamples a NumPy or JAX array [h, w, C] along axis 0 or 1; returns the same kind of array in float32."""
    # Gathers, because products with dense matrices took 7 to 20 times longer on a CPU.
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)
    terms = (
        image.take(weights.indices[:, t], axis, mode="clip").astype(np.float32) * weights.weight[:, t].reshape(shape)
        for t in range(weights.indices.shape[1])
    )
    return functools.reduce(operator.add, terms)


def _centers(size: int, source: int) -> np.ndarray:
    return (np.arange(size) + 0.5) * (source / size) - 0.5


def _interpolate(position: np.ndarray, source: int) -> ResamplingWeights:
    low = np.floor(position)
    indices = np.clip(np.stack([low, low + 1], -1), 0, source - 1)
    weight = np.stack([low + 1 - position, position - low], -1)
    return ResamplingWeights(indices.astype(np.int32), weight.astype(np.float32))
