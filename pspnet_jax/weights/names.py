"""Names of our arrays in the files of other projects, and the settings that all networks of a family share.

Our paths are those of the flattened variables, such as "params/backbone/layer1_block0/conv2/bn/scale".
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pspnet_jax.weights import caffe

# Our module -> their module. # stands for a number, {0} for the first number.
TORCHVISION = {  # also used by timm and, with a stem of three convolutions, by semseg's ImageNet models
    "backbone/stem_conv#/conv": "conv{0}",
    "backbone/stem_conv#/bn": "bn{0}",
    "backbone/layer#_block#/conv#/conv": "layer{0}.{1}.conv{2}",
    "backbone/layer#_block#/conv#/bn": "layer{0}.{1}.bn{2}",
    "backbone/layer#_block#/projection/conv": "layer{0}.{1}.downsample.0",
    "backbone/layer#_block#/projection/bn": "layer{0}.{1}.downsample.1",
}
HEADS = {  # ours -> semseg's, mmseg's
    "pyramid/level#/conv": ("ppm.features.{0}.1", "decode_head.psp_modules.{0}.1.conv"),
    "pyramid/level#/bn": ("ppm.features.{0}.2", "decode_head.psp_modules.{0}.1.bn"),
    "head_conv": ("cls.0", "decode_head.bottleneck.conv"),
    "head_bn": ("cls.1", "decode_head.bottleneck.bn"),
    "classifier": ("cls.4", "decode_head.conv_seg"),
    "auxiliary_conv/conv": ("aux.0", "auxiliary_head.convs.0.conv"),
    "auxiliary_conv/bn": ("aux.1", "auxiliary_head.convs.0.bn"),
    "auxiliary_classifier": ("aux.4", "auxiliary_head.conv_seg"),
}


def _stem_of_three(sequential: str) -> dict[str, str]:
    """Names of a stem of three convolutions in a Sequential, where every third module is an activation."""
    parts = enumerate(("conv", "bn"))
    return {f"backbone/stem_conv{i + 1}/{part}": f"{sequential}.{3 * i + j}" for j, part in parts for i in range(3)}


TIMM_DEEP = TORCHVISION | _stem_of_three("conv1") | {"backbone/stem_conv3/bn": "bn1"}  # its ResNet-C and ResNet-S
SEMSEG = TORCHVISION | _stem_of_three("layer0") | {ours: semseg for ours, (semseg, _) in HEADS.items()}
# Models with a b in their names, such as r50b, have torchvision's stem.
MMSEG_B = {m: f"backbone.{theirs}" for m, theirs in TORCHVISION.items()} | {m: mmseg for m, (_, mmseg) in HEADS.items()}
MMSEG = MMSEG_B | _stem_of_three("backbone.stem")
TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
CAFFE_LEAVES = {"kernel": 0, "scale": 0, "bias": 1, "mean": 2, "var": 3}  # indices of a layer's blobs
PORT_LEAVES = (("kernel", "bias"), ("gamma", "beta", "moving_mean", "moving_variance"))  # of convolutions, batch norms


def _torch_key(table: Mapping[str, str], path: str, bins: Sequence[int], depth: int) -> str | None:
    module, leaf = path.split("/", 1)[1].rsplit("/", 1)
    name = table.get(module) or table.get(re.sub(r"\d+", "#", module))
    if name is None:
        return None
    return f"{name.format(*re.findall('[0-9]+', module))}.{TORCH_LEAVES[leaf]}"


def _caffe_key(path: str, bins: Sequence[int], depth: int) -> str:
    module, leaf = path.split("/", 1)[1].rsplit("/", 1)
    norm = "/bn" if module.endswith("bn") else ""
    module = "head_conv" if module == "head_bn" else module.removesuffix("/conv").removesuffix("/bn")
    return f"{caffe.layer_name(module, bins, depth)}{norm}:{CAFFE_LEAVES[leaf]}"


def _port_key(path: str, bins: Sequence[int], depth: int) -> str:
    layer, index = _caffe_key(path, bins, depth).rsplit(":", 1)
    return f"{layer.replace('/', '_')}/{PORT_LEAVES[layer.endswith('/bn')][int(index)]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one project: their array names and the settings that they share."""

    title: str  # used in messages, with an article
    key: Callable[[str, Sequence[int], int], str | None]  # (our path, model.bins, model.depth) -> key in the file, if any
    ignored: str  # pattern of keys that our network does not need
    model: dict[str, Any]  # shared fields of config.model that no array shape shows
    protocol: str  # config.eval.protocol of the published scores; "" for backbones
    normalize: dict[str, Any]  # config.normalize of the training runs


_RESNET = {"stride_in": "conv3x3"}
_PSPNET = _RESNET | {"output_stride": 8, "pool": "average"}
_IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "order": "RGB"}
_COUNTS = r".*\.num_batches_tracked"  # step counters of torch's BatchNorm

_SEMSEG = Family(
    title="a PSPNet of semseg",
    key=functools.partial(_torch_key, SEMSEG),
    ignored=_COUNTS,
    model=_PSPNET | {"first_block_dilation": "full", "align_corners": True},
    protocol="semseg",
    normalize=_IMAGENET,
)
_MMSEG = Family(
    title="a PSPNet of mmseg",
    key=functools.partial(_torch_key, MMSEG),
    ignored=_COUNTS,
    model=_PSPNET | {"first_block_dilation": "half", "align_corners": False},  # contract_dilation; align_corners varies
    protocol="mmseg",
    normalize=_IMAGENET,
)
_BACKBONE = Family(
    title="an ImageNet ResNet",
    key=functools.partial(_torch_key, TORCHVISION),
    ignored=_COUNTS + r"|(fc|classifier)\..*",
    model=_RESNET,
    protocol="",
    normalize=_IMAGENET,
)
_CAFFE = dataclasses.replace(
    _SEMSEG,
    title="a PSPNet of Caffe",
    key=_caffe_key,
    ignored="",
    protocol="caffe",
    normalize={"mean": (123.68, 116.779, 103.939), "std": (1.0, 1.0, 1.0), "order": "BGR"},
)
FAMILIES = {
    "resnet": _BACKBONE,
    "timm_deep": dataclasses.replace(_BACKBONE, key=functools.partial(_torch_key, TIMM_DEEP)),
    "semseg": _SEMSEG,
    "mmseg": _MMSEG,
    "mmseg_b": dataclasses.replace(_MMSEG, key=functools.partial(_torch_key, MMSEG_B)),
    "caffe": _CAFFE,
    "port": dataclasses.replace(
        _CAFFE,
        title="a PSPNet of Caffe, ported to Keras or TensorFlow",
        key=_port_key,
        ignored=r".*/(Momentum|Adam(_1)?)|global_step|beta[12]_power",  # of TensorFlow's optimizers
    ),
}


def to_oihw(array: np.ndarray) -> np.ndarray:
    """Transposes kernels from HWIO to OIHW; returns other arrays unchanged."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def to_hwio(array: np.ndarray) -> np.ndarray:
    """Transposes kernels from OIHW to HWIO; returns other arrays unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
