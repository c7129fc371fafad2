"""Random scale, rotation, blur, mirror and crop of an image and its label, in TensorFlow graph code.

What it means, step by step (hszhao/semseg, util/transform.py, with the centers of half pixels made exact):
  1. scale by s: the canvas is round(H*s) x round(W*s), and its pixel x shows the source at (x + 0.5)/s - 0.5; images bilinear
     without antialiasing, labels nearest, edges replicated;
  2. rotate what is on the canvas about its center; where the source does not reach, the image is the mean, the label IGNORE;
  3. blur the canvas, reflected at its border; 4. mirror it;
  5. pad a canvas smaller than the crop on both sides (an odd pixel goes below or right), with mean and IGNORE, and crop.
What it does: scale, rotation and crop are one affine map, evaluated only where the crop shows the canvas. The image is rounded
once, at the end.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE

RADIUS = 2  # pixels that the blur reaches
# Sigma 1.1 is cv2's formula for 5 taps: 0.3 * (RADIUS - 1) + 0.8. Given sigma 0, cv2 itself takes (1, 4, 6, 4, 1) / 16 instead.
_GAUSSIAN = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / 1.1) ** 2)
BLUR = (np.outer(_GAUSSIAN, _GAUSSIAN) / _GAUSSIAN.sum() ** 2).astype(np.float32)


class Draw(NamedTuple):
    """What chance decides about one example: scalar tensors, float64 and bool."""

    scale: tf.Tensor
    degrees: tf.Tensor  # counterclockwise; 0: not rotated
    blur: tf.Tensor
    mirror: tf.Tensor
    offset: tf.Tensor  # float64[2] from 0 to 1: where, of all places it fits, the crop is; vertical, horizontal


def augment(image: tf.Tensor, label: tf.Tensor, key: tf.Tensor, config: ConfigDict) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a random view of an example, the same for the same key.

    Args:
      image: uint8[H,W,3], of any size.
      label: uint8[H,W].
      key: int32[2] or int64[2], the seed of everything random here.
      config: the whole config; config.augment says what is drawn, config.normalize.mean what padding looks like.

    Returns:
      uint8[h,w,3] and uint8[h,w], where (h, w) is config.augment.crop.
    """
    return view(image, label, draw(key, config.augment), config.augment.crop, config.normalize.mean)


def draw(key: tf.Tensor, augment: ConfigDict) -> Draw:
    """Draws from the distributions in config.augment; a neutral value there gives exactly 1, 0 or False."""
    u = tf.random.stateless_uniform([7], key, dtype=tf.float64, alg="philox")
    low, high = augment.scale
    return Draw(
        scale=low + (high - low) * u[0],
        degrees=tf.where(u[1] < augment.rotate_probability, augment.rotate_degrees * (2 * u[2] - 1), 0),
        blur=u[3] < augment.blur_probability,
        mirror=u[4] < augment.mirror_probability,
        offset=u[5:],
    )


def view(
    image: tf.Tensor, label: tf.Tensor, draw: Draw, crop: tuple[int, int], mean: tuple[float, float, float]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns uint8[h,w,3] and uint8[h,w] for crop = (h, w). Points are (vertical, horizontal), here and below."""
    fill = np.round(mean).astype(np.float32)
    size = tf.cast(tf.shape(label), tf.float64)
    # Half a pixel rounds down, with 1e-3 to spare: the last pixel's center must not lie beyond the source, not even in float32.
    canvas = tf.maximum(tf.cast(tf.round(size * draw.scale - 1e-3), tf.int32), 1)
    room = tf.maximum(canvas - crop, 0)
    before = tf.maximum(crop - canvas, 0) // 2
    start = tf.cast(draw.offset * tf.cast(room + 1, tf.float64), tf.int32) - before
    # The mirror comes last: here the crop is where it lies on the canvas that is not mirrored yet.
    start = tf.where(tf.stack([False, draw.mirror]), canvas - start - crop, start)

    low, high = tf.maximum(start, 0), tf.minimum(start + crop, canvas)  # what the crop shows of the canvas
    blur = draw.blur & tf.reduce_all(canvas > RADIUS)  # less cannot be reflected, and stays as it is
    margin = tf.where(blur, RADIUS, 0)
    first, last = tf.maximum(low - margin, 0), tf.minimum(high + margin, canvas)
    matrix, origin = _canvas_to_source(draw, canvas, first)
    pixels, classes = tf.cond(
        draw.degrees != 0,
        lambda: _rotate(image, label, matrix, origin, last - first, fill),
        lambda: _scale(image, label, matrix, origin, last - first),
    )
    reflected = tf.stack([first - low + margin, high + margin - last], axis=1)
    pixels = tf.cond(blur, lambda: _blur(pixels, reflected), lambda: pixels)
    classes = tf.slice(classes, low - first, high - low)

    padding = tf.stack([low - start, start + crop - high], axis=1)
    pixels = tf.cond(
        tf.reduce_any(padding > 0), lambda: tf.pad(pixels - fill, tf.pad(padding, [[0, 1], [0, 0]])) + fill, lambda: pixels
    )
    pixels = tf.cast(tf.round(pixels), tf.uint8)
    classes = tf.pad(classes, padding, constant_values=np.uint8(IGNORE))
    pixels, classes = tf.cond(
        draw.mirror, lambda: (tf.reverse(pixels, [1]), tf.reverse(classes, [1])), lambda: (pixels, classes)
    )
    return tf.ensure_shape(pixels, (*crop, 3)), tf.ensure_shape(classes, crop)


def _canvas_to_source(draw: Draw, canvas: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (A, b), float64[2,2] and float64[2]: the canvas' pixel first + p shows the source at A p + b."""
    angle = draw.degrees * (np.pi / 180)
    rotation = tf.reshape(tf.stack([tf.cos(angle), tf.sin(angle), -tf.sin(angle), tf.cos(angle)]), [2, 2])
    center = tf.cast(canvas - 1, tf.float64) / 2
    turned = tf.linalg.matvec(rotation, tf.cast(first, tf.float64) - center) + center
    return rotation / draw.scale, (turned + 0.5) / draw.scale - 0.5


def _scale(
    image: tf.Tensor, label: tf.Tensor, matrix: tf.Tensor, origin: tf.Tensor, size: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns float32[h,w,3] and uint8[h,w] of a diagonal `matrix`: separable, and so twice as fast as `_rotate`."""
    step = tf.linalg.diag_part(matrix)
    low, high = _box(tf.shape(label), matrix, origin, size)
    # The kernel's pixel x shows (x + 0.5 - translation)/scale - 0.5.
    pixels = tf.raw_ops.ScaleAndTranslate(
        images=image[None, low[0] : high[0], low[1] : high[1]],
        size=size,
        scale=tf.cast(1 / step, tf.float32),
        translation=tf.cast(0.5 - (origin - tf.cast(low, tf.float64) + 0.5) / step, tf.float32),
        kernel_type="triangle",
        antialias=False,
    )[0]
    classes = label
    for axis in (0, 1):
        index = tf.floor(origin[axis] + step[axis] * tf.cast(tf.range(size[axis]), tf.float64) + 0.5)
        classes = tf.gather(classes, tf.clip_by_value(tf.cast(index, tf.int32), 0, tf.shape(label)[axis] - 1), axis=axis)
    return pixels, classes


def _rotate(
    image: tf.Tensor, label: tf.Tensor, matrix: tf.Tensor, origin: tf.Tensor, size: tf.Tensor, fill: np.ndarray
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns float32[h,w,3] and uint8[h,w] of any `matrix`; outside the source they are `fill` and IGNORE."""
    low, high = _box(tf.shape(label), matrix, origin, size)
    offset = origin - tf.cast(low, tf.float64)
    terms = [matrix[1, 1], matrix[1, 0], offset[1], matrix[0, 1], matrix[0, 0], offset[0], 0.0, 0.0]

    def warp(source: tf.Tensor, interpolation: str, fill_mode: str) -> tf.Tensor:
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=source[None],
            transforms=tf.cast(tf.stack([terms]), tf.float32),
            output_shape=size,
            fill_value=-1.0,
            interpolation=interpolation,
            fill_mode=fill_mode,
        )[0]

    # In float32, because the kernel truncates uint8; edges replicated, because its constant mode blends the fill into them.
    pixels = warp(tf.cast(image[low[0] : high[0], low[1] : high[1]], tf.float32), "BILINEAR", "NEAREST")
    classes = warp(tf.cast(label[low[0] : high[0], low[1] : high[1], None], tf.int32), "NEAREST", "CONSTANT")[..., 0]
    outside = tf.where(classes < 0)
    pixels = tf.tensor_scatter_nd_update(pixels, outside, tf.broadcast_to(fill, [tf.shape(outside)[0], 3]))
    return pixels, tf.cast(tf.where(classes < 0, IGNORE, classes), tf.uint8)


def _box(source: tf.Tensor, matrix: tf.Tensor, origin: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns int32[2] bounds [low, high) of the source pixels that `size` pixels are interpolated from; at least one pixel."""
    reach = matrix * tf.cast(size - 1, tf.float64)
    low = tf.floor(origin + tf.reduce_sum(tf.minimum(reach, 0), axis=1))
    high = tf.floor(origin + tf.reduce_sum(tf.maximum(reach, 0), axis=1)) + 2
    low = tf.clip_by_value(tf.cast(low, tf.int32), 0, source - 1)
    return low, tf.clip_by_value(tf.cast(high, tf.int32), low + 1, source)


def _blur(pixels: tf.Tensor, reflected: tf.Tensor) -> tf.Tensor:
    """Blurs float32[h,w,3] and takes RADIUS pixels off each side, after int32[2,2] pixels were added by reflection."""
    padded = tf.pad(pixels, tf.pad(reflected, [[0, 1], [0, 0]]), "REFLECT")
    kernel = np.repeat(BLUR[:, :, None, None], 3, axis=2)
    return tf.nn.depthwise_conv2d(padded[None], kernel, strides=[1, 1, 1, 1], padding="VALID")[0]
