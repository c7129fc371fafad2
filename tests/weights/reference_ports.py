"""PSPNet as its ports to Keras and TensorFlow run it, an interpreter of TensorFlow's layers, and writers of the ports' files.

They follow the ports (layer names, paddings, strides, order of the concatenation) and TensorFlow's documentation, and share no
code with the package. A layer gets random weights when it first runs, as in `reference_caffe`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import h5py
import numpy as np
import torch
from torch.nn import functional

from tests.weights import reference_caffe

Layers = dict[str, dict[str, np.ndarray]]  # {layer: {"weights": HWIO, "biases": ...}}, as caffe-tensorflow calls them
KERAS = {"weights": "kernel", "biases": "bias"}
BATCH_NORM = {"scale": "gamma", "offset": "beta", "mean": "moving_mean", "variance": "moving_variance"}


def same(x: torch.Tensor, size: int, stride: int, dilation: int = 1, value: float = 0) -> torch.Tensor:
    """Pads as TensorFlow does for padding="SAME": with one more below and to the right if the number is odd."""
    pads = []
    for length in (x.shape[3], x.shape[2]):
        total = max((-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value)


@dataclasses.dataclass
class Interpreter:
    """TensorFlow's layers in inference. Tensors are [N, C, H, W]; a layer that runs for the first time is added to `layers`."""

    layers: Layers = dataclasses.field(default_factory=dict)
    random: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))

    def conv(
        self,
        name: str,
        x: torch.Tensor,
        channels: int,
        size: int,
        stride: int = 1,
        dilation: int = 1,
        bias=False,
        padding="VALID",
    ) -> torch.Tensor:
        if name not in self.layers:
            blobs = reference_caffe.random_convolution(self.random, x, channels, size, bias)
            self.layers[name] = dict(zip(("weights", "biases"), (blobs[0].transpose(2, 3, 1, 0), *blobs[1:]), strict=False))
        kernel, *biases = self.layers[name].values()
        x = same(x, size, stride, dilation) if padding.upper() == "SAME" else x
        kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        return functional.conv2d(x, kernel, *map(torch.from_numpy, biases), stride=stride, dilation=dilation)

    def batch_norm(self, name: str, x: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
        if name not in self.layers:
            self.layers[name] = dict(zip(BATCH_NORM, reference_caffe.random_batch_norm(self.random, x), strict=True))
        return reference_caffe.batch_norm(x, self.layers[name].values(), epsilon)

    def zero_padding(self, x: torch.Tensor, pad: int) -> torch.Tensor:
        return functional.pad(x, [pad] * 4)

    def max_pool(self, x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
        """With padding="SAME"."""
        return functional.max_pool2d(same(x, size, stride, value=-torch.inf), size, stride)

    def average_pool(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Of cells next to each other; what is left at the bottom and right is ignored (padding="VALID")."""
        return functional.avg_pool2d(x, size, size)

    def resize(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=True)


def pspnet(run: Interpreter, images: np.ndarray, num_classes: int, blocks: Sequence[int] = (3, 4, 6, 3)) -> np.ndarray:
    """The ports' network: u8[N, H, W, 3] in RGB order -> logits f32[N, H, W, K]; H and W are equal and divisible by 48 - 7."""

    def conv_bn(name: str, x: torch.Tensor, *shape: int, padding: str = "VALID") -> torch.Tensor:
        return run.batch_norm(f"{name}_bn", run.conv(name, x, *shape, padding=padding))

    bgr = images[..., ::-1] - np.array(reference_caffe.MEAN_BGR, np.float32)
    x = torch.from_numpy(bgr.transpose(0, 3, 1, 2).astype(np.float32, order="C"))
    for name, channels, stride in (("conv1_1_3x3_s2", 64, 2), ("conv1_2_3x3", 64, 1), ("conv1_3_3x3", 128, 1)):
        x = conv_bn(name, x, channels, 3, stride, padding="SAME").relu()
    x = run.max_pool(x, 3, 2)
    for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
        channels = 64 * 2**stage
        for i in range(blocks[stage]):
            name, stride = f"conv{stage + 2}_{i + 1}", stride if i == 0 else 1
            y = conv_bn(f"{name}_1x1_reduce", x, channels, 1, stride).relu()
            y = conv_bn(f"{name}_3x3", run.zero_padding(y, dilation), channels, 3, 1, dilation).relu()
            y = conv_bn(f"{name}_1x1_increase", y, 4 * channels, 1)
            x = (y + (conv_bn(f"{name}_1x1_proj", x, 4 * channels, 1, stride) if i == 0 else x)).relu()
    inputs = [x]
    for bins in (6, 3, 2, 1):
        level = run.average_pool(x, x.shape[2] // bins)
        inputs.append(run.resize(conv_bn(f"conv5_3_pool{bins}_conv", level, 512, 1).relu(), x.shape[2:]))
    y = conv_bn("conv5_4", torch.cat(inputs, 1), 512, 3, padding="SAME").relu()
    y = run.resize(run.conv("conv6", y, num_classes, 1, bias=True), images.shape[1:3])
    return y.permute(0, 2, 3, 1).numpy()


def write_h5(path: pathlib.Path, layers: Layers, whole: bool = False) -> None:
    """Writes what Keras 2 writes by save_weights or, if `whole`, by save: also with the optimizer's state."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole else file
        root.attrs["layer_names"] = [name.encode() for name in ("input_1", *layers)]
        root.create_group("input_1").attrs["weight_names"] = []
        for name, arrays in layers.items():
            keras = {(KERAS | BATCH_NORM)[key]: array for key, array in arrays.items()}
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in keras]
            for key, array in keras.items():
                group[f"{name}/{key}:0"] = array if key == "kernel" else array.ravel()
        if whole:
            file["optimizer_weights/training/SGD/iterations:0"] = np.int64(7)


def write_npy(path: pathlib.Path, layers: Layers) -> None:
    """Writes what the Keras port's weight_converter.py writes: the blobs of Caffe's BN keep their four dimensions."""
    np.save(path, np.asarray(layers), allow_pickle=True)


def variables(layers: Layers, old: bool = False) -> dict[str, np.ndarray]:
    """Returns the variables of the TensorFlow port, with a momentum; `old`: as before it used tf.layers for batch norm."""
    found = {"global_step": np.int64(7), "conv6/weights/Momentum": layers["conv6"]["weights"]}
    for name, arrays in layers.items():
        for key, array in arrays.items():
            found[f"{name}/{key if old else BATCH_NORM.get(key, key)}"] = array if key == "weights" else array.ravel()
    return found


def write_checkpoint(path: pathlib.Path, arrays: dict[str, np.ndarray], one_file: bool = False) -> None:
    """Writes NAME.index and NAME.data-00000-of-00001 or, in the old format, NAME alone."""
    import tensorflow as tf

    names, tensors = list(arrays), [tf.constant(array) for array in arrays.values()]
    if one_file:
        tf.raw_ops.Save(filename=str(path), tensor_names=names, data=tensors)
    else:
        tf.raw_ops.SaveV2(prefix=str(path), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
