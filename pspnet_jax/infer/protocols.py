"""Where published evaluations differ: the sizes, the resampling, the padding, the flip, and what is averaged."""

import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.infer.resample import ResamplingWeights, bilinear, bilinear_antialiased, bilinear_corners, resample


class Protocol:
    """One way to score a network.

    A view is the image at one scale. With `flips_views`, the flipped image at that scale is another view, whose windows start
    at its own left; otherwise each window goes through the network a second time, flipped.
    """

    flips_views = False

    def __init__(self, config: ConfigDict):
        """Keeps what it needs of config.eval, config.normalize and config.model.align_corners."""
        self.settings = config.eval
        self.mean = np.array(config.normalize.mean)
        self.align_corners = config.model.align_corners

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Returns height and width of an image's view at a scale."""
        raise NotImplementedError

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """Resamples uint8[H, W, 3] to uint8 or float32 [height, width, 3], in gray levels."""
        raise NotImplementedError

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        """Returns the window's side, up to which the image is padded, and how much of the padding goes on top (left)."""
        return crop, 0

    def padding(self, exceeds: bool) -> np.ndarray:
        """Returns the padding's color [3]; `exceeds` tells whether the scaled image exceeds the window on some axis."""
        return self.mean

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Returns what is averaged over windows, from a window's logits f32[..., W, K] and, if any, its flipped image's."""
        return logits

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        """Returns the weights by which averages over windows, at `scaled` pixels, are resampled to the image's `size`."""
        return bilinear(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        """Returns what is averaged over views, from a view's scores f32[..., K] at the image's size."""
        return scores


class Semseg(Protocol):
    """hszhao/semseg, tool/test.py, by the authors in PyTorch."""

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """The long side is base_size * scale; halves are rounded to even, as Python does."""
        long = max(height, width)
        scaled = max(1, round(scale * (self.settings.base_size or long)))
        height, width = (max(1, round(scaled / long * side)) for side in (height, width))
        return height, width

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        return cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        return crop, max(0, crop - scaled) // 2

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Mean of the softmaxes."""
        scores = jax.nn.softmax(logits)
        return scores if flipped is None else (scores + jax.nn.softmax(flipped)[..., ::-1, :]) / 2


class Caffe(Protocol):
    """hszhao/PSPNet, evaluation/*.m, by the authors in MATLAB and Caffe."""

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """The long side is base_size * scale + 1, which imresize rounds up; the short side is computed in single precision."""
        long = max(height, width)
        scaled = (self.settings.base_size or long) * scale + 1
        short = np.float32(scaled) / np.float32(long) * np.float32(min(height, width))
        sides = math.ceil(scaled), max(1, math.floor(float(short) + 0.5))
        return sides if height > width else sides[::-1]

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """As imresize does 8-bit images: first the axis that shrinks most (grows least); rounded, half up, after each."""
        tie = 2.0**-15  # gray levels; above float32's error in a sum of weighted ones, so that an exact half is rounded up
        sizes = (height, width)
        for axis in sorted((0, 1), key=lambda axis: sizes[axis] / image.shape[axis]):
            weights = bilinear_antialiased(sizes[axis], image.shape[axis])
            image = np.floor(resample(image, weights, axis) + (0.5 + tie)).astype(np.uint8)
        return image

    def padding(self, exceeds: bool) -> np.ndarray:
        return np.floor(self.mean + 0.5) if exceeds else self.mean  # a larger image is padded before it is float

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Softmax of the sum."""
        return jax.nn.softmax(logits if flipped is None else logits + flipped[..., ::-1, :])

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        return bilinear_antialiased(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        """Makes each pixel's K sum up to 1; what is 0 (no pixel of an image) stays 0."""
        return scores / jnp.maximum(scores.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


class MMSeg(Protocol):
    """mmsegmentation 1.2.2 (EncoderDecoder, SegTTAModel) on mmcv 2.1.0."""

    flips_views = True

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """As large as fits within base_size and short_size, times the scale; without a base_size, the image times the scale.

        Bounds that are given are cut to whole pixels, as in versions before 1.0; since then, test-time augmentation knows only
        multiples of the image's own sides, which are rounded.
        """
        base_size, short_size = self.settings.base_size, self.settings.short_size
        long, short = max(height, width), min(height, width)
        long_bound = int(base_size * scale) if base_size else int(long * scale + 0.5)
        if short_size:
            short_bound: float = int(short_size * scale)
        else:
            short_bound = math.inf if base_size else int(short * scale + 0.5)
        factor = min(long_bound / long, short_bound / short)
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        return min(crop, scaled), 0

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        return (bilinear_corners if self.align_corners else bilinear)(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores)


PROTOCOLS: dict[str, type[Protocol]] = {"semseg": Semseg, "caffe": Caffe, "mmseg": MMSeg}
