"""Where published evaluations differ: the sizes, the resizing, the padding, the mirror images, and what is averaged.

semseg: hszhao/semseg, tool/test.py, by the authors in PyTorch. caffe: hszhao/PSPNet, evaluation/*.m, by the authors in MATLAB
and Caffe. mmseg: mmsegmentation 1.2.2 (EncoderDecoder, SegTTAModel) on mmcv 2.1.0.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.infer import resample as taps
from pspnet_jax.infer.resample import Taps


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to score a network.

    A view is the image at one scale; with `mirror_views` its mirror image at that scale is another one, whose windows start at
    its own left. Otherwise each window goes through the network a second time, mirrored.

    Attributes:
      scaled_size: height, width, config.eval, scale -> height, width.
      window: crop, scaled side -> the window's side; where that is larger than the scaled image, the image is padded.
      pad_before: pixels missing to the window -> how many of them go on top (left).
      padding: mean color f64[3], whether the scaled image exceeds the window on some axis -> the padding's color, f64[3].
      inward: pixels out, pixels in -> taps that scale the image.
      draw: image uint8[h, w, 3], taps of rows and of columns, whether the rows are to be resized first -> f32[H, W, 3].
      mirror_views: see above.
      merge: a window's logits [..., W, K] and, if it was mirrored, those of its mirror image -> what is averaged over windows.
      outward: pixels out, pixels in, config.model.align_corners -> taps that take that average back to the image.
      settle: a pixel's resized averages f32[..., K] -> what is averaged over views, with the most probable class the largest.
    """

    scaled_size: Callable[[int, int, ConfigDict, float], tuple[int, int]]
    window: Callable[[int, int], int]
    pad_before: Callable[[int], int]
    padding: Callable[[np.ndarray, bool], np.ndarray]
    inward: Callable[[int, int], Taps]
    draw: Callable[[jax.Array, Taps, Taps, jax.Array], jax.Array]
    mirror_views: bool
    merge: Callable[..., jax.Array]
    outward: Callable[[int, int, bool], Taps]
    settle: Callable[[jax.Array], jax.Array]


def semseg_size(height: int, width: int, settings: ConfigDict, scale: float) -> tuple[int, int]:
    """The long side is base_size * scale; halves are rounded to even, as Python does."""
    long = max(height, width)
    scaled = max(1, round(scale * (settings.base_size or long)))
    height, width = (max(1, round(scaled / long * side)) for side in (height, width))
    return height, width


def caffe_size(height: int, width: int, settings: ConfigDict, scale: float) -> tuple[int, int]:
    """The long side is base_size * scale + 1, which imresize rounds up; the short side is computed in single precision."""
    long = max(height, width)
    scaled = (settings.base_size or long) * scale + 1
    short = np.float32(scaled) / np.float32(long) * np.float32(min(height, width))
    sides = math.ceil(scaled), max(1, math.floor(float(short) + 0.5))
    return sides if height > width else sides[::-1]


def mmseg_size(height: int, width: int, settings: ConfigDict, scale: float) -> tuple[int, int]:
    """As large as fits within base_size and short_size, times the scale; without a base_size, within the image times the scale.

    Bounds that are given are cut to whole pixels, as in versions before 1.0; since then, test-time augmentation knows only
    multiples of the image's own sides, which are rounded.
    """
    long, short = max(height, width), min(height, width)
    own = math.inf if settings.base_size else int(short * scale + 0.5)
    bounds = (
        int(settings.base_size * scale) if settings.base_size else int(long * scale + 0.5),
        int(settings.short_size * scale) if settings.short_size else own,
    )
    factor = min(bounds[0] / long, bounds[1] / short)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def mean_of_softmaxes(*logits: jax.Array) -> jax.Array:
    """Returns the mean of the softmaxes of [..., W, K] and, if given, of its mirror image's, turned back: float32."""
    first, *mirrored = (jax.nn.softmax(x.astype(jnp.float32)) for x in logits)
    return (first + mirrored[0][..., ::-1, :]) / 2 if mirrored else first


def softmax_of_sum(*logits: jax.Array) -> jax.Array:
    """Returns the softmax of [..., W, K] plus, if given, its mirror image's, turned back: float32."""
    first, *mirrored = (x.astype(jnp.float32) for x in logits)
    return jax.nn.softmax(first + mirrored[0][..., ::-1, :] if mirrored else first)


def renormalized(probabilities: jax.Array) -> jax.Array:
    """Makes each pixel's K sum up to 1; what is 0 (no pixel of an image) stays 0."""
    return probabilities / jnp.maximum(probabilities.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


PROTOCOLS = {
    "semseg": Protocol(
        scaled_size=semseg_size,
        window=lambda crop, scaled: crop,
        pad_before=lambda missing: missing // 2,
        padding=lambda mean, larger: mean,
        inward=taps.bilinear,
        draw=taps.exactly,
        mirror_views=False,
        merge=mean_of_softmaxes,
        outward=lambda size, source, align_corners: taps.bilinear(size, source),
        settle=lambda probabilities: probabilities,
    ),
    "caffe": Protocol(
        scaled_size=caffe_size,
        window=lambda crop, scaled: crop,
        pad_before=lambda missing: 0,
        padding=lambda mean, larger: np.floor(mean + 0.5) if larger else mean,  # a larger image is padded before it is float
        inward=taps.bilinear_antialiased,
        draw=taps.in_gray_levels,
        mirror_views=False,
        merge=softmax_of_sum,
        outward=lambda size, source, align_corners: taps.bilinear_antialiased(size, source),
        settle=renormalized,
    ),
    "mmseg": Protocol(
        scaled_size=mmseg_size,
        window=min,
        pad_before=lambda missing: 0,  # nothing is missing: the windows of a small image are as large as it is
        padding=lambda mean, larger: mean,
        inward=taps.bilinear_fixed_point,
        draw=taps.in_fixed_point,
        mirror_views=True,
        merge=lambda logits: logits.astype(jnp.float32),
        outward=lambda size, source, align_corners: (taps.bilinear_corners if align_corners else taps.bilinear)(size, source),
        settle=jax.nn.softmax,
    ),
}
