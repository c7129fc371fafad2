"""Whose a checkpoint is and what network it holds: recognized by its keys, read off its shapes and metadata."""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pspnet_jax import datasets
from pspnet_jax.models.resnet import BASIC_DEPTHS, BLOCKS, STEMS
from pspnet_jax.weights import caffe, mmseg, pytorch
from pspnet_jax.weights.names import KINDS

READERS: dict[str, Callable[[str], tuple[pytorch.Arrays, Mapping[str, Any]]]] = {
    ".pth": pytorch.read_torch,
    ".pt": pytorch.read_torch,
    ".bin": pytorch.read_torch,
    ".tar": pytorch.read_torch,
    ".safetensors": pytorch.read_safetensors,
    ".caffemodel": lambda path: (caffe.read(path), {}),
}
Shape = Callable[[str], tuple[int, ...]]  # of the file's array for a path of ours; () where there is none


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
      path: the file.
      kind: its family, a key of names.KINDS.
      model: the fields of config.model that the network has; None where the file does not tell.
      num_classes: K, or None for a backbone alone.
      normalize: config.normalize, as it was trained.
      evaluation: the fields of config.eval that its published numbers were made with.
      class_names: K names, or none where the file has none.
      colors: K colors, or none where the file has none.
    """

    path: str
    kind: str
    model: Mapping[str, Any]
    num_classes: int | None
    normalize: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    colors: tuple[datasets.Color, ...] = ()

    def __str__(self) -> str:
        classes = "backbone only" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{self.path}: {KINDS[self.kind].title}, depth {self.model['depth']}, {classes}"

    def key(self, path: str) -> str | None:
        """The file's key for "params/backbone/..." and so on; None where its family has no such array."""
        return KINDS[self.kind].key(path, self.model.get("bins") or (), self.model["depth"])


def inspect(path: str | os.PathLike) -> Source:
    """Recognizes a checkpoint.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, its family is unknown, or its network is no ResNet or PSPNet.
    """
    return read(path)[0]


def read(path: str | os.PathLike) -> tuple[Source, pytorch.Arrays]:
    """Recognizes a checkpoint as `inspect` does, and returns its arrays too."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: {'is a directory' if file.is_dir() else 'no such file'}; expected a checkpoint ({', '.join(READERS)})"
        )
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{file}: not a checkpoint by its name, which has to end in one of {', '.join(READERS)}")
    arrays, metadata = READERS[file.suffix.lower()](str(file))
    return _describe(file, arrays, metadata), arrays


def _describe(file: pathlib.Path, arrays: pytorch.Arrays, metadata: Mapping[str, Any]) -> Source:
    family = _family(file, arrays)
    kind, bins = KINDS[family], _caffe_bins(arrays)

    def shape(path: str, depth: int = 50) -> tuple[int, ...]:
        key = kind.key(f"params/{path}", bins, depth)
        return arrays[key].shape if key in arrays else ()

    depth = _depth(file, shape)
    model = {**kind.model, "depth": depth, "stem": _stem(file, shape)}
    if not kind.protocol:
        return Source(str(file), family, model, None, kind.normalize, {})
    if not shape("classifier/bias"):
        raise ValueError(f"{file}: {kind.title}, but without its classifier, {kind.key('params/classifier/bias', bins, depth)}")
    num_classes, text, normalize = shape("classifier/bias")[0], "", kind.normalize
    model["auxiliary"] = bool(shape("auxiliary_classifier/bias", depth))
    if kind.protocol == "caffe":
        model |= {"bins": bins, "stride_in": caffe.STRIDE_IN.get(depth)}
    else:
        model["bins"] = _bins(shape)
    if kind.protocol == "mmseg":
        text = mmseg.config_text(metadata, file.name)
        model |= mmseg.model_fields(file, text)
        normalize = normalize | mmseg.normalize_fields(text)
    evaluation = _evaluation(kind.protocol, num_classes, text)
    return Source(str(file), family, model, num_classes, normalize, evaluation, *_classes(metadata, num_classes))


def _family(file: pathlib.Path, arrays: pytorch.Arrays) -> str:
    for family, kind in KINDS.items():
        paths = (f"params/backbone/{module}/conv/kernel" for module in ("stem_conv1", "layer1_block0/conv1"))
        if all(kind.key(path, (), 50) in arrays for path in paths):
            return family
    raise ValueError(
        f"{file}: holds none of the networks that can be imported: ResNets of torchvision, timm (but not ResNet-C, -D, -T) "
        f"and semseg; PSPNets of semseg, mmsegmentation and Caffe. Its keys are {', '.join([*sorted(arrays)[:3], '...'])}"
    )


def _depth(file: pathlib.Path, shape: Shape) -> int:
    """By the number of blocks in each stage, and of convolutions in a block."""

    def kernel(module: str) -> tuple[int, ...]:
        return shape(f"backbone/{module}/conv/kernel")

    blocks = tuple(next(b for b in itertools.count() if not kernel(f"layer{s}_block{b}/conv1")) for s in range(1, 5))
    basic = not kernel("layer1_block0/conv3")
    if kernel("layer1_block0/conv1")[:1] != (64,) or kernel("layer1_block0/conv2") != (64, 64, 3, 3):
        raise ValueError(f"{file}: its blocks are grouped or wide (ResNeXt, Wide ResNet), which this network has not")
    for depth, expected in BLOCKS.items():
        if blocks == expected and basic == (depth in BASIC_DEPTHS):
            return depth
    raise ValueError(
        f"{file}: {blocks} {'basic blocks' if basic else 'bottlenecks'} in its stages; expected a ResNet of depth "
        f"{', '.join(map(str, BLOCKS))}"
    )


def _stem(file: pathlib.Path, shape: Shape) -> str:
    """By the first kernel."""
    first = shape("backbone/stem_conv1/conv/kernel")
    for stem, ((size, multiple), *_) in STEMS.items():
        if first == (64 * multiple, 3, size, size):
            return stem
    raise ValueError(f"{file}: its first kernel is {first}; expected (64, 3, 3, 3), (32, 3, 3, 3) or (64, 3, 7, 7)")


def _bins(shape: Shape) -> tuple[int, ...] | None:
    """By the number of levels, since nothing else tells."""
    levels = next(i for i in itertools.count() if not shape(f"pyramid/level{i}/conv/kernel"))
    return {0: (), 4: (1, 2, 3, 6)}.get(levels)


def _caffe_bins(arrays: pytorch.Arrays) -> tuple[int, ...]:
    """By the layers' names, in the order of the release's concatenation."""
    found = (re.fullmatch(r"conv5_3_pool(\d+)_conv:0", key) for key in arrays)
    return tuple(sorted((int(match[1]) for match in found if match), reverse=True))


def _evaluation(protocol: str, num_classes: int, text: str) -> dict[str, Any]:
    if protocol == "mmseg":
        return mmseg.evaluation_fields(text, num_classes)
    crop, base_size = (713, 2048) if num_classes == 19 else (473, 512)  # Cityscapes; ADE20K and VOC
    windows = {"inference": "windows", "crop": (crop, crop), "stride": (0, 0), "base_size": base_size, "short_size": 0}
    return {"protocol": protocol, **windows, "scales": (1.0,), "flip": True}


def _classes(metadata: Mapping[str, Any], num_classes: int) -> tuple[tuple[str, ...], tuple[datasets.Color, ...]]:
    """The metadata's names and colors, each only where they are that, and K of them."""

    def is_color(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int) and 0 <= v < 256 for v in value)

    names, colors = (values if isinstance(values, list | tuple) else () for values in mmseg.classes(metadata))
    names_fit = len(names) == num_classes and all(isinstance(name, str) for name in names)
    colors_fit = len(colors) == num_classes and all(map(is_color, colors))
    return tuple(name.strip() for name in names if names_fit), tuple((r, g, b) for r, g, b in (colors if colors_fit else ()))
