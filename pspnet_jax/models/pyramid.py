"""The pyramid pooling module and the convolution over its output, plain and factored (Zhao et al. 2017, section 3.2)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.models import layers
from pspnet_jax.models.layers import ConvNorm, Matrix, convolve, resize, resize_matrix

POOLS = {"average": layers.adaptive_average_pool, "max": layers.adaptive_max_pool}


class Pyramid(nn.Module):
    """Pools features to b x b for each bin b: [N, h, w, C] -> one [N, b, b, C/len(bins)] per bin (C without reduction).

    Each level applies a 1x1 convolution, batch normalization and ReLU to the pooled features.

    Attributes:
      bins, pool, reduce_channels: as in `config.model`, where each is explained.
      frozen_norm: as in `ConvNorm`; needed to train on a single image with a 1x1 bin.
    """

    bins: Sequence[int] = (1, 2, 3, 6)
    pool: str = "average"
    reduce_channels: bool = True
    frozen_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        pool, levels = layers.choose(POOLS, "pool", self.pool), []
        channels = x.shape[-1] // len(self.bins) if self.reduce_channels and self.bins else x.shape[-1]
        for i, bins in enumerate(self.bins):
            level = ConvNorm(channels, 1, frozen_norm=self.frozen_norm, name=f"level{i}")
            levels.append(level(pool(x, bins).astype(x.dtype), train))
        return levels


class PyramidConv(nn.Module):
    """Convolution over concat[x, up(level 0), up(level 1), ...], with symmetric padding and no bias -> [N, h, w, features].

    Computed in the dtype of x. If `factored`, the same function is computed as a sum of one convolution per input, which avoids
    the concatenation, the network's widest tensor.
    """

    features: int
    kernel_size: int
    align_corners: bool
    factored: bool

    @nn.compact
    def __call__(self, x: jax.Array, levels: Sequence[jax.Array]) -> jax.Array:
        height, width = x.shape[1:3]
        inputs = [x, *levels]
        shape = (self.kernel_size, self.kernel_size, sum(i.shape[-1] for i in inputs), self.features)
        kernel = self.param("kernel", layers.he_normal_fan_out, shape).astype(x.dtype)
        if not self.factored:
            upsampled = [resize(level, height, width, self.align_corners).astype(x.dtype) for level in levels]
            return convolve(jnp.concatenate([x, *upsampled], axis=-1), kernel)
        x_kernel, *level_kernels = jnp.split(kernel, np.cumsum([i.shape[-1] for i in inputs])[:-1], axis=2)
        y = convolve(x, x_kernel).astype(jnp.float32)
        for level, level_kernel in zip(levels, level_kernels, strict=True):
            y += convolve_upsampled(level, level_kernel, height, width, self.align_corners)
        return y.astype(x.dtype)


def convolve_upsampled(level: jax.Array, kernel: jax.Array, height: int, width: int, align_corners: bool) -> jax.Array:
    """convolve(resize(level, height, width), kernel) without the resized tensor: [N, b, b, I], [k, k, I, O] -> f32[N, h, w, O].

    Both steps are linear, so their order can change: the level is first multiplied by the kernel's matrix [I, O] at each of
    the k x k positions. Each product is then upsampled by resize matrices that are shifted by that position and zero outside.
    """
    size = kernel.shape[0]
    products = jnp.einsum("nijc,uvco->nuvijo", level, kernel, preferred_element_type=jnp.float32)
    rows = _stack_shifted(resize_matrix(level.shape[1], height, align_corners), size)
    columns = _stack_shifted(resize_matrix(level.shape[2], width, align_corners), size)
    exact = jax.lax.Precision.HIGHEST
    products = jnp.einsum("vxj,nuvijo->nuixo", columns, products, precision=exact)
    return jnp.einsum("uyi,nuixo->nyxo", rows, products, precision=exact)


def _stack_shifted(matrix: Matrix, shifts: int) -> Matrix:
    """[size, b] -> [shifts, size, b]: row y of slice t is the matrix's row y + t - shifts // 2, or zero outside."""
    xp: Any = np if isinstance(matrix, np.ndarray) else jnp
    padded = xp.pad(matrix, ((shifts // 2, shifts // 2), (0, 0)))
    return xp.stack([padded[t : t + matrix.shape[0]] for t in range(shifts)])
