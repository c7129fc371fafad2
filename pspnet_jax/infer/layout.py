"""Where the windows of an image lie, and the taps between the image and its canvas, at each scale.

A canvas is a scaled image and its padding, from which windows are cut, and on which the network's answers are added up.
Everything about it is separable into rows and columns.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.infer.protocols import PROTOCOLS, Protocol
from pspnet_jax.infer.resample import Taps


class Axis(NamedTuple):
    """Rows, or columns, of one image in one view."""

    source: int  # pixels of the image
    scaled: int
    canvas: int  # the scaled image, or the window where that is larger
    before: int  # pixels of padding before the scaled image
    window: int
    starts: list[int]  # of the windows on the canvas


class View(NamedTuple):
    rows: Axis
    columns: Axis
    mirrored: bool  # canvas and windows are those of the mirror image


def window_starts(size: int, window: int, stride: int = 0) -> list[int]:
    """Returns each window's first pixel, for `size` >= window pixels: `stride` apart, the last flush with the end.

    Stride 0 is two thirds of the window, rounded up, as the authors have it.
    """
    stride = stride or -(-2 * window // 3)
    return [min(start, size - window) for start in range(0, size - window + stride, stride)]


def lay_out(height: int, width: int, settings: ConfigDict) -> list[View]:
    """Finds the views of an image and their windows; `settings` is config.eval."""
    protocol = PROTOCOLS[settings.protocol]
    mirrors = (False, True) if settings.flip and protocol.mirror_views else (False,)
    views = []
    for scale in settings.scales:
        scaled = protocol.scaled_size(height, width, settings, scale)
        crop = scaled if settings.inference == "whole" else settings.crop
        sides = zip((height, width), scaled, crop, settings.stride, strict=True)
        rows, columns = (_axis(*side, protocol) for side in sides)
        views += [View(rows, columns, mirrored) for mirrored in mirrors]
    return views


def _axis(source: int, scaled: int, crop: int, stride: int, protocol: Protocol) -> Axis:
    window = protocol.window(crop, scaled)
    canvas = max(scaled, window)
    return Axis(source, scaled, canvas, protocol.pad_before(canvas - scaled), window, window_starts(canvas, window, stride))


def inward_taps(axis: Axis, mirrored: bool, protocol: Protocol) -> Taps:
    """Image -> canvas; the padding has weight 0."""
    taps = protocol.inward(axis.scaled, axis.source)
    padding = ((axis.before, axis.canvas - axis.scaled - axis.before), (0, 0))
    return Taps(*(np.pad(x[::-1] if mirrored else x, padding) for x in taps))


def outward_taps(axis: Axis, mirrored: bool, protocol: Protocol, align_corners: bool) -> Taps:
    """Sums over windows on the canvas -> means over windows on the image."""
    pixel, weight = protocol.outward(axis.source, axis.scaled, align_corners)
    pixel = axis.before + (axis.scaled - 1 - pixel if mirrored else pixel)
    times_seen = np.zeros(axis.canvas, np.float32)
    for start in axis.starts:
        times_seen[start : start + axis.window] += 1
    return Taps(pixel, weight / times_seen[pixel])
