"""Published evaluation protocols, which differ in sizes, resampling, padding, flipping and averaging."""

import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.infer.resample import ResamplingWeights, bilinear, bilinear_antialiased, bilinear_corners, resample


class Protocol:
    """One way to evaluate a network.

    A view is the image at one scale. With `flips_views`, the flipped image is another view, whose windows are laid out from its
    own left edge. Otherwise, each window goes through the network a second time, flipped.
    """

    flips_views = False

    def __init__(self, config: ConfigDict):
        """Uses config.eval, config.normalize and config.model.align_corners."""
        self.settings = config.eval
        self.mean = np.array(config.normalize.mean)
        self.align_corners = config.model.align_corners
        self.passes = 2 if self.settings.flip and not self.flips_views else 1  # of each window through the network

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Returns the height and width of an image's view at a scale."""
        raise NotImplementedError

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """Resamples [H, W, C] to [height, width, C] of the same type or float32."""
        raise NotImplementedError

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        """Returns, for one axis, the window's size, to which smaller images are padded, and the padding before the image."""
        return crop, 0

    def padding(self, exceeds: bool) -> np.ndarray:
        """Returns the padding color [C]; `exceeds` is whether the scaled image exceeds the window on some axis."""
        return self.mean

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Returns the scores to average over windows, from the logits f32[..., W, K] of a window and of the flipped window."""
        return logits

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        """Returns the weights that resample averages over windows from `scaled` pixels to the image's `size`."""
        return bilinear(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        """Returns the scores to average over views, from a view's scores f32[..., K] at the image's size."""
        return scores


class Semseg(Protocol):
    """The authors' evaluation in PyTorch: hszhao/semseg, tool/test.py."""

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Makes the long side base_size * scale; rounds halves to even, as Python does."""
        long = max(height, width)
        scaled = max(1, round(scale * (self.settings.base_size or long)))
        height, width = (max(1, round(scaled / long * side)) for side in (height, width))
        return height, width

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        scaled = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        return scaled.reshape(height, width, -1)  # OpenCV drops the axis of a single channel

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        return crop, max(0, crop - scaled) // 2

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Averages the softmaxes."""
        scores = jax.nn.softmax(logits)
        return scores if flipped is None else (scores + jax.nn.softmax(flipped)[..., ::-1, :]) / 2


class Caffe(Protocol):
    """The authors' evaluation in MATLAB and Caffe: hszhao/PSPNet, evaluation/*.m."""

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Makes the long side base_size * scale + 1, which imresize rounds up; the short side is computed in float32."""
        long = max(height, width)
        scaled = (self.settings.base_size or long) * scale + 1
        short = np.float32(scaled) / np.float32(long) * np.float32(min(height, width))
        sides = math.ceil(scaled), max(1, math.floor(float(short) + 0.5))
        return sides if height > width else sides[::-1]

    def scale(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """Resizes as imresize does: first the axis that shrinks most; rounds integers half up after each axis."""
        tie = 2.0**-15  # more than the float32 error of a weighted sum, so that an exact half is rounded up
        sizes = (height, width)
        for axis in sorted((0, 1), key=lambda axis: sizes[axis] / image.shape[axis]):
            weights = bilinear_antialiased(sizes[axis], image.shape[axis])
            exact = resample(image, weights, axis)
            image = exact if image.dtype == np.float32 else np.floor(exact + (0.5 + tie)).astype(image.dtype)
        return image

    def padding(self, exceeds: bool) -> np.ndarray:
        return np.floor(self.mean + 0.5) if exceeds else self.mean  # larger images are padded while still 8-bit

    def combine_flip(self, logits: jax.Array, flipped: jax.Array | None = None) -> jax.Array:
        """Returns the softmax of the summed logits."""
        return jax.nn.softmax(logits if flipped is None else logits + flipped[..., ::-1, :])

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        return bilinear_antialiased(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        """Normalizes each pixel's K scores to sum to 1; pixels outside the image stay 0."""
        return scores / jnp.maximum(scores.sum(-1, keepdims=True), np.finfo(np.float32).tiny)


class MMSeg(Protocol):
    """mmsegmentation 1.2.2 (EncoderDecoder, SegTTAModel) on mmcv 2.1.0."""

    flips_views = True

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Fits the image within base_size and short_size, both times the scale; without base_size, scales the image's sides.

        Bounds set in the config are truncated to whole pixels, as in mmsegmentation before 1.0. In test-time augmentation,
        later versions scale only the image's sides, and round the result.
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
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1)

    def window(self, crop: int, scaled: int) -> tuple[int, int]:
        return min(crop, scaled), 0

    def weights_to_image(self, size: int, scaled: int) -> ResamplingWeights:
        return (bilinear_corners if self.align_corners else bilinear)(size, scaled)

    def finalize_scores(self, scores: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores)


PROTOCOLS: dict[str, type[Protocol]] = {"semseg": Semseg, "caffe": Caffe, "mmseg": MMSeg}
