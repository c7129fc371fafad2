"""The authors' PSPNet as Caffe runs it, in torch functions that look up blobs by layer name; and a .caffemodel writer.

Both follow the release (layer names, strides, order of the concatenation, field numbers of caffe.proto) and share no code with
the package. A layer gets random weights when it first runs, scaled to its input, so that values neither vanish nor explode.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional

MEAN_BGR = (103.939, 116.779, 123.68)  # evaluation/eval_all.m
Blobs = dict[str, list[np.ndarray]]


def random_convolution(random: np.random.Generator, x: torch.Tensor, channels: int, size: int, bias: bool) -> list[np.ndarray]:
    """He-normal kernel [O, I, size, size] and, for a classifier, a bias [O]."""
    scale = np.sqrt(2 / (x.shape[1] * size**2))
    kernel = random.standard_normal((channels, x.shape[1], size, size), np.float32) * np.float32(scale)
    return [kernel, random.normal(0, 0.5, channels).astype(np.float32)] if bias else [kernel]


def random_batch_norm(random: np.random.Generator, x: torch.Tensor) -> list[np.ndarray]:
    """Slope, bias, mean and variance, each [1, C, 1, 1]; mean and variance are random, close to those of x.

    The variance has a small part common to all channels, since the variance of one-pixel features is 0. Biases near 1 keep
    most ReLUs active: with half of them inactive, a deep random network amplifies rounding errors a thousandfold.
    """
    shape = (1, x.shape[1], 1, 1)
    variance = x.var((0, 2, 3), correction=0).numpy() + 0.01 * float(x.square().mean())
    mean = x.mean((0, 2, 3)).numpy() + np.sqrt(variance) * random.normal(0, 0.3, x.shape[1])
    variance = variance * random.uniform(0.5, 1.5, x.shape[1])
    slope, bias = random.uniform(0.5, 1.5, shape), random.normal(1, 0.3, shape)
    return [blob.astype(np.float32).reshape(shape) for blob in (slope, bias, mean, variance)]


def batch_norm(x: torch.Tensor, blobs: Iterable[np.ndarray], eps: float = 1e-5) -> torch.Tensor:
    """The BN layer with frozen statistics; its fourth blob is the variance."""
    slope, bias, mean, variance = map(torch.from_numpy, blobs)
    return (x - mean) * (variance + eps) ** -0.5 * slope + bias


@dataclasses.dataclass
class Network:
    """PSPNet of the release; a call adds missing layers to `blobs`.

    Attributes:
      blocks: number of blocks in conv2_x to conv5_x.
      strided: the convolution of conv3_1 that has the stride: "1x1_reduce" (the release's R50) or "3x3" (its R101).
      width: channels of conv1_1; 64 in the release.
    """

    num_classes: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    strided: str = "1x1_reduce"
    width: int = 64
    blobs: Blobs = dataclasses.field(default_factory=dict)
    random: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))

    def convolution(
        self, name: str, x: torch.Tensor, channels: int, size: int, stride: int = 1, dilation: int = 1, bias: bool = False
    ) -> torch.Tensor:
        if name not in self.blobs:
            self.blobs[name] = random_convolution(self.random, x, channels, size, bias)
        pad = dilation * (size // 2)
        return functional.conv2d(x, *map(torch.from_numpy, self.blobs[name]), stride=stride, padding=pad, dilation=dilation)

    def conv_bn(self, name: str, x: torch.Tensor, channels: int, size: int, stride: int = 1, dilation: int = 1) -> torch.Tensor:
        y = self.convolution(name, x, channels, size, stride, dilation)
        if f"{name}/bn" not in self.blobs:
            self.blobs[f"{name}/bn"] = random_batch_norm(self.random, y)
        return batch_norm(y, self.blobs[f"{name}/bn"])

    def block(self, name: str, x: torch.Tensor, channels: int, stride: int, dilation: int) -> torch.Tensor:
        strides = {"1x1_reduce": 1, "3x3": 1, self.strided: stride}
        y = self.conv_bn(f"{name}_1x1_reduce", x, channels, 1, strides["1x1_reduce"]).relu()
        y = self.conv_bn(f"{name}_3x3", y, channels, 3, strides["3x3"], dilation).relu()
        y = self.conv_bn(f"{name}_1x1_increase", y, 4 * channels, 1)
        return (y + (self.conv_bn(f"{name}_1x1_proj", x, 4 * channels, 1, stride) if name.endswith("_1") else x)).relu()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """u8[N, H, W, 3] in RGB order -> logits f32[N, H, W, K]."""
        bgr = images[..., ::-1] - np.array(MEAN_BGR, np.float32)
        x = torch.from_numpy(bgr.transpose(0, 3, 1, 2).astype(np.float32, order="C"))
        x = self.conv_bn("conv1_1_3x3_s2", x, self.width, 3, 2).relu()
        x = self.conv_bn("conv1_2_3x3", x, self.width, 3).relu()
        x = self.conv_bn("conv1_3_3x3", x, 2 * self.width, 3).relu()
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            for i in range(self.blocks[stage]):
                name = f"conv{stage + 2}_{i + 1}"
                x = self.block(name, x, self.width * 2**stage, stride if i == 0 else 1, dilation)
            if stage == 2:  # the result of the auxiliary head is unused, but trained files have its weights
                auxiliary = self.conv_bn(f"conv4_{self.blocks[2] + 1}", x, 4 * self.width, 3).relu()
                self.convolution("conv6_1", auxiliary, self.num_classes, 1, bias=True)
        inputs = [x]
        for bins in (6, 3, 2, 1):
            level = functional.adaptive_avg_pool2d(x, bins)
            level = self.conv_bn(f"conv5_3_pool{bins}_conv", level, 8 * self.width, 1).relu()
            inputs.append(functional.interpolate(level, x.shape[2:], mode="bilinear", align_corners=True))
        y = self.conv_bn("conv5_4", torch.cat(inputs, 1), 8 * self.width, 3).relu()
        y = self.convolution("conv6", y, self.num_classes, 1, bias=True)
        return functional.interpolate(y, images.shape[1:3], mode="bilinear", align_corners=True).permute(0, 2, 3, 1).numpy()


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a message, a string or packed numbers."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def blob(values: np.ndarray, legacy: bool = False, packed: bool = True, double: bool = False) -> bytes:
    """A BlobProto.

    Args:
      values: of any shape; at most 4 dimensions if legacy.
      legacy: write num, channels, height and width instead of shape.
      packed: write the floats as one field, else each with its own tag.
      double: write double_data instead of data.
    """
    if legacy:
        sizes = (1,) * (4 - values.ndim) + values.shape
        shape = b"".join(varint(number << 3) + varint(size) for number, size in enumerate(sizes, 1))
    else:
        shape = field(7, field(1, b"".join(map(varint, values.shape))))
    if double:
        return shape + field(8, values.astype("<f8").tobytes())
    floats = values.astype("<f4").tobytes()
    if packed:
        return shape + field(5, floats)
    return shape + b"".join(varint(5 << 3 | 5) + floats[i : i + 4] for i in range(0, len(floats), 4))


def write(path: pathlib.Path, blobs: Blobs, old: bool = False, **form: bool) -> None:
    """Writes a NetParameter: a name, a layer without weights, and one layer per entry of blobs; `old` uses `layers`."""
    with path.open("wb") as file:
        file.write(field(1, b"PSPNet"))
        file.write(field(2, field(4, b"relu") + varint(5 << 3) + varint(18)) if old else field(100, field(1, b"relu")))
        for name, values in blobs.items():
            encoded = [field(6 if old else 7, blob(v, **form)) for v in values]
            file.write(field(2 if old else 100, field(4 if old else 1, name.encode()) + b"".join(encoded)))
