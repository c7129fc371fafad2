"""The pieces every part of the network is made of. All tensors are [N, H, W, C]; all sizes are static."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolution with symmetric padding, so that stride s takes H to ceil(H / s); the kernel is HWIO, of odd size.

    A 1x1 convolution is written as a matrix product: XLA runs the gradients of the product several times faster on CPUs.
    """
    size = kernel.shape[0]
    if size == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    pad = dilation * (size - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Conv(nn.Module):
    """`convolve` with a float32 kernel of its own, computed in dtype."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal_fan_out, shape)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.dilation)


class BatchNorm(nn.Module):
    """Batch normalization, eps 1e-5, running averages with momentum 0.9; statistics in float32.

    Under jit with a batch sharded over a mesh the mean below is the mean over all devices: synchronized by construction.
    Running variances are the biased ones (torch stores n/(n-1) times as much). A variance is the mean of squares minus the
    square of the mean, in one pass over the values: it loses digits where a mean is far larger than its deviation.

    Attributes:
      frozen: normalize with the running statistics in training too, and leave them as they are.

    Raises:
      ValueError: in training, when each channel has a single value, whose variance is 0.
    """

    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch_statistics = train and not self.frozen
        if batch_statistics and x.size == x.shape[-1] and not self.is_initializing():
            raise ValueError(
                f"BatchNorm at {'/'.join(self.path)} sees one value per channel, whose variance is 0: "
                "train on 2 or more images, with frozen statistics, or without the 1x1 pyramid bin"
            )
        norm = nn.BatchNorm(not batch_statistics, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="bn")
        nn.share_scope(self, norm)
        return norm(x)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization and, unless told otherwise, ReLU."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    relu: bool = True
    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.features, self.kernel_size, self.stride, self.dilation, self.dtype, name="conv")(x)
        x = BatchNorm(self.frozen, self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2 and padding 1: [N, H, W, C] -> [N, ceil(H/2), ceil(W/2), C].

    The maximum of shifted slices, along the rows, then the columns: on CPUs five times faster than XLA's windowed
    maximum, whose gradient searches every window. Where values tie, the gradient is shared among them.
    """
    height, width = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    x = functools.reduce(jnp.maximum, (x[:, i : i + 2 * height - 1 : 2] for i in range(3)))
    return functools.reduce(jnp.maximum, (x[:, :, i : i + 2 * width - 1 : 2] for i in range(3)))


def resize_matrix(size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """Bilinear interpolation along one axis as a matrix, f32[new_size, size]; each row holds at most two weights, of sum 1.

    With align_corners the first and last samples coincide (Caffe's Interp, semseg); without, pixel centers lie at
    half-integers and the borders are replicated (mmseg). Neither smooths when it shrinks.
    """
    target = np.arange(new_size, dtype=np.float64)
    if align_corners:
        source = target * ((size - 1) / (new_size - 1)) if new_size > 1 else np.zeros(1)
    else:
        source = (target + 0.5) * (size / new_size) - 0.5
    source = np.clip(source, 0, size - 1)
    low = np.minimum(source.astype(int), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1 - (source - low))
    np.add.at(matrix, (np.arange(new_size), high), source - low)
    return matrix.astype(np.float32)


def along_height_and_width(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Applies one matrix along each axis, in float32: [N, H, W, C], [H', H], [W', W] -> f32[N, H', W', C]."""
    exact = jax.lax.Precision.HIGHEST  # TPUs and GPUs would round the weights to bfloat16 or TF32
    x = jnp.einsum("yh,nhwc->nywc", rows, x.astype(jnp.float32), precision=exact)
    return jnp.einsum("xw,nywc->nyxc", columns, x, precision=exact)


def resize(x: jax.Array, height: int, width: int, align_corners: bool) -> jax.Array:
    """Bilinear resize without antialiasing: [N, h, w, C] -> f32[N, height, width, C]."""
    rows = resize_matrix(x.shape[1], height, align_corners)
    return along_height_and_width(x, rows, resize_matrix(x.shape[2], width, align_corners))


def pool_cells(size: int, bins: int) -> list[tuple[int, int]]:
    """Adaptive pooling's cells along one axis: cell i covers floor(i * size / bins) up to ceil((i + 1) * size / bins)."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def _average_matrix(size: int, bins: int) -> np.ndarray:
    matrix = np.zeros((bins, size), np.float32)
    for i, (start, stop) in enumerate(pool_cells(size, bins)):
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """[N, H, W, C] -> f32[N, bins, bins, C], the mean of each cell."""
    return along_height_and_width(x, _average_matrix(x.shape[1], bins), _average_matrix(x.shape[2], bins))


def adaptive_max_pool(x: jax.Array, bins: int) -> jax.Array:
    """[N, H, W, C] -> [N, bins, bins, C], the maximum of each cell."""
    rows, columns = pool_cells(x.shape[1], bins), pool_cells(x.shape[2], bins)
    cells = [[x[:, top:bottom, left:right].max((1, 2)) for left, right in columns] for top, bottom in rows]
    return jnp.stack([jnp.stack(row, 1) for row in cells], 1)
