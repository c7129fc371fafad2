"""A graph of ONNX nodes that is being written.

ONNX wants channels first. An array therefore remembers the order in which its axes are stored, and only what needs another
order transposes it: images as they come, and probabilities as they leave.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from pspnet_jax.models import layers

OPSET, IR_VERSION = 18, 9  # of ONNX 1.14, of May 2023


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in the graph, whose axis i is stored as axis order[i] of the value `name`."""

    name: str
    order: tuple[int, ...]


Value = Stored | np.ndarray  # constants are NumPy arrays


class Graph:
    """Nodes and constants, which the package `onnx` makes."""

    def __init__(self, onnx: ModuleType):
        self.onnx = onnx
        self._nodes: dict[str, Any] = {}  # by the name of their output
        self._constants: dict[str, np.ndarray] = {}

    def node(self, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        names = [self.constant(i) if isinstance(i, np.ndarray) else i for i in inputs]
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes[name] = self.onnx.helper.make_node(kind, names, [name], name, **attributes)
        return name

    def constant(self, array: np.ndarray) -> str:
        """Adds a constant and returns its name."""
        self._constants[name := f"constant{len(self._constants)}"] = array
        return name

    def in_order(self, value: Value, axes: Iterable[int]) -> str:
        """Returns the name of a value that stores the array with its axes in this order."""
        axes = [int(axis) for axis in axes]
        if isinstance(value, np.ndarray):
            return self.constant(value.transpose(axes))
        order = [value.order[axis] for axis in axes]
        return value.name if order == sorted(order) else self.node("Transpose", value.name, perm=order)

    def scaled_convolution(self, name: str, scale: np.ndarray, shift: np.ndarray) -> str | None:
        """Returns a convolution with another kernel and bias whose result is scale * x + shift, or None if x is no convolution.

        Args:
          name: of x.
          scale, shift: one number per channel, or one number.
        """
        node = self._nodes.get(name)
        if node is None or node.op_type != "Conv":
            return None
        kernel, bias = (self._constants[i] for i in node.input[1:])
        scale, shift = (np.broadcast_to(array.reshape(-1), bias.shape) for array in (scale, shift))
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        return self.node("Conv", node.input[0], kernel * scale[:, None, None, None], bias * scale + shift, **attributes)

    def model(self, result: Value, name: str, images: Sequence[Any], shape: Sequence[Any]) -> Any:
        """Returns the ONNX model of what a result needs.

        Args:
          result: uint8 or float32.
          name: of the result in the model; its input is "image".
          images, shape: sizes of the images and of the result; one that is not known is called N.
        """
        helper, types = self.onnx.helper, self.onnx.TensorProto
        last = self.node("Identity", self.in_order(result, range(len(shape))))
        self._nodes[last].output[0] = name
        needed, nodes = {name}, []
        for node in reversed(self._nodes.values()):
            if needed & {*node.output}:
                nodes.append(node)
                needed |= {*node.input}
        inputs, outputs = (
            helper.make_tensor_value_info(value, kind, [size if layers.is_known(size) else "N" for size in sizes])
            for value, kind, sizes in (
                ("image", types.UINT8, images),
                (name, types.UINT8 if name == "labels" else types.FLOAT, shape),
            )
        )
        from_array = self.onnx.numpy_helper.from_array
        constants = [from_array(np.ascontiguousarray(v), k) for k, v in self._constants.items() if k in needed]
        graph = helper.make_graph(nodes[::-1], "pspnet", [inputs], [outputs], constants)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="pspnet_jax")
