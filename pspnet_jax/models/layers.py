"""Layers shared by all parts of the network. All tensors are [N, H, W, C].

Sizes are static, except in `jax.export`, which may leave N, H and W open: there they are symbols, such as "8*h + 1".
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError
from pspnet_jax.models import cpu
from pspnet_jax.models.norm import BatchNorm

T = TypeVar("T")
Matrix = np.ndarray | jax.Array  # NumPy, or traced if its size is a symbol
_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Traces networks with one operation per layer and no code for single platforms, which converters understand."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Returns whether networks are traced within `plain`."""
    return _plain.get()


def is_known(*sizes: Any) -> bool:
    """Returns whether sizes are numbers, not symbols of `jax.export`."""
    return not any(export.is_symbolic_dim(size) for size in sizes)


def choose(choices: Mapping[Any, T], field: str, value: object) -> T:
    """Returns choices[value], or raises a UserError that lists the choices."""
    if value not in choices:
        raise UserError(not_a_choice(choices, field, value))
    return choices[value]


def not_a_choice(choices: Iterable[object], field: str, value: object) -> str:
    """Returns the error message for a value that is not one of the choices."""
    return f"{field}={value!r}: expected one of {', '.join(map(repr, choices))}"


he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int] = (1, 1), padding: Any = "SAME", **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in NHWC with HWIO kernels; 1x1 convolutions are matrix products and ignore `padding`.

    On CPUs, where XLA computes matrix products and their gradients faster than convolutions, 3x3 convolutions that keep the
    size and have many pixels and channels are matrix products as well, see `cpu`; they agree to rounding. Where sizes are not
    known, and within `plain`, all are convolutions.
    """
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    direct: cpu.Function = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    if is_plain() or not is_known(*x.shape[1:3]):
        return direct(x, kernel)
    if kernel.shape[:2] == (1, 1):
        x = x[:, :: strides[0], :: strides[1]]
        return jax.lax.platform_dependent(x, kernel[0, 0], cpu=cpu.matmul, default=jnp.matmul)
    dilation = (options.get("rhs_dilation") or (1,))[0]
    keeps_size = tuple(strides) == (1, 1) and padding in ("SAME", [(dilation, dilation)] * 2)
    channels = math.prod(kernel.shape[2:])
    is_large = channels > 64 * 64 and channels * math.prod(x.shape[1:3]) >= cpu.WINOGRAD
    if kernel.shape[:2] == (3, 3) and is_large and keeps_size:
        winograd: cpu.Function = functools.partial(cpu.winograd, dilation=dilation)
        if x.dtype == jnp.bfloat16 and jax.__version_info__ >= (0, 11):  # inference uses oneDNN, see `programs.options`
            winograd = cpu.if_differentiated(winograd, direct)
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)
    return direct(x, kernel)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization and ReLU: [N, H, W, C] -> [N, h, w, C'], computed in the input's dtype.

    The padding is symmetric, so that stride s takes H to h = ceil(H / s).

    Attributes:
      features: C'.
      kernel_size: an odd number.
      relu: False omits the ReLU.
      frozen_norm: normalize with the running statistics in training as well, without updating them.
      store_difference: as in `BatchNorm`.

    Raises:
      UserError: in training, if each channel has a single value, whose variance is 0.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    relu: bool = True
    frozen_norm: bool = False
    store_difference: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.stride,
            padding=self.dilation * (self.kernel_size // 2),
            kernel_dilation=self.dilation,
            use_bias=False,
            dtype=x.dtype,
            kernel_init=he_normal_fan_out,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        x = checkpoint_name(x, "conv")
        batch_statistics = train and not self.frozen_norm
        if batch_statistics and x.size == x.shape[-1] and not self.is_initializing():
            raise UserError(
                f"BatchNorm at {'/'.join(self.path)}/bn sees one value per channel, whose variance is 0: "
                "train on 2 or more images, with frozen statistics, or without the 1x1 pyramid bin"
            )
        x = BatchNorm(not batch_statistics, self.store_difference, name="bn")(x)
        return nn.relu(x) if self.relu else x


def recompute(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """Returns a module, called as `module(...)(x, train)`, that stores less for the gradient, by `config.model.remat`.

    It stores its input ("block"), or also the outputs of its convolutions ("norm"), and computes everything else again.
    Parameters, their names and results are unchanged.
    """
    policy = choose(REMAT, "remat", remat)
    return module if remat == "none" else nn.remat(module, policy=policy, static_argnums=(2,))


def _is_statistic(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy that stores the sums of batch normalization, one number per channel, so that devices add them up only once."""
    return primitive.name == "reduce_sum"


REMAT = {  # from the most memory to the least
    "none": None,
    "norm": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("conv"), _is_statistic
    ),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2 and padding 1: [N, H, W, C] -> [N, ceil(H/2), ceil(W/2), C].

    Where values of a window are tied, the gradient is shared or goes to the first of them.
    """
    if is_plain():
        return max_pool_by_windows(x)
    return jax.lax.platform_dependent(x, tpu=max_pool_by_windows, default=max_pool_by_slices)


def max_pool_by_windows(x: jax.Array) -> jax.Array:
    """XLA's windowed maximum. On TPUs, it needs less memory, above all where devices share images."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def max_pool_by_slices(x: jax.Array) -> jax.Array:
    """Maximum of shifted slices, first along rows, then along columns.

    On CPUs, this is five times faster than XLA's windowed maximum, whose gradient searches every window.
    """
    height, width = ((size - 1) // 2 + 1 for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    x = functools.reduce(jnp.maximum, (x[:, i : i + 2 * height - 1 : 2] for i in range(3)))
    return functools.reduce(jnp.maximum, (x[:, :, i : i + 2 * width - 1 : 2] for i in range(3)))


def resize_matrix(size: int, new_size: int, align_corners: bool) -> Matrix:
    """Bilinear interpolation along one axis as a matrix f32[new_size, size]; each row has at most two weights, which sum to 1.

    With align_corners, the first and last pixels of input and output coincide (Caffe's Interp, semseg). Otherwise, pixel
    centers lie at half-integers and the borders are replicated (mmseg). Neither antialiases when downsampling.
    """
    xp: Any = np if is_known(size, new_size) else jnp
    source, target = xp.arange(size), xp.arange(new_size)
    if align_corners:  # the position in the source is numerator / denominator, which are integers
        numerator, denominator = target * (size - 1), new_size - 1 if new_size != 1 else 1
    else:
        numerator, denominator = (2 * target + 1) * size - new_size, 2 * new_size
    numerator = xp.clip(numerator, 0, (size - 1) * denominator)
    low = (numerator // denominator)[:, None]
    weight = (numerator % denominator / denominator)[:, None]
    return (xp.where(source == low, 1 - weight, 0) + xp.where(source == low + 1, weight, 0)).astype(np.float32)


def apply_separable(x: jax.Array, rows: Matrix, columns: Matrix) -> jax.Array:
    """Applies one matrix along each axis, in float32: [N, H, W, C], [H', H], [W', W] -> f32[N, H', W', C]."""
    exact = jax.lax.Precision.HIGHEST  # TPUs and GPUs would round the weights to bfloat16 or TF32
    if is_plain():
        x = jnp.einsum("yh,nhwc->nywc", rows, x.astype(jnp.float32), precision=exact)
        return jnp.einsum("xw,nywc->nyxc", columns, x, precision=exact)
    n, height, channels = *x.shape[:2], x.shape[3]

    # As batches of matrix products, neither they nor their gradients need transposed copies of x on CPUs.
    def along_rows(x: jax.Array) -> jax.Array:
        product = jnp.matmul(jnp.broadcast_to(rows, (n, *rows.shape)), x.reshape(n, height, -1), precision=exact)
        return product.reshape(n, rows.shape[0], -1, channels)

    def along_columns(x: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.broadcast_to(columns, (*x.shape[:2], *columns.shape)), x, precision=exact)

    x = x.astype(jnp.float32)
    if is_known(height, rows.shape[0]) and rows.shape[0] > height:  # CPUs copy the columns' matrix for each row
        return along_rows(along_columns(x))
    return along_columns(along_rows(x))


def resize(x: jax.Array, height: int, width: int, align_corners: bool) -> jax.Array:
    """Bilinear resize without antialiasing: [N, h, w, C] -> f32[N, height, width, C]."""
    rows = resize_matrix(x.shape[1], height, align_corners)
    return apply_separable(x, rows, resize_matrix(x.shape[2], width, align_corners))


class CoarseLogits(flax.struct.PyTreeNode):
    """Logits before they are upsampled to the size of the images.

    Upsampled logits f32[N, height, width, K] are the largest array of a train step. Losses use only a few of their rows at a
    time, see `by_rows`.

    Attributes:
      scores: f32[N, h, w, K].
      height, width: size to which they are upsampled bilinearly, in pixels.
      align_corners: as in `resize_matrix`.
      mesh: the devices, see `parallel.make_mesh`. Each computes its images and, if devices share images, its rows.
    """

    scores: jax.Array
    height: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)
    align_corners: bool = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)

    def upsample(self) -> jax.Array:
        """Returns the logits f32[N, height, width, K]."""
        return resize(self.scores, self.height, self.width, self.align_corners)

    def by_rows(self, function: Callable[..., jax.Array], labels: jax.Array) -> jax.Array:
        """Returns function(self.upsample(), labels) without building the upsampled logits.

        They are computed for a few rows at a time, and again for the gradient.

        Args:
          function: (f32[N, R, width, K], [N, R, width]) -> [N, R, ...], which treats each row separately.
          labels: uint8[N, height, width].
        """
        columns = resize_matrix(self.scores.shape[2], self.width, self.align_corners)

        @jax.checkpoint
        def of_block(scores: jax.Array, rows: jax.Array, labels: jax.Array) -> jax.Array:
            return function(apply_separable(scores, rows, columns), labels)

        def of_rows(scores: jax.Array, rows: jax.Array, labels: jax.Array) -> jax.Array:
            n, height, width = labels.shape
            size = math.ceil(height / max(1, labels.size * scores.shape[-1] // BLOCK))  # rows of a block
            rows, labels = _pad_rows(rows, labels, -height % size)
            split = rows.reshape(-1, size, rows.shape[1]), jnp.moveaxis(labels.reshape(n, -1, size, width), 1, 0)
            values = jax.lax.map(lambda block: of_block(scores, *block), split)  # [blocks, N, R, ...]
            return jnp.moveaxis(values, 0, 1).reshape(n, -1, *values.shape[3:])[:, :height]

        rows = jnp.asarray(resize_matrix(self.scores.shape[1], self.height, self.align_corners))
        if self.mesh:
            rows, labels = _pad_rows(rows, labels, -self.height % self.mesh.shape["spatial"])
            data, spatial, both = PartitionSpec("data"), PartitionSpec("spatial"), PartitionSpec("data", "spatial")
            of_rows = jax.shard_map(of_rows, mesh=self.mesh, in_specs=(data, spatial, both), out_specs=both)
        return of_rows(self.scores, rows, labels)[:, : self.height]


BLOCK = 2**21  # upsampled scores at a time, up to twice as many, on each device


def _pad_rows(rows: jax.Array, labels: jax.Array, missing: int) -> tuple[jax.Array, jax.Array]:
    """Appends rows whose labels are ignored."""
    return jnp.pad(rows, ((0, missing), (0, 0))), jnp.pad(labels, ((0, 0), (0, missing), (0, 0)), constant_values=IGNORE)


def by_rows(
    function: Callable[[jax.Array, jax.Array], jax.Array], logits: jax.Array | CoarseLogits, labels: jax.Array
) -> jax.Array:
    """Returns function(logits, labels) for upsampled logits, see `CoarseLogits.by_rows`."""
    return logits.by_rows(function, labels) if isinstance(logits, CoarseLogits) else function(logits, labels)


def share_rows(outputs: Any, mesh: Mesh) -> Any:
    """Returns a network's training outputs, with logits that are upsampled where their images and rows are."""

    def share(output: Any) -> Any:
        return output.replace(mesh=mesh) if isinstance(output, CoarseLogits) else output

    return jax.tree.map(share, outputs, is_leaf=lambda output: isinstance(output, CoarseLogits))


def pool_cells(size: int, bins: int) -> list[tuple[int, int]]:
    """Cells of adaptive pooling along one axis: cell i covers floor(i * size / bins) up to ceil((i + 1) * size / bins)."""
    return [(i * size // bins, ((i + 1) * size + bins - 1) // bins) for i in range(bins)]


def _average_matrix(size: int, bins: int) -> Matrix:
    xp: Any = np if is_known(size) else jnp
    start, stop = (xp.array(bounds)[:, None] for bounds in zip(*pool_cells(size, bins), strict=True))
    pixel = xp.arange(size)
    return (((start <= pixel) & (pixel < stop)) / (stop - start)).astype(np.float32)


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """Averages each cell: [N, H, W, C] -> f32[N, bins, bins, C]."""
    return apply_separable(x, _average_matrix(x.shape[1], bins), _average_matrix(x.shape[2], bins))


def adaptive_max_pool(x: jax.Array, bins: int) -> jax.Array:
    """Takes the maximum of each cell: [N, H, W, C] -> [N, bins, bins, C]."""
    rows, columns = pool_cells(x.shape[1], bins), pool_cells(x.shape[2], bins)
    strips = [jax.lax.slice_in_dim(x, top, bottom, axis=1).max(1, keepdims=True) for top, bottom in rows]
    x = jnp.concatenate(strips, 1)
    cells = [jax.lax.slice_in_dim(x, left, right, axis=2).max(2, keepdims=True) for left, right in columns]
    return jnp.concatenate(cells, 2)
