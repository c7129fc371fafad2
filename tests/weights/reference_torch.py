"""Third-party networks in plain torch.nn, with the originals' attribute names (so their keys) and arithmetic; no code of ours.

Sources: torchvision/models/resnet.py; hszhao/semseg, model/{resnet,pspnet}.py; open-mmlab/mmsegmentation 1.2.2,
models/backbones/resnet.py, models/decode_heads/{psp,fcn}_head.py and configs/_base_/models/pspnet_r50-d8.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def conv(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, dilation * (size // 2), dilation, bias=False)


class Block(nn.Module):
    """A basic block, whose second convolution is never dilated, or a bottleneck with its stride in the 3x3 convolution."""

    def __init__(self, inputs: int, channels: int, bottleneck: bool, stride: int, dilation: int):
        super().__init__()
        outputs = 4 * channels if bottleneck else channels
        if bottleneck:
            convs = (
                conv(inputs, channels, 1),
                conv(channels, channels, 3, stride, dilation),
                conv(channels, outputs, 1),
            )
        else:
            convs = (conv(inputs, channels, 3, stride, dilation), conv(channels, channels, 3))
        self.count = len(convs)
        for i, convolution in enumerate(convs, 1):
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(convolution.out_channels))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def add_stages(
    module: nn.Module, depth: int, inputs: int, strides: Sequence[int], dilations: Sequence[tuple[int, int]]
) -> None:
    """Adds layer1 to layer4 to a module; the dilations of a stage are (first block, other blocks)."""
    bottleneck = depth >= 50
    for stage, (count, stride, (first, others)) in enumerate(zip(BLOCKS[depth], strides, dilations, strict=True)):
        channels, blocks = 64 * 2**stage, []
        for i in range(count):
            blocks.append(Block(inputs, channels, bottleneck, stride if i == 0 else 1, first if i == 0 else others))
            inputs = channels * 4 if bottleneck else channels
        module.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))


def stem_of_three(channels: int) -> list[nn.Module]:
    widths = (3, channels, channels, 2 * channels)
    convs = [conv(widths[i], widths[i + 1], 3, 2 if i == 0 else 1) for i in range(3)]
    return [m for c in convs for m in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())]


class ResNet(nn.Module):
    """ResNet of torchvision and timm, or with `deep` of semseg for ImageNet; returns the output of layer4."""

    def __init__(self, depth: int, deep: bool = False):
        super().__init__()
        convs = stem_of_three(64)[::3] if deep else [conv(3, 64, 7, 2)]
        self.stem = len(convs)
        for i, convolution in enumerate(convs, 1):
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(convolution.out_channels))
        add_stages(self, depth, 128 if deep else 64, (1, 2, 2, 2), [(1, 1)] * 4)
        self.fc = nn.Linear(2048 if depth >= 50 else 512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, self.stem + 1):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class TimmDeepResNet(nn.Module):
    """timm's ResNet-C (32 channels in the stem) or ResNet-S (64)."""

    def __init__(self, depth: int, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Sequential(*stem_of_three(channels)[:-2]), nn.BatchNorm2d(2 * channels)
        add_stages(self, depth, 2 * channels, (1, 2, 2, 2), [(1, 1)] * 4)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Levels(nn.Module):
    """semseg's pyramid."""

    def __init__(self, channels: int):
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), conv(channels, channels // 4, 1), nn.BatchNorm2d(channels // 4), nn.ReLU())
            for b in (1, 2, 3, 6)
        )


def concatenated(x: torch.Tensor, levels: nn.ModuleList, align_corners: bool) -> torch.Tensor:
    return torch.cat([x, *(upsampled(level(x), x, align_corners) for level in levels)], 1)


def upsampled(x: torch.Tensor, like: torch.Tensor, align_corners: bool) -> torch.Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


class SemsegPSPNet(nn.Module):
    """semseg's PSPNet in evaluation, without its check that the sides are 8k + 1."""

    def __init__(self, depth: int, classes: int):
        super().__init__()
        self.layer0 = nn.Sequential(*stem_of_three(64), nn.MaxPool2d(3, 2, 1))
        add_stages(self, depth, 128, (1, 2, 1, 1), [(1, 1), (1, 1), (2, 2), (4, 4)])
        self.ppm = Levels(2048)
        self.cls = nn.Sequential(
            conv(4096, 512, 3), nn.BatchNorm2d(512), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(512, classes, 1)
        )
        self.aux = nn.Sequential(
            conv(1024, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(images)))))
        return upsampled(self.cls(concatenated(x, self.ppm.features, True)), images, True)


class ConvModule(nn.Module):
    """Convolution, batch normalization and ReLU, as in mmcv."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, size), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class MmsegPSPNet(nn.Module):
    """mmseg's PSPNet with contract_dilation; its stem is V1c ("deep32") or, in the b models, torchvision's ("conv7")."""

    def __init__(self, depth: int, classes: int, stem: str, align_corners: bool):
        super().__init__()
        channels = 2048 if depth >= 50 else 512
        self.align_corners = align_corners
        self.backbone, self.decode_head, self.auxiliary_head = nn.Module(), nn.Module(), nn.Module()
        if stem == "deep32":
            self.backbone.stem = nn.Sequential(*stem_of_three(32))
        else:
            self.backbone.conv1, self.backbone.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        add_stages(self.backbone, depth, 64, (1, 2, 1, 1), [(1, 1), (1, 1), (1, 2), (2, 4)])
        self.decode_head.conv_seg = nn.Conv2d(channels // 4, classes, 1)
        self.decode_head.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), ConvModule(channels, channels // 4, 1)) for b in (1, 2, 3, 6)
        )
        self.decode_head.bottleneck = ConvModule(2 * channels, channels // 4, 3)
        self.auxiliary_head.conv_seg = nn.Conv2d(channels // 8, classes, 1)
        self.auxiliary_head.convs = nn.Sequential(ConvModule(channels // 2, channels // 8, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        net, head = self.backbone, self.decode_head
        x = net.stem(images) if hasattr(net, "stem") else F.relu(net.bn1(net.conv1(images)))
        x = net.layer4(net.layer3(net.layer2(net.layer1(F.max_pool2d(x, 3, 2, 1)))))
        x = head.bottleneck(concatenated(x, head.psp_modules, self.align_corners))
        return upsampled(head.conv_seg(x), images, self.align_corners)


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Sets all weights and running statistics to random values, none neutral, and switches to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.ndim == 4:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
            elif key.endswith("num_batches_tracked"):
                value.fill_(1000)
            elif key.endswith(("running_var", "weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0, 0.3, generator=generator)
    return network.eval()
