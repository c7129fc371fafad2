"""The family of a checkpoint and the network it holds, detected from the names and shapes of its arrays and its metadata."""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pspnet_jax import datasets
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.models.resnet import BASIC_DEPTHS, BLOCKS, STEMS
from pspnet_jax.weights import caffe, mmseg, pytorch
from pspnet_jax.weights.names import FAMILIES, Family

READERS: dict[str, Callable[[str], tuple[pytorch.Arrays, Mapping[str, Any]]]] = {
    ".pth": pytorch.read_torch,
    ".pt": pytorch.read_torch,
    ".bin": pytorch.read_torch,
    ".tar": pytorch.read_torch,
    ".safetensors": pytorch.read_safetensors,
    ".caffemodel": lambda path: (caffe.read(path), {}),
}
# Our path of an array -> its shape in the file, () where there is none.
ShapeOf = Callable[[str], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds."""

    path: str
    family: Family  # whose names its arrays have
    model: Mapping[str, Any]  # the fields of config.model that the network has; None where the file does not tell
    num_classes: int | None  # K, or None for a backbone alone
    normalize: Mapping[str, Any]  # config.normalize, as it was trained
    evaluation: Mapping[str, Any]  # the fields of config.eval that its published numbers were made with
    class_names: tuple[str, ...] = ()  # K of them, or none where the file has none
    colors: tuple[datasets.Color, ...] = ()  # likewise

    def __str__(self) -> str:
        classes = "backbone only" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{self.path}: {self.family.title}, depth {self.model['depth']}, {classes}"

    def key(self, path: str) -> str | None:
        """The file's key for "params/backbone/..." and so on; None where its family has no such array."""
        return self.family.key(path, self.model.get("bins") or (), self.model["depth"])


def inspect(path: str | os.PathLike) -> Source:
    """Recognizes a checkpoint.

    Raises:
      MissingFileError: there is no such file.
      UserError: it cannot be read, its family is unknown, or its network is no ResNet or PSPNet.
    """
    return read(path)[0]


def read(path: str | os.PathLike) -> tuple[Source, pytorch.Arrays]:
    """Recognizes a checkpoint as `inspect` does, and returns its arrays too."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise MissingFileError(
            f"{file}: {'is a directory' if file.is_dir() else 'no such file'}; expected a checkpoint ({', '.join(READERS)})"
        )
    if file.suffix.lower() not in READERS:
        raise UserError(f"{file}: not a checkpoint by its name, which has to end in one of {', '.join(READERS)}")
    arrays, metadata = READERS[file.suffix.lower()](str(file))
    return _describe(file, arrays, metadata), arrays


def _describe(file: pathlib.Path, arrays: pytorch.Arrays, metadata: Mapping[str, Any]) -> Source:
    family, bins = _family(file, arrays), _caffe_bins(arrays)

    def shape(path: str, depth: int = 50) -> tuple[int, ...]:
        key = family.key(f"params/{path}", bins, depth)
        return arrays[key].shape if key in arrays else ()

    depth = _depth(file, shape)
    model = {**family.model, "depth": depth, "stem": _stem(file, shape)}
    if not family.protocol:
        return Source(str(file), family, model, None, family.normalize, {})
    if not shape("classifier/bias"):
        missing = family.key("params/classifier/bias", bins, depth)
        raise UserError(f"{file}: {family.title}, but without its classifier, {missing}")
    num_classes, normalize = shape("classifier/bias")[0], family.normalize
    model["auxiliary"] = bool(shape("auxiliary_classifier/bias", depth))
    if family.protocol == "caffe":
        model |= {"bins": bins, "stride_in": caffe.STRIDE_IN.get(depth)}
    else:
        model["bins"] = _bins(shape)
    if family.protocol == "mmseg":
        settings = mmseg.settings(metadata, file.name)
        model |= mmseg.model_fields(file, settings)
        normalize = normalize | mmseg.normalize_fields(settings)
        evaluation = mmseg.evaluation_fields(settings, num_classes)
    else:
        evaluation = _evaluation(family.protocol, num_classes)
    return Source(str(file), family, model, num_classes, normalize, evaluation, *_classes(metadata, num_classes))


def _family(file: pathlib.Path, arrays: pytorch.Arrays) -> Family:
    for family in FAMILIES.values():
        paths = (f"params/backbone/{module}/conv/kernel" for module in ("stem_conv1", "layer1_block0/conv1"))
        if all(family.key(path, (), 50) in arrays for path in paths):
            return family
    raise UserError(
        f"{file}: holds none of the networks that can be imported: ResNets of torchvision, timm (but not ResNet-C, -D, -T) "
        f"and semseg; PSPNets of semseg, mmsegmentation and Caffe. Its keys are {', '.join([*sorted(arrays)[:3], '...'])}"
    )


def _depth(file: pathlib.Path, shape: ShapeOf) -> int:
    """By the number of blocks in each stage, and of convolutions in a block."""

    def kernel(module: str) -> tuple[int, ...]:
        return shape(f"backbone/{module}/conv/kernel")

    blocks = tuple(next(b for b in itertools.count() if not kernel(f"layer{s}_block{b}/conv1")) for s in range(1, 5))
    basic = not kernel("layer1_block0/conv3")
    if kernel("layer1_block0/conv1")[:1] != (64,) or kernel("layer1_block0/conv2") != (64, 64, 3, 3):
        raise UserError(f"{file}: its blocks are grouped or wide (ResNeXt, Wide ResNet), which this network has not")
    for depth, expected in BLOCKS.items():
        if blocks == expected and basic == (depth in BASIC_DEPTHS):
            return depth
    raise UserError(
        f"{file}: {blocks} {'basic blocks' if basic else 'bottlenecks'} in its stages; expected a ResNet of depth "
        f"{', '.join(map(str, BLOCKS))}"
    )


def _stem(file: pathlib.Path, shape: ShapeOf) -> str:
    """By the first kernel."""
    first = shape("backbone/stem_conv1/conv/kernel")
    for stem, ((size, multiple), *_) in STEMS.items():
        if first == (64 * multiple, 3, size, size):
            return stem
    raise UserError(f"{file}: its first kernel is {first}; expected (64, 3, 3, 3), (32, 3, 3, 3) or (64, 3, 7, 7)")


def _bins(shape: ShapeOf) -> tuple[int, ...] | None:
    """By the number of levels, since nothing else tells."""
    levels = next(i for i in itertools.count() if not shape(f"pyramid/level{i}/conv/kernel"))
    return {0: (), 4: (1, 2, 3, 6)}.get(levels)


def _caffe_bins(arrays: pytorch.Arrays) -> tuple[int, ...]:
    """By the layers' names, in the order of the release's concatenation."""
    found = (re.fullmatch(r"conv5_3_pool(\d+)_conv:0", key) for key in arrays)
    return tuple(sorted((int(match[1]) for match in found if match), reverse=True))


def _evaluation(protocol: str, num_classes: int) -> dict[str, Any]:
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
