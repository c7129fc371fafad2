"""Convolutions as matrix products, for CPUs: XLA computes these, and above all their gradients, faster than convolutions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array, jax.Array], jax.Array]
WINOGRAD = 2**13  # product of the channels from which `winograd` is faster than a direct convolution, see benchmarks/model.md
CHANNELS = 128  # input channels whose tiles `winograd` holds at a time


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel, [..., C] and [C, O] -> [..., O]; with all pixels along one axis, gradients need no transposition."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def winograd(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
    """3x3 convolution with stride 1 and padding that keeps the size: [N, H, W, C], [3, 3, C, O] -> [N, H, W, O].

    This is Winograd's F(2x2, 3x3) (Lavin and Gray 2016). Each 2x2 block of the output needs a 4x4 tile of the input. Tiles and
    kernels are transformed by additions, multiplied elementwise, summed over the channels as 16 matrix products, and
    transformed back: 16 multiplications instead of 36, and as many for each gradient. All of it is float32, in which these
    products are faster than direct convolutions in bfloat16. A dilated convolution is a plain one on each of the dilation^2
    grids of every d-th pixel.
    """
    n, height, width, _ = x.shape
    d, grid = dilation, 2 * dilation  # each grid needs an even number of rows and columns
    y = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -height % grid), (0, -width % grid), (0, 0)))
    rows, columns = y.shape[1] // d, y.shape[2] // d
    y = y.reshape(n, rows, d, columns, d, -1).transpose(2, 4, 0, 1, 3, 5).reshape(d * d * n, rows, columns, -1)
    y = _convolve_dense(y, kernel.astype(jnp.float32)).reshape(d, d, n, rows, columns, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(n, rows * d, columns * d, -1)[:, :height, :width].astype(x.dtype)


def if_differentiated(use: Function, otherwise: Function) -> Function:
    """Returns a function that computes the first function where it is differentiated, and the second elsewhere."""
    function = jax.custom_vjp(otherwise)
    function.defvjp(lambda *inputs: (use(*inputs), inputs), lambda inputs, gradient: jax.vjp(use, *inputs)[1](gradient))
    return function


@jax.custom_vjp
def _convolve_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Adds up the convolutions of a few channels at a time, because the tiles are four times as large as x."""

    def add(y: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return y + _by_tiles(*part, 1, 2), None

    return jax.lax.scan(add, jnp.zeros((*x.shape[:3], kernel.shape[3])), _parts(x, kernel))[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _convolve_dense(x, kernel), (x, kernel)


def _backward(inputs: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Transforms x again, along the axes in the other order: XLA would merge computations that are the same, and keep tiles."""

    def of_part(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, kernel: _by_tiles(x, kernel.swapaxes(0, 1), 2, 1), *part)[1](gradient)

    return jax.linear_transpose(_parts, *inputs)(jax.lax.map(of_part, _parts(*inputs)))


_convolve_dense.defvjp(_forward, _backward)


def _parts(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits the input channels: [N, H, W, C], [3, 3, C, O] -> [P, N, H, W, C / P], [P, 3, 3, C / P, O]."""
    parts = x.shape[3] // CHANNELS if x.shape[3] % CHANNELS == 0 else 1
    x = x.reshape(*x.shape[:3], parts, -1)
    return jnp.moveaxis(x, 3, 0), jnp.moveaxis(kernel.reshape(3, 3, parts, -1, kernel.shape[3]), 2, 0)


def _by_tiles(x: jax.Array, kernel: jax.Array, first: int, second: int) -> jax.Array:
    """Transforms along axis `first` of x and the first one of the kernel, then along `second` and the second one."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernels = [_split_kernel(row) for row in _split_kernel(kernel)]
    tiles = [_split(part, second) for part in _split(x, first)]
    products = [[matmul(tiles[a][b], kernels[a][b]) for b in range(4)] for a in range(4)]
    return _join([_join(row, second) for row in products], first)


def _split_kernel(kernel: jax.Array) -> list[jax.Array]:
    """Transforms the 3 taps along a kernel's first axis to 4."""
    a, b, c = kernel
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _split(x: jax.Array, axis: int) -> list[jax.Array]:
    """Transforms overlapping tiles of 4 pixels along an axis: the 4 values of all tiles, one array each."""
    pairs = x.shape[axis] // 2 - 1
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + 2 * pairs - 1, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, b - d]


def _join(products: list[jax.Array], axis: int) -> jax.Array:
    """Transforms 4 products to 2 pixels along an axis."""
    a, b, c, d = products
    y = jnp.stack([a + b + c, b - c - d], axis + 1)
    return y.reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])
