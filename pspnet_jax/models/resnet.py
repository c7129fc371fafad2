"""The dilated ResNet, PSPNet's backbone (He et al. 2016, with the dilation of Chen et al. 2015)."""

from collections.abc import Callable

import flax.linen as nn
import jax

from pspnet_jax.models.layers import max_pool

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}
BASIC_DEPTHS = (18, 34)
# (kernel size, channels over the width) of each convolution; the first has stride 2.
STEMS = {
    "deep": ((3, 1), (3, 1), (3, 2)),
    "deep32": ((3, 0.5), (3, 0.5), (3, 1)),
    "conv7": ((7, 1),),
}
# By output stride: (stride, dilation) of layer1 to layer4, which the paper calls conv2_x to conv5_x.
STAGES = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; only the first is dilated, as in mmseg, the one published PSPNet with basic blocks."""

    channels: int
    stride: int
    dilation: int
    stride_in: str  # a basic block has no 1x1 convolution that could take the stride
    conv_norm: Callable[..., nn.Module]
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv_norm(self.channels, 3, self.stride, self.dilation, name="conv1")(x, train)
        y = self.conv_norm(self.channels, 3, relu=False, name="conv2")(y, train)
        return _add_shortcut(self, x, y, train)


class Bottleneck(nn.Module):
    """1x1, dilated 3x3, 1x1 to four times the channels."""

    channels: int
    stride: int
    dilation: int
    stride_in: str
    conv_norm: Callable[..., nn.Module]
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stride1, stride2 = (self.stride, 1) if self.stride_in == "conv1x1" else (1, self.stride)
        y = self.conv_norm(self.channels, 1, stride1, name="conv1")(x, train)
        y = self.conv_norm(self.channels, 3, stride2, self.dilation, name="conv2")(y, train)
        y = self.conv_norm(4 * self.channels, 1, relu=False, name="conv3")(y, train)
        return _add_shortcut(self, x, y, train)


def _add_shortcut(block: BasicBlock | Bottleneck, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    """The identity, or a 1x1 projection where the stride or the number of channels changes."""
    if block.stride != 1 or x.shape[-1] != y.shape[-1]:
        x = block.conv_norm(y.shape[-1], 1, block.stride, relu=False, name="projection")(x, train)
    return nn.relu(x + y)


class ResNet(nn.Module):
    """f32[N, H, W, 3] -> (layer3's output, layer4's output), with C/2 and C channels, C = 32 * width (8 * width if basic).

    The height and width are ceil(H / output_stride) and ceil(W / output_stride).
    """

    depth: int
    width: int
    stem: str
    stride_in: str
    first_block_dilation: str
    output_stride: int
    conv_norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        for i, (kernel_size, multiple) in enumerate(STEMS[self.stem]):
            x = self.conv_norm(int(multiple * self.width), kernel_size, 2 if i == 0 else 1, name=f"stem_conv{i + 1}")(x, train)
        x = max_pool(x)
        block = BasicBlock if self.depth in BASIC_DEPTHS else Bottleneck
        outputs = []
        for stage, (stride, dilation) in enumerate(STAGES[self.output_stride]):
            for i in range(BLOCKS[self.depth][stage]):
                halved = i == 0 and self.first_block_dilation == "half"
                x = block(
                    channels=self.width * 2**stage,
                    stride=stride if i == 0 else 1,
                    dilation=max(1, dilation // 2) if halved else dilation,
                    stride_in=self.stride_in,
                    conv_norm=self.conv_norm,
                    name=f"layer{stage + 1}_block{i}",
                )(x, train)
            outputs.append(x)
        return outputs[2], outputs[3]
