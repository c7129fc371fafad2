"""Caffe's .caffemodel files, and the layer names of the authors' release (github.com/hszhao/PSPNet).

The BN layers of the release hold slope, bias, running mean and running variance, and compute
slope * (x - mean) / sqrt(variance + 1e-5) + bias (src/caffe/layers/bn_layer.cpp). At the release's crops, 473 and 713, our
network computes the same. At other sizes it may not: the release fixes the average pooling kernels for its crop, and its max
pooling returns one more row for an even number of rows.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax.errors import UserError
from pspnet_jax.models.resnet import BLOCKS

# The convolution of conv3_1 that has the stride, by depth, from evaluation/prototxt/*.prototxt; the weights do not show it.
STRIDE_IN = {50: "conv1x1", 101: "conv3x3"}
STEM = {"stem_conv1": "conv1_1_3x3_s2", "stem_conv2": "conv1_2_3x3", "stem_conv3": "conv1_3_3x3"}
BLOCK = {"conv1": "1x1_reduce", "conv2": "3x3", "conv3": "1x1_increase", "projection": "1x1_proj"}
HEAD = {"head_conv": "conv5_4", "classifier": "conv6", "auxiliary_classifier": "conv6_1"}

# The part of src/caffe/proto/caffe.proto that holds weights: (field, number, type, repeated). The parser skips the rest.
SCHEMA = {
    "BlobShape": (("dim", 1, "int64", True),),
    "BlobProto": (
        *((name, number, "int32", False) for number, name in enumerate(("num", "channels", "height", "width"), 1)),
        ("data", 5, "float", True),
        ("shape", 7, "BlobShape", False),
        ("double_data", 8, "double", True),
    ),
    "LayerParameter": (("name", 1, "string", False), ("blobs", 7, "BlobProto", True)),
    "V1LayerParameter": (("name", 4, "string", False), ("blobs", 6, "BlobProto", True)),
    "NetParameter": (("layers", 2, "V1LayerParameter", True), ("layer", 100, "LayerParameter", True)),
}


def layer_name(module: str, bins: Sequence[int], depth: int) -> str:
    """Returns the release's name of a convolution such as "backbone/layer1_block0/conv2"; its batch norm is NAME/bn."""
    *parents, last = module.split("/")
    if module == "auxiliary_conv":  # named like one more block of conv4_x; the deploy files lack it
        return f"conv4_{BLOCKS[depth][2] + 1}"
    if not parents:
        return HEAD[module]
    if parents == ["pyramid"]:
        return f"conv5_3_pool{bins[int(last.removeprefix('level'))]}_conv"
    if last in STEM:
        return STEM[last]
    stage, block = map(int, re.findall(r"\d+", parents[-1]))
    return f"conv{stage + 1}_{block + 1}_{BLOCK[last]}"


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the weights of a .caffemodel, with either the newer `layer` or the older `layers` field.

    Returns:
      f32 arrays by "LAYER:INDEX". Kernels are OIHW, as stored ("conv6:0"). All others are flat: biases ("conv6:1"), and the
      slope, bias, mean and variance of a BN layer ("conv5_4/bn:0" to ":3").

    Raises:
      UserError: the file is truncated, not a Caffe network or without weights, or a blob does not match its shape.
    """
    from google.protobuf.message import DecodeError  # installed with TensorFlow, and used only here

    try:
        net = _net_parameter().FromString(epath.Path(path).read_bytes())
        blobs = {f"{layer.name}:{i}": blob for layer in (*net.layers, *net.layer) for i, blob in enumerate(layer.blobs)}
    except DecodeError as error:
        raise UserError(f"{path}: not a .caffemodel, or only a part of one; copy or download it again ({error})") from error
    if not blobs:
        raise UserError(f"{path}: has no layer with weights; expected the .caffemodel of a trained network")
    return {key: _array(blob, key, path) for key, blob in blobs.items()}


def _array(blob: Any, key: str, path: epath.PathLike) -> np.ndarray:
    values = np.array(blob.data or blob.double_data, np.float32)
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    if min(shape, default=1) < 0 or math.prod(shape) != values.size:
        raise UserError(f"{path}: blob {key} has {values.size} values for the shape {shape}; copy or download the file again")
    layer, index = key.rsplit(":", 1)
    return values.reshape(shape) if index == "0" and not layer.endswith("/bn") else values


@functools.cache
def _net_parameter() -> Any:
    """Returns the protobuf message class for the SCHEMA."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffemodel.proto", package="caffemodel")
    for message_name, fields in SCHEMA.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, repeated in fields:
            field = message.field.add(name=name, number=number)
            field.label = field_proto.LABEL_REPEATED if repeated else field_proto.LABEL_OPTIONAL
            if kind in SCHEMA:
                field.type, field.type_name = field_proto.TYPE_MESSAGE, f".caffemodel.{kind}"
            else:
                field.type = getattr(field_proto, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffemodel.NetParameter"))
