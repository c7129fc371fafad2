"""Random brightness, contrast, saturation and hue, as in mmsegmentation's PhotoMetricDistortion (from SSD, Liu et al. 2016).

Each change is made with probability 1/2, and its result is clipped to 0..255 and rounded down:
  1. Brightness: a random number is added to all values.
  2. Contrast: all values are multiplied by a random factor. A fair coin decides whether this is done here or last.
  3. Saturation: S of OpenCV's 8-bit HSV is multiplied by a random factor.
  4. Hue: a random whole number is added to H of OpenCV's 8-bit HSV, which counts steps of 2 degrees.
All are tables of 256 values: an image is looked up in them, and converted only for the last two.
"""

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
    ranges = (-augment.brightness, augment.brightness), augment.contrast, augment.saturation, (-augment.hue, augment.hue)
    neutral = (0, 1, 1, 0)
    if all(low == high == value for (low, high), value in zip(ranges, neutral, strict=True)):
        return None
    values = np.where(random.random(4) < 0.5, random.uniform(*np.transpose(ranges)), neutral)
    return ColorParams(*values[:3].tolist(), hue=int(np.floor(values[3])), contrast_last=bool(random.random() < 0.5))


def apply_colors(image: np.ndarray, colors: ColorParams) -> None:
    """Changes the colors of uint8[h,w,3], in RGB order, in place."""
    values = np.arange(256, dtype=np.float32)
    brightness, contrast = _to_uint8(values + colors.brightness), _to_uint8(values * colors.contrast)
    _look_up(image, brightness if colors.contrast_last else contrast[brightness])
    if colors.saturation != 1:
        _look_up_hsv(image, values, values * colors.saturation)
    if colors.hue:
        _look_up_hsv(image, (values + colors.hue) % 180, values)
    if colors.contrast_last:
        _look_up(image, contrast)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _look_up(image: np.ndarray, table: np.ndarray) -> None:
    """Replaces each value v of an image by table[v], uint8[256]."""
    if (table != np.arange(256)).any():
        cv2.LUT(image, table, dst=image)


def _look_up_hsv(image: np.ndarray, hue: np.ndarray, saturation: np.ndarray) -> None:
    """Replaces the hue and the saturation of each pixel by their values in two tables, float32[256]."""
    table = _to_uint8(np.stack([hue, saturation, np.arange(256)], axis=-1))
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None])
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)
