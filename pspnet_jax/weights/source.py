"""Detects the model family and the network of a checkpoint from its metadata and the names and shapes of its arrays."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from pspnet_jax import datasets, files
from pspnet_jax.errors import UserError
from pspnet_jax.models.resnet import BASIC_DEPTHS, BLOCKS, STEMS
from pspnet_jax.weights import caffe, container, mmseg, own, pytorch, remote
from pspnet_jax.weights.names import FAMILIES, Family

# (our path of an array, optionally the depth) -> the array's shape in the file, or () if it is missing.
ShapeOf = Callable[..., tuple[int, ...]]
LEVELS = {4: (1, 2, 3, 6), 0: ()}  # bins by number of levels


@dataclasses.dataclass(frozen=True)
class Source:
    """The network in a weights file. What the file specifies is kept apart from assumptions, which the user may override."""

    path: str
    family: Family  # determines the array names
    model: Mapping[str, Any]  # fields of config.model that the shapes, names or metadata specify
    normalize: Mapping[str, Any]  # fields of config.normalize that the metadata specify
    assumed: Mapping[str, Mapping[str, Any]]  # "model" and "normalize": other fields, as usual in the family
    evaluation: Mapping[str, Any]  # fields of config.eval behind the published scores
    num_classes: int | None = None  # K, or None for a backbone only
    levels: int = 0  # of the pyramid
    class_names: tuple[str, ...] = ()  # K names, or () if the file has none
    colors: tuple[datasets.Color, ...] = ()  # K colors, or () if the file has none
    entry: str = ""  # the entry of the checkpoint that the weights are from
    others: tuple[str, ...] = ()  # other entries with weights

    def __str__(self) -> str:
        classes = "backbone only" if self.num_classes is None else f"{self.num_classes} classes"
        return f"{self.path}: {self.family.title}, depth {self.model['depth']}, {classes}"

    @property
    def entry_note(self) -> str:
        """States which entry the weights are from and how to select the others; "" if there are no others."""
        file = self.path.removesuffix(f":{self.entry}")
        others = " or ".join(f"{file}:{name}" for name in self.others)
        return f"using the weights in {self.entry!r}; for the others, use {others}" if others else ""

    def key(self, path: str) -> str | None:
        """Returns the key in the file of "params/backbone/..." and so on; None if the family has no such array."""
        return self.family.key(path, self.model.get("bins", ()), self.model["depth"])


def inspect(path: str | os.PathLike) -> Source:
    """Detects the network in a weights file.

    Args:
      path: a weights file, or a name that `remote.fetch` accepts; FILE:NAME selects the entry NAME of a checkpoint. Or a folder
        with model.safetensors, such as --mode export --format hf writes.

    Raises:
      MissingFileError: the file does not exist.
      UserError: it cannot be read, its family is unknown, or its network is not a ResNet or PSPNet.
    """
    return read(path)[0]


def read(path: str | os.PathLike) -> tuple[Source, pytorch.Arrays]:
    """Detects the network in a weights file, as `inspect` does, and returns the arrays, too."""
    content = container.read(local := remote.fetch(path))
    shown = os.fspath(path if remote.is_name(path) else files.absolute(path))
    return _describe(shown, os.path.basename(local), content), content.arrays


def _describe(path: str, file_name: str, content: pytorch.Content) -> Source:
    if content.metadata.get("library_name") == own.LIBRARY:
        return Source(path=path, **own.fields(path, content.metadata))
    arrays = content.arrays
    family, bins = _detect_family(path, arrays), _caffe_bins(arrays)

    def shape(name: str, depth: int = 50) -> tuple[int, ...]:
        key = family.key(f"params/{name}", bins, depth)
        return arrays[key].shape if key in arrays else ()

    depth = _detect_depth(path, shape)
    model = {"width": 64, "depth": depth, "stem": _detect_stem(path, shape)}
    found: dict[str, Any] = {"evaluation": {}, "entry": content.entry, "others": content.others}
    assumed, normalize = dict(family.model), {}
    if family.protocol:
        found["num_classes"] = num_classes = _num_classes(path, family, shape)
        levels = len(bins) or next(i for i in itertools.count() if not shape(f"pyramid/level{i}/conv/kernel"))
        if family.protocol == "mmseg" and not levels:
            raise UserError(f"{path}: is from mmsegmentation, but not a PSPNet: it has no decode_head.psp_modules")
        found["levels"] = levels
        model |= _head_fields(shape, levels, depth)
        found["evaluation"] = _evaluation_fields(family.protocol, num_classes)
        if family.protocol == "caffe":
            model["bins"], assumed["stride_in"] = bins, caffe.STRIDE_IN.get(depth, "conv1x1")
        elif levels in LEVELS:
            assumed["bins"] = LEVELS[levels]
        if family.protocol == "mmseg":
            saved, implied = mmseg.settings(content.metadata), mmseg.settings_from_name(file_name)
            model |= mmseg.model_fields(path, saved)
            normalize = mmseg.normalize_fields(saved)
            assumed |= {} if saved else mmseg.model_fields(path, implied)
            found["evaluation"] = mmseg.evaluation_fields(saved or implied, num_classes)
        found["class_names"], found["colors"] = _class_names_and_colors(content.metadata, num_classes)
    found["assumed"] = {"model": _without(assumed, model), "normalize": _without(family.normalize, normalize)}
    return Source(path, family, model, normalize, **found)


def _without(fields: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if field not in known}


def _num_classes(path: str, family: Family, shape: ShapeOf) -> int:
    if not shape("classifier/bias"):
        missing = family.key("params/classifier/bias", (), 50)
        raise UserError(
            f"{path}: looks like {family.title}, but has no {missing}; a network with another head, such as FCN or "
            "DeepLab, cannot be imported"
        )
    if (num_classes := shape("classifier/bias")[0]) < 2:
        raise UserError(
            f"{path}: its classifier has {num_classes} output, as for a sigmoid; expected one per class, for 2 or more classes"
        )
    return num_classes


def _head_fields(shape: ShapeOf, levels: int, depth: int) -> dict[str, Any]:
    """Returns the fields that the shapes of pyramid and heads show; skips missing or odd arrays, which `load` reports."""
    fields: dict[str, Any] = {"auxiliary": bool(shape("auxiliary_classifier/bias", depth))}
    if levels > 1 and (level := shape("pyramid/level0/conv/kernel"))[2:] == (1, 1):
        fields["reduce_channels"] = level[0] != level[1]
    if (head := shape("head_conv/kernel"))[2:] in ((1, 1), (3, 3)):
        fields["head_kernel"] = head[2]
    return fields


def _detect_family(path: str, arrays: pytorch.Arrays) -> Family:
    if any(re.search(r"\.downsample\.1\.weight$", key) and array.ndim == 4 for key, array in arrays.items()):
        raise UserError(
            f"{path}: its shortcuts pool before they project, as in ResNet-D and -T, which our networks do not; use another "
            "ResNet, such as timm/resnet50s.gluon_in1k, which has the deep stem"
        )
    for family in FAMILIES.values():
        anchors = (f"params/backbone/{module}/conv/kernel" for module in ("stem_conv1", "layer1_block0/conv1"))
        if all(family.key(anchor, (), 50) in arrays for anchor in anchors):
            return family
    modules = list(dict.fromkeys(re.split(r"[.:/]", key)[0] for key in arrays))
    raise UserError(
        f"{path}: has no network that can be imported; expected a ResNet of torchvision, timm or semseg, or a "
        f"PSPNet of semseg, mmsegmentation, or Caffe and its ports to Keras and TensorFlow. It has {len(arrays)} arrays in "
        f"{', '.join(modules[:6])}{', ...' * (len(modules) > 6)}, such as {min(arrays, default='none')}"
    )


def _detect_depth(path: str, shape: ShapeOf) -> int:
    """Returns the depth, from the number of blocks in each stage and of convolutions in a block."""

    def kernel(module: str) -> tuple[int, ...]:
        return shape(f"backbone/{module}/conv/kernel")

    blocks = tuple(next(b for b in itertools.count() if not kernel(f"layer{s}_block{b}/conv1")) for s in range(1, 5))
    basic = not kernel("layer1_block0/conv3")
    if kernel("layer1_block0/conv1")[:1] != (64,) or kernel("layer1_block0/conv2") != (64, 64, 3, 3):
        if kernel("layer1_block0/conv2") == (3, 3, 64, 64):
            raise UserError(f"{path}: its kernels are [height, width, in, out]; transpose them to PyTorch's order")
        raise UserError(f"{path}: its blocks are grouped or wide (ResNeXt, Wide ResNet), which is not supported")
    for depth, expected in BLOCKS.items():
        if blocks == expected and basic == (depth in BASIC_DEPTHS):
            return depth
    for stage, block in itertools.product(range(1, 5), range(max(map(max, BLOCKS.values())))):
        if not kernel(f"layer{stage}_block{block}/conv1") and kernel(f"layer{stage}_block{block}/conv2"):
            raise UserError(f"{path}: lacks the first kernel of block {block} of stage {stage}; the file is incomplete")
    raise UserError(
        f"{path}: its stages have {blocks} {'basic blocks' if basic else 'bottlenecks'}; expected a ResNet of depth "
        f"{', '.join(map(str, BLOCKS))}"
    )


def _detect_stem(path: str, shape: ShapeOf) -> str:
    """Returns the kind of stem, from the shape of the first kernel."""
    first = shape("backbone/stem_conv1/conv/kernel")
    for stem, ((size, multiple), *_) in STEMS.items():
        if first == (64 * multiple, 3, size, size):
            return stem
    raise UserError(f"{path}: its first kernel is {first}; expected (64, 3, 3, 3), (32, 3, 3, 3) or (64, 3, 7, 7)")


def _caffe_bins(arrays: pytorch.Arrays) -> tuple[int, ...]:
    """Returns the bins in the layer names, in the order in which the release concatenates the levels."""
    found = (re.fullmatch(r"conv5_3_pool(\d+)_conv(:0|/kernel)", key) for key in arrays)
    return tuple(sorted((int(match[1]) for match in found if match), reverse=True))


def _evaluation_fields(protocol: str, num_classes: int) -> dict[str, Any]:
    crop, base_size = (713, 2048) if num_classes == 19 else (473, 512)  # Cityscapes; ADE20K and VOC
    windows = {"inference": "windows", "crop": (crop, crop), "stride": (0, 0), "base_size": base_size, "short_size": 0}
    return {"protocol": protocol, **windows, "scales": (1.0,), "flip": True}


def _class_names_and_colors(
    metadata: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...], tuple[datasets.Color, ...]]:
    """Returns the class names and colors in the metadata, each () unless valid and num_classes long."""

    def is_color(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int) and 0 <= v < 256 for v in value)

    names, colors = (values if isinstance(values, list | tuple) else () for values in mmseg.classes(metadata))
    names_fit = len(names) == num_classes and all(isinstance(name, str) for name in names)
    colors_fit = len(colors) == num_classes and all(map(is_color, colors))
    return tuple(name.strip() for name in names if names_fit), tuple((r, g, b) for r, g, b in (colors if colors_fit else ()))
