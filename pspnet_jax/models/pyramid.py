"""The pyramid pooling module, and the convolution that reads it, plain and factored (Zhao et al. 2017, section 3.2)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.models import layers
from pspnet_jax.models.layers import ConvNorm, convolve, resize, resize_matrix

POOLS = {"average": layers.adaptive_average_pool, "max": layers.adaptive_max_pool}


class Pyramid(nn.Module):
    """Pools features to b x b for each bin b: [N, h, w, C] -> one [N, b, b, C/len(bins)] per bin (C without reduction).

    Each level is a 1x1 convolution with batch normalization and ReLU over the pooled features.

    Attributes:
      bins, pool, reduce_channels: as in `config.model`, which says what each means.
      frozen_norm: as in `ConvNorm`; with a 1x1 bin, training on a single image needs it.
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

    Computed in the dtype of x.

    Attributes:
      factored: compute the same function as a sum of one convolution per input, without building the concatenation,
        which is the widest tensor of the network.
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
        own, *parts = jnp.split(kernel, np.cumsum([i.shape[-1] for i in inputs])[:-1], axis=2)
        y = convolve(x, own).astype(jnp.float32)
        for level, part in zip(levels, parts, strict=True):
            y += convolve_upsampled(level, part, height, width, self.align_corners)
        return y.astype(x.dtype)


def convolve_upsampled(level: jax.Array, kernel: jax.Array, height: int, width: int, align_corners: bool) -> jax.Array:
    """convolve(resize(level, height, width), kernel) without the resized tensor: [N, b, b, I], [k, k, I, O] -> f32[N, h, w, O].

    Both steps are linear, so the b x b grid is contracted with each tap of the kernel first, then expanded by the rows
    of the resize matrices, shifted by the tap and zero outside.
    """
    size = kernel.shape[0]
    taps = jnp.einsum("nijc,uvco->nuvijo", level, kernel, preferred_element_type=jnp.float32)
    rows = _shifted(resize_matrix(level.shape[1], height, align_corners), size)
    columns = _shifted(resize_matrix(level.shape[2], width, align_corners), size)
    exact = jax.lax.Precision.HIGHEST
    taps = jnp.einsum("vxj,nuvijo->nuixo", columns, taps, precision=exact)
    return jnp.einsum("uyi,nuixo->nyxo", rows, taps, precision=exact)


def _shifted(matrix: np.ndarray, taps: int) -> np.ndarray:
    """[size, b] -> [taps, size, b]: row y of slice t is the matrix's row y + t - taps // 2, or zero outside."""
    padded = np.pad(matrix, ((taps // 2, taps // 2), (0, 0)))
    return np.stack([padded[t : t + len(matrix)] for t in range(taps)])
