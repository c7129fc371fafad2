"""Runs the networks of the Keras and TensorFlow ports, and compares them with our import of the same random weights.

git clone https://github.com/Vladkryvoruchko/PSPNet-Keras-tensorflow
git clone https://github.com/hellochick/PSPNet-tensorflow
python -m benchmarks.ports --keras PSPNet-Keras-tensorflow --tensorflow PSPNet-tensorflow

The ports' own files build the networks, but with modules of this program in the place of Keras and TensorFlow 1, which run each
layer at once and know nothing of PSPNet: an option that they lack is an error. The random weights are written in the ports'
formats and imported. At depth 101, the ports have the stride in another convolution than Caffe: model.stride_in is set to it.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import platform
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.prototxt import tiles
from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from tests.weights import reference_caffe, reference_ports

SIZES = {"keras": ((50, 150, 473), (101, 19, 713)), "tensorflow": ((50, 150, 473), (101, 19, 713), (101, 19, 720))}


@contextlib.contextmanager
def stand_ins(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Puts modules with these contents in the place of those that a port imports."""
    made = {}
    for name, contents in modules.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(contents)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module:
                sys.modules[name] = module


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keras(path: pathlib.Path, run: reference_ports.Interpreter, x: torch.Tensor, depth: int, classes: int) -> torch.Tensor:
    """Runs layers_builder.py. Its last layer is a softmax, before which the result is taken."""

    class Layer:
        def __init__(self, **ignored: Any):
            pass

        def build(self, shape: Any) -> None:
            pass

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            self.build(None)
            return self.call(x)

    def conv(
        channels: int, size: tuple[int, int], *, strides=(1, 1), name: str, padding="valid", dilation_rate=1, use_bias=True
    ) -> Callable:
        return lambda x: run.conv(name, x, channels, size[0], strides[0], dilation_rate, use_bias, padding)

    def max_pooling(*, pool_size: tuple[int, int], padding: str, strides: tuple[int, int]) -> Callable:
        assert padding == "same"
        return lambda x: run.max_pool(x, pool_size[0], strides[0])

    def average_pooling(size: tuple[int, int], *, strides: tuple[int, int]) -> Callable:
        assert size == strides
        return lambda x: run.average_pool(x, size[0])

    def resize_images(x: torch.Tensor, size: Sequence[int], *, align_corners: bool) -> torch.Tensor:
        assert align_corners
        return run.resize(x, size)

    class Model:
        def __init__(self, *, inputs: Any, outputs: torch.Tensor):
            self.outputs = outputs

        def compile(self, *ignored: Any, **options: Any) -> None:
            pass

    tf = types.SimpleNamespace(image=types.SimpleNamespace(resize_images=resize_images))
    kinds = {
        "Layer": Layer,
        "Input": lambda shape: x,
        "Conv2D": conv,
        "MaxPooling2D": max_pooling,
        "AveragePooling2D": average_pooling,
        "BatchNormalization": lambda *, momentum, name, epsilon: lambda x: run.batch_norm(name, x, epsilon),
        "Activation": lambda kind: {"relu": torch.relu, "softmax": lambda x: x}[kind],
        "Dropout": lambda rate: lambda x: x,
        "ZeroPadding2D": lambda *, padding: lambda x: run.zero_padding(x, padding[0]),
        "Lambda": None,
    }
    modules = {
        "keras": {"layers": types.SimpleNamespace(**kinds)},
        "keras.layers": kinds,
        "keras.layers.merge": {"Concatenate": lambda: lambda xs: torch.cat(xs, 1), "Add": lambda: sum},
        "keras.models": {"Model": Model},
        "keras.optimizers": {"SGD": lambda **options: None},
        "keras.backend": {"tf": tf},
        "tensorflow": {},
    }
    with stand_ins(modules):
        return load(path / "layers_builder.py").build_pspnet(classes, depth, tuple(x.shape[2:])).outputs


def tensorflow(path: pathlib.Path, run: reference_ports.Interpreter, x: torch.Tensor, depth: int, classes: int) -> torch.Tensor:
    """Runs model.py, whose methods in network.py are replaced, and resizes the logits as inference.py does."""

    class Network:
        def __init__(self) -> None:
            self.layers, self.inputs = {"data": x}, [x]
            self.setup(False, classes)

        def feed(self, *names: str) -> "Network":
            self.inputs = [self.layers[name] for name in names]
            return self

        def add_layer(self, name: str, x: torch.Tensor) -> "Network":
            self.layers[name] = x
            self.inputs = [x]
            return self

        def conv(
            self, height, width, channels, stride_y, stride_x, *, biased, relu, name, padding="VALID", dilation=1
        ) -> "Network":
            assert height == width
            assert stride_y == stride_x
            y = run.conv(name, *self.inputs, channels, height, stride_y, dilation, biased, padding)
            return self.add_layer(name, y.relu() if relu else y)

        def atrous_conv(self, height, width, channels, dilation, *, biased, relu, name) -> "Network":
            return self.conv(height, width, channels, 1, 1, biased=biased, relu=relu, name=name, dilation=dilation)

        def batch_normalization(self, *, relu: bool, name: str) -> "Network":
            y = run.batch_norm(name, *self.inputs)  # with the epsilon of 1e-5 in network.py
            return self.add_layer(name, y.relu() if relu else y)

        def relu(self, *, name: str) -> "Network":
            return self.add_layer(name, self.inputs[0].relu())

        def zero_padding(self, *, paddings: int, name: str) -> "Network":
            return self.add_layer(name, run.zero_padding(*self.inputs, paddings))

        def max_pool(self, height, width, stride_y, stride_x, *, padding, name) -> "Network":
            assert (height, stride_y, padding) == (width, stride_x, "SAME")
            return self.add_layer(name, run.max_pool(*self.inputs, height, stride_y))

        def avg_pool(self, height, width, stride_y, stride_x, *, name) -> "Network":
            assert height == width == stride_y == stride_x
            return self.add_layer(name, run.average_pool(*self.inputs, height))

        def resize_bilinear(self, size: Sequence[int], *, name: str) -> "Network":
            return self.add_layer(name, run.resize(*self.inputs, size))

        def add(self, *, name: str) -> "Network":
            return self.add_layer(name, sum(self.inputs))

        def concat(self, *, axis: int, name: str) -> "Network":
            assert axis == -1
            return self.add_layer(name, torch.cat(self.inputs, 1))

    def shape(x: torch.Tensor) -> tuple[int, ...]:
        return (x.shape[0], *x.shape[2:], x.shape[1])

    with stand_ins({"network": {"Network": Network}, "tensorflow": {"shape": shape}}):
        network = getattr(load(path / "model.py"), f"PSPNet{depth}")()
    return run.resize(network.layers["conv6"], x.shape[2:])


def compare(port: Callable, path: pathlib.Path, depth: int, classes: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    image, run = tiles(random, size, size), reference_ports.Interpreter(random=random)
    bgr = (image[..., ::-1] - np.array(reference_caffe.MEAN_BGR, np.float32)).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = port(path, run, torch.from_numpy(bgr.copy()), depth, classes).permute(0, 2, 3, 1).numpy()
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / f"pspnet{depth}"
        if port is keras:
            reference_ports.write_h5(file := file.with_suffix(".h5"), run.layers)
        elif depth == 50:
            reference_ports.write_npy(file := file.with_suffix(".npy"), run.layers)
        else:
            reference_ports.write_checkpoint(file, reference_ports.variables(run.layers))
        config, source = base_config(), weights.inspect(file)
        weights.configure(config, source)
        config.model.stride_in = "conv1x1"
        model = models.build(config.model, classes)
        variables = weights.load(file, model)
    apply = jax.jit(model.apply, static_argnames="train")
    logits = np.asarray(apply(variables, models.normalize(image, config.normalize), train=False))
    error = np.abs(logits - expected).max() / expected.std()
    equal = (logits.argmax(-1) == expected.argmax(-1)).mean()
    kind = "" if depth == 50 else ", model.stride_in=conv1x1"
    print(
        f"{port.__name__}, {source.family.title}, depth {depth}, {size}x{size}, {len(run.layers)} layers in {file.name}{kind}"
    )
    print(f"  max |difference| / std of logits {error:.1e}, equal argmax {equal:.4%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keras", type=pathlib.Path)
    parser.add_argument("--tensorflow", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    for port in (keras, tensorflow):
        for depth, classes, size in SIZES[port.__name__] if (path := getattr(arguments, port.__name__)) else ():
            compare(port, path, depth, classes, size, arguments.seed)


if __name__ == "__main__":
    main()
