"""The family of a checkpoint and the network it holds, detected from the names and shapes of its arrays and its metadata."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from pspnet_jax import datasets, files
from pspnet_jax.errors import UserError
from pspnet_jax.models.resnet import BASIC_DEPTHS, BLOCKS, STEMS
from pspnet_jax.weights import caffe, container, mmseg, pytorch
from pspnet_jax.weights.names import FAMILIES, Family

# Our path of an array, and the depth where it counts -> its shape in the file, () where there is none.
ShapeOf = Callable[..., tuple[int, ...]]
LEVELS = {4: (1, 2, 3, 6), 0: ()}  # bins by the number of levels


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds. What it tells is kept apart from what is assumed, where the user's word counts."""

    path: str
    family: Family  # whose names its arrays have
    model: Mapping[str, Any]  # the fields of config.model that its shapes, names or metadata tell
    normalize: Mapping[str, Any]  # those of config.normalize
    assumed: Mapping[str, Mapping[str, Any]]  # "model" and "normalize": further fields, as networks of its family have them
    evaluation: Mapping[str, Any]  # the fields of config.eval that its published numbers were made with
    num_classes: int | None = None  # K, or None for a backbone alone
    levels: int = 0  # of the pyramid
    class_names: tuple[str, ...] = ()  # K of them, or none where the file has none
    colors: tuple[datasets.Color, ...] = ()  # likewise
    entry: str = ""  # of the checkpoint, whose weights these are
    others: tuple[str, ...] = ()  # entries with further weights

    def __str__(self) -> str:
        classes = "backbone only" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{self.path}: {self.family.title}, depth {self.model['depth']}, {classes}"

    @property
    def choice(self) -> str:
        """Which of a checkpoint's weights these are, and how to name the others; "" where there are no others."""
        file = self.path.removesuffix(f":{self.entry}")
        others = " or ".join(f"{file}:{name}" for name in self.others)
        return f"the weights are those in {self.entry!r}; for the others name {others}" if others else ""

    def key(self, path: str) -> str | None:
        """The file's key for "params/backbone/..." and so on; None where its family has no such array."""
        return self.family.key(path, self.model.get("bins", ()), self.model["depth"])


def inspect(path: str | os.PathLike) -> Source:
    """Recognizes a checkpoint.

    Args:
      path: a file of weights, local or gs://; FILE:NAME takes the entry NAME of a checkpoint with several.

    Raises:
      MissingFileError: there is no such file.
      UserError: it cannot be read, its family is unknown, or its network is no ResNet or PSPNet.
    """
    return read(path)[0]


def read(path: str | os.PathLike) -> tuple[Source, pytorch.Arrays]:
    """Recognizes a checkpoint as `inspect` does, and returns its arrays too."""
    content = container.read(path)
    return _describe(str(files.absolute(path)), content), content.arrays


def _describe(path: str, content: pytorch.Content) -> Source:
    arrays = content.arrays
    family, bins = _family(path, arrays), _caffe_bins(arrays)

    def shape(name: str, depth: int = 50) -> tuple[int, ...]:
        key = family.key(f"params/{name}", bins, depth)
        return arrays[key].shape if key in arrays else ()

    depth = _depth(path, shape)
    model = {"width": 64, "depth": depth, "stem": _stem(path, shape)}
    found: dict[str, Any] = {"evaluation": {}, "entry": content.entry, "others": content.others}
    assumed, normalize = dict(family.model), {}
    if family.protocol:
        found["num_classes"] = num_classes = _num_classes(path, family, shape)
        levels = len(bins) or next(i for i in itertools.count() if not shape(f"pyramid/level{i}/conv/kernel"))
        if family.protocol == "mmseg" and not levels:
            raise UserError(f"{path}: is mmsegmentation's, but no PSPNet: it has no decode_head.psp_modules")
        found["levels"] = levels
        model |= _head_fields(shape, levels, depth)
        found["evaluation"] = _evaluation(family.protocol, num_classes)
        if family.protocol == "caffe":
            model["bins"], assumed["stride_in"] = bins, caffe.STRIDE_IN.get(depth, "conv1x1")
        elif levels in LEVELS:
            assumed["bins"] = LEVELS[levels]
        if family.protocol == "mmseg":
            told, name = mmseg.settings(content.metadata), mmseg.settings_by_name(os.path.basename(path))
            model |= mmseg.model_fields(path, told)
            normalize = mmseg.normalize_fields(told)
            assumed |= {} if told else mmseg.model_fields(path, name)
            found["evaluation"] = mmseg.evaluation_fields(told or name, num_classes)
        found["class_names"], found["colors"] = _classes(content.metadata, num_classes)
    found["assumed"] = {"model": _without(assumed, model), "normalize": _without(family.normalize, normalize)}
    return Source(path, family, model, normalize, **found)


def _without(fields: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if field not in told}


def _num_classes(path: str, family: Family, shape: ShapeOf) -> int:
    if not shape("classifier/bias"):
        missing = family.key("params/classifier/bias", (), 50)
        raise UserError(
            f"{path}: begins as {family.title}, but has no {missing}; a network with another head, such as FCN or DeepLab, "
            "cannot be imported"
        )
    if (num_classes := shape("classifier/bias")[0]) < 2:
        raise UserError(
            f"{path}: its classifier has {num_classes} output, as for a sigmoid; expected one for each of 2 or more classes"
        )
    return num_classes


def _head_fields(shape: ShapeOf, levels: int, depth: int) -> dict[str, Any]:
    """What the shapes of pyramid and heads tell; where one is missing or odd, nothing, since `load` names it."""
    fields: dict[str, Any] = {"auxiliary": bool(shape("auxiliary_classifier/bias", depth))}
    if levels > 1 and (level := shape("pyramid/level0/conv/kernel"))[2:] == (1, 1):
        fields["reduce_channels"] = level[0] != level[1]
    if (head := shape("head_conv/kernel"))[2:] in ((1, 1), (3, 3)):
        fields["head_kernel"] = head[2]
    return fields


def _family(path: str, arrays: pytorch.Arrays) -> Family:
    for family in FAMILIES.values():
        anchors = (f"params/backbone/{module}/conv/kernel" for module in ("stem_conv1", "layer1_block0/conv1"))
        if all(family.key(anchor, (), 50) in arrays for anchor in anchors):
            return family
    modules = list(dict.fromkeys(re.split(r"[.:]", key)[0] for key in arrays))
    raise UserError(
        f"{path}: holds none of the networks that can be imported: ResNets of torchvision, timm (but not ResNet-C, -D, -T) "
        f"and semseg; PSPNets of semseg, mmsegmentation and Caffe. It has {len(arrays)} arrays in "
        f"{', '.join(modules[:6])}{', ...' * (len(modules) > 6)}, such as {min(arrays, default='none')}"
    )


def _depth(path: str, shape: ShapeOf) -> int:
    """By the number of blocks in each stage, and of convolutions in a block."""

    def kernel(module: str) -> tuple[int, ...]:
        return shape(f"backbone/{module}/conv/kernel")

    blocks = tuple(next(b for b in itertools.count() if not kernel(f"layer{s}_block{b}/conv1")) for s in range(1, 5))
    basic = not kernel("layer1_block0/conv3")
    if kernel("layer1_block0/conv1")[:1] != (64,) or kernel("layer1_block0/conv2") != (64, 64, 3, 3):
        if kernel("layer1_block0/conv2") == (3, 3, 64, 64):
            raise UserError(f"{path}: its kernels are [height, width, in, out]; transpose them to PyTorch's order")
        raise UserError(f"{path}: its blocks are grouped or wide (ResNeXt, Wide ResNet), which this network has not")
    for depth, expected in BLOCKS.items():
        if blocks == expected and basic == (depth in BASIC_DEPTHS):
            return depth
    raise UserError(
        f"{path}: {blocks} {'basic blocks' if basic else 'bottlenecks'} in its stages; expected a ResNet of depth "
        f"{', '.join(map(str, BLOCKS))}"
    )


def _stem(path: str, shape: ShapeOf) -> str:
    """By the first kernel."""
    first = shape("backbone/stem_conv1/conv/kernel")
    for stem, ((size, multiple), *_) in STEMS.items():
        if first == (64 * multiple, 3, size, size):
            return stem
    raise UserError(f"{path}: its first kernel is {first}; expected (64, 3, 3, 3), (32, 3, 3, 3) or (64, 3, 7, 7)")


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
