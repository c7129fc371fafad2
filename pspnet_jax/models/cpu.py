"""Convolutions as matrix products, for CPUs: XLA computes these, and above all their gradients, faster than convolutions."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array, jax.Array], jax.Array]
Tiles = list[list[jax.Array]]  # 4 x 4 arrays, one value of each tile
WINOGRAD = 2**27  # pixels per image x input x output channels from which `winograd` is used, except for 64 x 64 channels
CHANNELS = 128  # input channels whose tiles `winograd` holds at a time


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel, [..., C] and [C, O] -> [..., O]; with all pixels along one axis, gradients need no transposition."""
    product = _bfloat16_product if x.dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11) else jnp.matmul
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _bfloat16_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b. Before JAX 0.11, bfloat16 products with a float32 result are faster, but their gradients are not."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


_bfloat16_product.defvjp(
    lambda a, b: (_bfloat16_product(a, b), (a, b)), lambda inputs, gradient: jax.vjp(jnp.matmul, *inputs)[1](gradient)
)


def if_differentiated(use: Function, otherwise: Function) -> Function:
    """Returns a function that computes the first function where it is differentiated, and the second elsewhere."""
    function = jax.custom_vjp(otherwise)
    function.defvjp(lambda *inputs: (use(*inputs), inputs), lambda inputs, gradient: jax.vjp(use, *inputs)[1](gradient))
    return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
    """3x3 convolution with stride 1 and padding that keeps the size: [N, H, W, C], [3, 3, C, O] -> [N, H, W, O].

    This is Winograd's F(2x2, 3x3) (Lavin and Gray 2016). Each 2x2 block of the output needs a 4x4 tile of the input. Tiles and
    kernels are transformed by additions, multiplied elementwise, summed over the channels as 16 matrix products, and
    transformed back: 16 multiplications instead of 36, and as many for each gradient. All of it is float32, in which these
    products are faster than direct convolutions in bfloat16. Tiles are four times as large as x, so the convolutions of a few
    channels at a time are added up.
    """
    y = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[3]), x.dtype)
    split = functools.partial(_grids, dilation=dilation)

    def add(grids: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        x_part, kernel_part = _part(x, kernel, i)
        return grids + _join_both(_multiply(split(x_part), kernel_part, 1, 2), 1, 2), None

    grids, _ = jax.lax.scan(add, jnp.zeros(jax.eval_shape(split, y).shape), _parts(x))
    return jax.linear_transpose(split, y)(grids)[0]


def _backward(dilation: int, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and of the kernel, part by part.

    x is transformed again, along the axes in the other order: XLA would merge computations that are the same, and keep tiles.
    """

    def multiply(x: jax.Array, kernel: jax.Array) -> Tiles:
        return _multiply(_grids(x, dilation), kernel.swapaxes(0, 1), 2, 1)

    products = jax.eval_shape(multiply, *_part(*inputs, 0))
    of_products = jax.linear_transpose(functools.partial(_join_both, first=2, second=1), products)(_grids(gradient, dilation))

    def replace(values: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradients = jax.vjp(multiply, *_part(*inputs, i))[1](*of_products)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * gradients[0].shape[3])
        return (update(values[0], gradients[0], axis=3), update(values[1], gradients[1], axis=2)), None

    # Any values will do, but XLA would create zeros for all convolutions at once, before there are gradients.
    initial = jnp.full_like(inputs[0], gradient[0, 0, 0, 0]), jnp.full_like(inputs[1], gradient[0, 0, 0, 0])
    return jax.lax.scan(replace, initial, _parts(inputs[0]))[0]


winograd.defvjp(lambda x, kernel, dilation: (winograd(x, kernel, dilation), (x, kernel)), _backward)


def _parts(x: jax.Array) -> jax.Array:
    """Returns the numbers of the parts of the channels."""
    return jnp.arange(x.shape[3] // CHANNELS if x.shape[3] % CHANNELS == 0 else 1)


def _part(x: jax.Array, kernel: jax.Array, i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns part i of the input channels: [N, H, W, C], [3, 3, C, O] -> [N, H, W, C / P], [3, 3, C / P, O]."""
    size = x.shape[3] // len(_parts(x))
    slice_channels = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
    return slice_channels(x, axis=3), slice_channels(kernel, axis=2)


def _grids(x: jax.Array, dilation: int) -> jax.Array:
    """Splits images into the dilation^2 grids of every d-th pixel, with an even size: [N, H, W, C] -> f32[d * d * N, h, w, C].

    A dilated convolution is a plain one on each grid.
    """
    n, height, width, channels = x.shape
    d, even = dilation, 2 * dilation
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -height % even), (0, -width % even), (0, 0)))
    rows, columns = x.shape[1] // d, x.shape[2] // d
    x = x.reshape(n, rows, d, columns, d, channels).transpose(2, 4, 0, 1, 3, 5)
    return x.reshape(d * d * n, rows, columns, channels)


def _multiply(x: jax.Array, kernel: jax.Array, first: int, second: int) -> Tiles:
    """Transforms x along its axes `first` and `second`, the kernel along its first and second one, and multiplies the tiles."""
    x, kernel = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel.astype(jnp.float32)
    kernels = [_split_kernel(row) for row in _split_kernel(kernel)]
    tiles = [_split(part, second) for part in _split(x, first)]
    return [[matmul(tiles[a][b], kernels[a][b]) for b in range(4)] for a in range(4)]


def _split_kernel(kernel: jax.Array) -> list[jax.Array]:
    """Transforms the 3 taps along a kernel's first axis to 4."""
    a, b, c = kernel
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _split(x: jax.Array, axis: int) -> list[jax.Array]:
    """Transforms overlapping tiles of 4 pixels along an axis: the 4 values of all tiles, one array each."""
    pairs = x.shape[axis] // 2 - 1
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + 2 * pairs - 1, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, b - d]


def _join_both(products: Tiles, first: int, second: int) -> jax.Array:
    """Transforms 4x4 products back to 2x2 pixels."""
    return _join([_join(row, second) for row in products], first)


def _join(products: list[jax.Array], axis: int) -> jax.Array:
    """Transforms 4 products to 2 pixels along an axis."""
    a, b, c, d = products
    y = jnp.stack([a + b + c, b - c - d], axis + 1)
    return y.reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])
