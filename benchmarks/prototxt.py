"""Runs a Caffe network from its prototxt, and compares it with our import of the same random weights.

git clone https://github.com/hszhao/PSPNet
python -m benchmarks.prototxt --prototxt PSPNet/evaluation/prototxt/*.prototxt

This program contains nothing specific to PSPNet: it runs the layers in the order of the file, with the names, bottoms, tops and
options given there, and fails on a layer or option that it does not know. Each layer gets random weights when it runs; they are
written to a .caffemodel, which is then imported.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import platform
import re
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
import torch
from torch.nn import functional

from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from tests.weights import reference_caffe

TOKENS = re.compile(r'#.*|"[^"]*"|[{}]|[^\s{}:]+')


def parse(tokens: Iterator[str]) -> dict[str, list]:
    """Parses a message in protobuf's text format up to its closing brace; returns the list of values of each field."""
    message: dict[str, list] = collections.defaultdict(list)
    for name in tokens:
        if name == "}":
            break
        value = next(tokens)
        if value == "{":
            message[name].append(parse(tokens))
        else:
            message[name].append(int(value) if re.fullmatch(r"-?\d+", value) else value.strip('"'))
    return message


def interpolate(x: torch.Tensor, axis: int, new_size: int) -> torch.Tensor:
    """Interpolates linearly along one axis, with aligned corners and float32 positions (src/caffe/util/interp.cpp)."""
    size = x.shape[axis]
    at = np.arange(new_size, dtype=np.float32) * np.float32((size - 1) / max(new_size - 1, 1))
    low = at.astype(int)
    shape = [new_size if i == axis else 1 for i in range(4)]
    fraction = torch.from_numpy(at - low.astype(np.float32)).reshape(shape)
    low, high = torch.from_numpy(low), torch.from_numpy(np.minimum(low + 1, size - 1))
    return x.index_select(axis, low) * (1 - fraction) + x.index_select(axis, high) * fraction


@dataclasses.dataclass
class Layers:
    """Caffe's layers in the test phase. Tensors are [N, C, H, W]; options and defaults are those of caffe.proto."""

    random: np.random.Generator
    blobs: reference_caffe.Blobs = dataclasses.field(default_factory=dict)

    def convolution(
        self, name, x, *, num_output, kernel_size, stride=1, pad=0, dilation=1, bias_term="true", weight_filler=None
    ):
        self.blobs[name] = reference_caffe.random_convolution(self.random, x, num_output, kernel_size, bias_term == "true")
        return functional.conv2d(x, *map(torch.from_numpy, self.blobs[name]), stride=stride, padding=pad, dilation=dilation)

    def bn(self, name, x, *, eps=1e-5, frozen="false", momentum=0.9, slope_filler=None, bias_filler=None):
        self.blobs[name] = reference_caffe.random_batch_norm(self.random, x)
        return reference_caffe.batch_norm(x, self.blobs[name], float(eps))

    def relu(self, name, x):
        return x.relu()

    def dropout(self, name, x, *, dropout_ratio=0.5):
        return x

    def eltwise(self, name, *inputs, operation="SUM"):
        assert operation == "SUM"
        return functools.reduce(torch.add, inputs)

    def concat(self, name, *inputs):
        return torch.cat(inputs, 1)

    def pooling(self, name, x, *, pool="MAX", kernel_size, stride=1, pad=0):
        assert stride <= kernel_size  # then torch's ceil_mode rounds like src/caffe/layers/pooling_layer.cpp
        pooling = {"MAX": functional.max_pool2d, "AVE": functional.avg_pool2d}[pool]
        return pooling(x, kernel_size, stride, pad, ceil_mode=True)

    def interp(self, name, x, *, height=0, width=0, zoom_factor=0, shrink_factor=0):
        sizes = [height, width]
        if zoom_factor or shrink_factor:
            sizes = [(size - 1) // (shrink_factor or 1) * (zoom_factor or 1) + 1 for size in x.shape[2:]]
        return interpolate(interpolate(x, 2, sizes[0]), 3, sizes[1])


def run(network: dict[str, list], layers: Layers, x: torch.Tensor) -> torch.Tensor:
    """Runs all layers in the file's order and returns the top of the last one. Frees tensors that no later layer reads."""
    tops = {network["input"][0]: x}
    last_reader = {bottom: i for i, layer in enumerate(network["layer"]) for bottom in layer["bottom"]}
    for i, layer in enumerate(network["layer"]):
        kind = layer["type"][0].lower()
        options = {option: values[0] for part in layer[f"{kind}_param"] for option, values in part.items()}
        inputs = [tops[bottom] for bottom in layer["bottom"]]
        (top,) = layer["top"]
        tops[top] = x = getattr(layers, kind)(layer["name"][0], *inputs, **options)
        tops = {name: value for name, value in tops.items() if last_reader.get(name, 0) > i}
    return x


def tiles(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns an image of noisy colored tiles, u8[1, H, W, 3], so that all cells of a pyramid level differ."""
    coarse = random.integers(0, 192, (1, 9, 9, 3)).repeat(-(-height // 9), 1).repeat(-(-width // 9), 2)
    return (coarse[:, :height, :width] + random.integers(0, 64, (1, height, width, 3))).astype(np.uint8)


def imported_logits(path: pathlib.Path, image: np.ndarray) -> np.ndarray:
    """Returns our logits of an image u8[1, H, W, 3], with the config and weights from the file."""
    config = base_config()
    source = weights.inspect(path)
    weights.configure(config, source)
    model = models.build(config.model, source.num_classes)
    variables = weights.load(path, model)
    inputs = models.normalize(image, config.normalize)
    return np.asarray(jax.jit(model.apply, static_argnames="train")(variables, inputs, train=False))


def compare(path: pathlib.Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    network = parse(iter(t for t in TOKENS.findall(path.read_text()) if not t.startswith("#")))
    image = tiles(random, *network["input_dim"][2:])
    bgr = (image[..., ::-1] - np.array(reference_caffe.MEAN_BGR, np.float32)).astype(np.float32).transpose(0, 3, 1, 2)
    layers = Layers(random)
    start = time.perf_counter()
    with torch.inference_mode():
        expected = run(network, layers, torch.from_numpy(bgr.copy())).permute(0, 2, 3, 1).numpy()
    seconds = [time.perf_counter() - start]
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / f"{path.stem}.caffemodel"
        reference_caffe.write(file, layers.blobs)
        start = time.perf_counter()
        logits = imported_logits(file, image)
        seconds.append(time.perf_counter() - start)
    error = np.abs(logits - expected).max() / expected.std()
    classes = expected.argmax(-1)
    equal = (logits.argmax(-1) == classes).mean()
    kinds = collections.Counter(layer["type"][0] for layer in network["layer"])
    print(f"{path.name}: {len(network['layer'])} layers ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
    print(f"  {logits.shape[-1]} classes, {len(np.unique(classes))} of them with the highest logit somewhere")
    print(f"  max |difference| / std of logits {error:.1e}, equal argmax {equal:.4%}")
    print(f"  interpreter {seconds[0]:.1f} s, import and our network (compiling included) {seconds[1]:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototxt", type=pathlib.Path, nargs="+", action="extend", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    for path in arguments.prototxt:
        compare(path, arguments.seed)


if __name__ == "__main__":
    main()
