"""Random brightness, contrast, saturation and hue, as in mmsegmentation's PhotoMetricDistortion (from SSD, Liu et al. 2016).

Each change is made with probability 1/2, and its result is clipped to 0..255 and rounded down:
  1. Brightness: a random number is added to all values.
  2. Contrast: all values are multiplied by a random factor. A fair coin decides whether this is done here or last.
  3. Saturation: S of OpenCV's 8-bit HSV is multiplied by a random factor.
  4. Hue: a random whole number is added to H of OpenCV's 8-bit HSV, which counts steps of 2 degrees.
Steps 3 and 4 share one conversion to HSV and back, where mmsegmentation rounds to RGB in between.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from ml_collections import ConfigDict


class ColorParams(NamedTuple):
    """The random choices for one example. The defaults leave an image as it is."""

    brightness: float = 0.0  # gray levels
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0  # steps of 2 degrees
    contrast_last: bool = False


def sample_colors(random: np.random.Generator, augment: ConfigDict) -> ColorParams | None:
    """Samples from the distributions in config.augment; None if they leave all images as they are."""
    brightness, contrast, saturation, hue = augment.brightness, augment.contrast, augment.saturation, augment.hue
    if not (brightness or hue or {*contrast, *saturation} != {1.0}):
        return None
    u = random.random(9).tolist()
    return ColorParams(
        brightness=brightness * (2 * u[1] - 1) if u[0] < 0.5 else 0.0,
        contrast=contrast[0] + (contrast[1] - contrast[0]) * u[3] if u[2] < 0.5 else 1.0,
        saturation=saturation[0] + (saturation[1] - saturation[0]) * u[5] if u[4] < 0.5 else 1.0,
        hue=math.floor(hue * (2 * u[7] - 1)) if u[6] < 0.5 else 0,
        contrast_last=u[8] < 0.5,
    )


def apply_colors(image: np.ndarray, colors: ColorParams) -> None:
    """Changes the colors of uint8[h,w,3], in RGB order, in place."""
    _scale(image, 1.0, colors.brightness)
    if not colors.contrast_last:
        _scale(image, colors.contrast, 0.0)
    changed, values = {}, np.arange(256, dtype=np.float32)  # tables of H and S
    if colors.hue:
        changed[0] = (values + colors.hue) % 180
    if colors.saturation != 1:
        changed[1] = np.minimum(values * colors.saturation, 255)
    if changed:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for channel, table in changed.items():  # faster than one table of three channels
            cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table.astype(np.uint8)), hsv, channel)
        cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)
    if colors.contrast_last:
        _scale(image, colors.contrast, 0.0)


def _scale(image: np.ndarray, factor: float, offset: float) -> None:
    """Replaces each value v by v * factor + offset, clipped and rounded down, except that n + 0.9999 can become n + 1."""
    if (factor, offset) != (1, 0):
        cv2.addWeighted(image, factor, image, 0.0, offset - 0.4999, dst=image)  # rounds to the nearest; faster than a table
