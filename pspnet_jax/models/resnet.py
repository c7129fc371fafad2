"""The dilated ResNet, PSPNet's backbone (He et al. 2016, with the dilation of Chen et al. 2015)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.errors import UserError
from pspnet_jax.models.layers import ConvNorm, choose, is_plain, max_pool, recompute

BLOCKS = {  # number of blocks in each stage, by depth
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}
BASIC_DEPTHS = (18, 34)
# (kernel size, channels / width) of each convolution; the first has stride 2.
STEMS = {
    "deep": ((3, 1), (3, 1), (3, 2)),
    "deep32": ((3, 0.5), (3, 0.5), (3, 1)),
    "conv7": ((7, 1),),
}
STAGE_NAMES = ("stem", "layer1", "layer2", "layer3", "layer4")  # with which the names of a stage's modules begin
FREEZE = {last: STAGE_NAMES[:i] for i, last in enumerate(("", *STAGE_NAMES))}  # the stages up to one; "": none
# By output stride: (stride, dilation) of layer1 to layer4, which the paper calls conv2_x to conv5_x.
STAGES = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}
# Strides of a bottleneck's first 1x1 convolution and of its 3x3 convolution, given the stride of the block.
STRIDE_IN = {"conv3x3": lambda stride: (1, stride), "conv1x1": lambda stride: (stride, 1)}
# Divisor of a stage's dilation in its first block.
FIRST_BLOCK_DILATION = {"full": 1, "half": 2}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; only the first is dilated, as in mmseg's R18, the only published PSPNet with them."""

    channels: int
    stride: int
    dilation: int
    conv_norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv_norm(self.channels, 3, self.stride, self.dilation, name="conv1")(x, train)
        y = self.conv_norm(self.channels, 3, relu=False, name="conv2")(y, train)
        return _add_shortcut(self, x, y, train)


class Bottleneck(nn.Module):
    """Convolutions 1x1, dilated 3x3, and 1x1 to four times the channels."""

    channels: int
    stride: int
    dilation: int
    conv_norm: Callable[..., nn.Module]
    stride_in: str = "conv3x3"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stride1, stride2 = choose(STRIDE_IN, "stride_in", self.stride_in)(self.stride)
        y = self.conv_norm(self.channels, 1, stride1, name="conv1")(x, train)
        y = self.conv_norm(self.channels, 3, stride2, self.dilation, name="conv2")(y, train)
        y = self.conv_norm(4 * self.channels, 1, relu=False, name="conv3")(y, train)
        return _add_shortcut(self, x, y, train)


def _add_shortcut(block: BasicBlock | Bottleneck, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    """Adds x, or its 1x1 projection if the stride or the number of channels changes, and applies ReLU."""
    if block.stride != 1 or x.shape[-1] != y.shape[-1]:
        x = block.conv_norm(y.shape[-1], 1, block.stride, relu=False, name="projection")(x, train)
    return nn.relu(x + y)


class ResNet(nn.Module):
    """Normalized images f32[N, H, W, channels] -> the features of layer3 and of layer4, [N, h, w, C/2] and [N, h, w, C].

    C = 32 * width (8 * width with basic blocks), h = ceil(H / output_stride) and w = ceil(W / output_stride); at output stride
    32, layer3 has stride 16.

    Attributes:
      channels, depth, width, stem, stride_in, first_block_dilation, output_stride, remat: as in `config.model`, where each is
        explained.
      frozen_norm: as in `ConvNorm`.
      freeze: a key of FREEZE, for stages that in training compute the same as in evaluation, and get no gradient.
      dtype: of the activations and features; parameters and statistics stay float32.

    Raises:
      UserError: when called, if a field's value is not among its choices or the images are not f32[N, H, W, channels].
    """

    depth: int = 50
    width: int = 64
    stem: str = "deep"
    stride_in: str = "conv3x3"
    first_block_dilation: str = "full"
    output_stride: int = 8
    frozen_norm: bool = False
    freeze: str = ""
    remat: str = "none"
    dtype: Any = jnp.float32
    channels: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        if images.shape[3:] != (self.channels,) or not images.size or not jnp.issubdtype(images.dtype, jnp.floating):
            expected = f"float32[N, H, W, {self.channels}]"
            raise UserError(f"images are {images.dtype}{list(images.shape)}: expected {expected}, from models.normalize")
        frozen = choose(FREEZE, "freeze", self.freeze)
        # With remat, x - mean is computed again anyway, and computing it alone again would only cost traffic.
        norm: dict[str, Any] = {"frozen_norm": self.frozen_norm, "store_difference": self.remat != "none"}
        conv_norm = functools.partial(ConvNorm, **norm)
        stem_conv = functools.partial(recompute(ConvNorm, self.remat), **norm)
        x = images.astype(self.dtype)
        for i, (kernel_size, multiple) in enumerate(choose(STEMS, "stem", self.stem)):
            x = stem_conv(int(multiple * self.width), kernel_size, 2 if i == 0 else 1, name=f"stem_conv{i + 1}")(
                x, train and not frozen
            )
        x = max_pool(jax.lax.stop_gradient(x) if frozen else x)
        bottleneck = functools.partial(recompute(Bottleneck, self.remat), stride_in=self.stride_in)
        block = recompute(BasicBlock, self.remat) if self.depth in BASIC_DEPTHS else bottleneck
        blocks = choose(BLOCKS, "depth", self.depth)
        divisor = choose(FIRST_BLOCK_DILATION, "first_block_dilation", self.first_block_dilation)
        features = []
        for stage, (stride, dilation) in enumerate(choose(STAGES, "output_stride", self.output_stride)):
            name = STAGE_NAMES[stage + 1]
            learns = train and name not in frozen
            first, *others = (f"{name}_block{i}" for i in range(blocks[stage]))
            of_stage = functools.partial(block, channels=self.width * 2**stage, conv_norm=conv_norm)
            x = of_stage(stride=stride, dilation=max(1, dilation // divisor), name=first)(x, learns)
            equal = functools.partial(of_stage, stride=1, dilation=dilation)
            if len(others) < LOOP or self.is_initializing() or is_plain():
                for other in others:
                    x = equal(name=other)(x, learns)
            else:
                x = _in_a_loop(self, equal(parent=None), others, x, learns)
            x = jax.lax.stop_gradient(x) if name in frozen else x
            features.append(x)
        return features[2], features[3]


LOOP = 25  # number of equal blocks from which they are compiled only once


def _in_a_loop(parent: nn.Module, block: nn.Module, names: Sequence[str], x: jax.Array, train: bool) -> jax.Array:
    """Applies a block repeatedly, with the variables of the parent's equal blocks of these names."""
    variables = [{kind: tree[name] for kind, tree in parent.variables.items()} for name in names]
    mutable = ["batch_stats"] if parent.is_mutable_collection("batch_stats") else []

    def apply(x: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
        return block.apply(variables, x, train, mutable=mutable)

    x, updates = jax.lax.scan(apply, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *variables))
    for kind, tree in updates.items():
        for i, name in enumerate(names):
            parent.put_variable(kind, name, jax.tree.map(lambda array, i=i: array[i], tree))
    return x
