"""PSPNet by definition, in float64 NumPy and plain loops, sharing no code with the package.

Weights are read from our variables by their path, for example "backbone/layer1_block0/conv1/conv/kernel".
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """Sums, over the kernel's positions, the zero-padded, shifted and subsampled input times the matrix at that position."""
    size = len(kernel)
    pad = dilation * (size // 2)
    n, height, width, _ = x.shape
    new_height, new_width = ((s + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for s in (height, width))
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = np.zeros((n, new_height, new_width, kernel.shape[3]))
    for u in range(size):
        for v in range(size):
            rows = u * dilation + stride * np.arange(new_height)
            columns = v * dilation + stride * np.arange(new_width)
            y += x[:, rows][:, :, columns] @ kernel[u, v]
    return y


def max_pool_3x3_stride_2(x: np.ndarray) -> np.ndarray:
    n, height, width, channels = x.shape
    y = np.zeros((n, (height + 1) // 2, (width + 1) // 2, channels))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j] = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2].max((1, 2))
    return y


def adaptive_pool(x: np.ndarray, bins: int, reduce: str) -> np.ndarray:
    """Cell (i, j) covers rows floor(i H / bins) to ceil((i + 1) H / bins); same for columns. `reduce` is "mean" or "max"."""
    n, height, width, channels = x.shape
    y = np.zeros((n, bins, bins, channels))
    for i in range(bins):
        for j in range(bins):
            top, bottom = int(np.floor(i * height / bins)), int(np.ceil((i + 1) * height / bins))
            left, right = int(np.floor(j * width / bins)), int(np.ceil((j + 1) * width / bins))
            y[:, i, j] = getattr(x[:, top:bottom, left:right], reduce)((1, 2))
    return y


def resize(x: np.ndarray, height: int, width: int, align_corners: bool) -> np.ndarray:
    """Interpolates between the four samples around each pixel's position in x."""

    def position(pixel: int, size: int, new_size: int) -> tuple[int, int, float]:
        if align_corners:
            at = pixel * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
        else:
            at = max((pixel + 0.5) * size / new_size - 0.5, 0.0)
        low = min(int(np.floor(at)), size - 1)
        return low, min(low + 1, size - 1), at - low

    y = np.zeros((len(x), height, width, x.shape[3]))
    for i in range(height):
        top, bottom, down = position(i, x.shape[1], height)
        for j in range(width):
            left, right, across = position(j, x.shape[2], width)
            above = (1 - across) * x[:, top, left] + across * x[:, top, right]
            below = (1 - across) * x[:, bottom, left] + across * x[:, bottom, right]
            y[:, i, j] = (1 - down) * above + down * below
    return y


@dataclasses.dataclass
class Network:
    """The network of `config.model` with our variables, without dropout.

    Attributes:
      train: normalize with batch statistics, and store the updated running averages in `statistics`.
    """

    model: ConfigDict
    variables: dict
    train: bool = False

    def __post_init__(self) -> None:
        flat = {part: traverse_util.flatten_dict(self.variables[part], sep="/") for part in ("params", "batch_stats")}
        self.weights = {path: np.asarray(value, np.float64) for path, value in flat["params"].items()}
        self.statistics = {path: np.asarray(value, np.float64) for path, value in flat["batch_stats"].items()}

    def batch_norm(self, path: str, x: np.ndarray) -> np.ndarray:
        mean, variance = self.statistics[f"{path}/mean"], self.statistics[f"{path}/var"]
        if self.train:
            old_mean, old_variance = mean, variance
            mean = x.mean((0, 1, 2))
            variance = ((x - mean) ** 2).mean((0, 1, 2))
            self.statistics[f"{path}/mean"] = 0.9 * old_mean + 0.1 * mean
            self.statistics[f"{path}/var"] = 0.9 * old_variance + 0.1 * variance
        return (x - mean) / np.sqrt(variance + 1e-5) * self.weights[f"{path}/scale"] + self.weights[f"{path}/bias"]

    def conv_norm(self, path: str, x: np.ndarray, stride: int = 1, dilation: int = 1, relu: bool = True) -> np.ndarray:
        y = self.batch_norm(f"{path}/bn", convolve(x, self.weights[f"{path}/conv/kernel"], stride, dilation))
        return np.maximum(y, 0) if relu else y

    def block(self, path: str, x: np.ndarray, stride: int, dilation: int) -> np.ndarray:
        if self.model.depth < 50:
            y = self.conv_norm(f"{path}/conv1", x, stride, dilation)
            y = self.conv_norm(f"{path}/conv2", y, relu=False)
        else:
            at_1x1 = self.model.stride_in == "conv1x1"
            y = self.conv_norm(f"{path}/conv1", x, stride if at_1x1 else 1)
            y = self.conv_norm(f"{path}/conv2", y, 1 if at_1x1 else stride, dilation)
            y = self.conv_norm(f"{path}/conv3", y, relu=False)
        if y.shape != x.shape:
            x = self.conv_norm(f"{path}/projection", x, stride, relu=False)
        return np.maximum(x + y, 0)

    def backbone(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns the outputs of the four stages."""
        for i in range(1 if self.model.stem == "conv7" else 3):
            x = self.conv_norm(f"backbone/stem_conv{i + 1}", x, 2 if i == 0 else 1)
        x = max_pool_3x3_stride_2(x)
        outputs, output_stride, dilation = [], 4, 1
        for stage, blocks in enumerate(BLOCKS[self.model.depth]):
            stride, first_dilation = 1, dilation
            if stage > 0 and output_stride < self.model.output_stride:
                stride, output_stride = 2, 2 * output_stride
            elif stage > 0:
                first_dilation = dilation if self.model.first_block_dilation == "half" else 2 * dilation
                dilation *= 2
            for i in range(blocks):
                path = f"backbone/layer{stage + 1}_block{i}"
                x = self.block(path, x, *((stride, first_dilation) if i == 0 else (1, dilation)))
            outputs.append(x)
        return outputs

    def head(self, x: np.ndarray) -> np.ndarray:
        """Computes the pyramid, the concatenation and the head up to its classifier."""
        height, width = x.shape[1:3]
        inputs = [x]
        for i, bins in enumerate(self.model.bins):
            pooled = adaptive_pool(x, bins, {"average": "mean", "max": "max"}[self.model.pool])
            level = self.conv_norm(f"pyramid/level{i}", pooled)
            inputs.append(resize(level, height, width, self.model.align_corners))
        y = convolve(np.concatenate(inputs, -1), self.weights["head_conv/kernel"])
        return np.maximum(self.batch_norm("head_bn", y), 0)

    def classify(self, path: str, x: np.ndarray, height: int, width: int) -> np.ndarray:
        scores = x @ self.weights[f"{path}/kernel"][0, 0] + self.weights[f"{path}/bias"]
        return resize(scores, height, width, self.model.align_corners)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """f64[N, H, W, 3] -> logits f64[N, H, W, K], and the auxiliary head's in training if there is one."""
        height, width = images.shape[1:3]
        *_, third, fourth = self.backbone(images.astype(np.float64))
        logits = self.classify("classifier", self.head(fourth), height, width)
        if not (self.train and self.model.auxiliary):
            return logits, None
        third = self.conv_norm("auxiliary_conv", third)
        return logits, self.classify("auxiliary_classifier", third, height, width)


def random_variables(module: nn.Module, *args: object) -> dict:
    """Returns random f32 weights and running statistics, none at a neutral value; args are those of the module's call."""
    random = np.random.default_rng(0)

    def random_value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            return random.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return random.normal(0, 0.3, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(random_value, shapes)


def relative_error(value: jax.Array, expected: jax.Array | np.ndarray) -> float:
    """Returns the largest difference in standard deviations of the expected values, in float64."""
    exact = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(value, np.float64) - exact).max() / exact.std())
