"""ONNX: writes the operations that JAX traces as nodes of a graph.

The converters at hand do not do: tf2onnx 1.17 (from TFLite) makes labels of a type that ONNX forbids, fails for some heads and
fixes the number of images; jax2onnx 0.17 drops the padding of max-pooling without a message and needs an older
orbax-checkpoint than ours.

ONNX wants channels first. An array therefore remembers the order in which its axes are stored, and only what needs another
order transposes it: an image as it comes, and probabilities as they leave.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.extend import core

from pspnet_jax import files
from pspnet_jax.deploy.export import Program
from pspnet_jax.errors import UserError
from pspnet_jax.models import layers

OPSET, IR_VERSION = 18, 9  # of ONNX 1.14, of May 2023


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in the graph, whose axis i is stored as axis order[i] of the value `name`."""

    name: str
    order: tuple[int, ...]


Value = Stored | np.ndarray  # constants are computed here


def write(program: Program, path: epath.Path) -> None:
    """Writes a file for `onnxruntime.InferenceSession(path).run(None, {"image": images})`.

    Raises:
      UserError: the package onnx is missing, or the network has an operation that this module does not know.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError('--format onnx needs the package onnx: pip install ".[export]"') from error
    program = program.in_float32()
    with layers.plain():
        traced = jax.make_jaxpr(program.__call__)(program.images)
    graph = _Graph(onnx)
    [result] = graph.convert(traced.jaxpr, traced.consts, [Stored("image", (0, 1, 2, 3))])
    model = graph.model(result, program, traced.out_avals[0])
    with files.atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


class _Graph:
    """Nodes and constants of a graph that is being written."""

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
        self._constants[name := f"constant{len(self._constants)}"] = array
        return name

    def in_order(self, value: Value, axes: Sequence[int]) -> str:
        """Returns the name of a value that stores the array with its axes in this order."""
        if isinstance(value, np.ndarray):
            return self.constant(value.transpose(axes))
        order = [value.order[axis] for axis in axes]
        return value.name if order == sorted(order) else self.node("Transpose", value.name, perm=order)

    def convert(self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Adds the operations of a jaxpr, and returns its outputs; what does not depend on the image is computed."""
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            given = [read(atom) for atom in equation.invars]
            values |= dict(zip(equation.outvars, self._apply(equation, given), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        for inner in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if inner in parameters:  # a function of JAX, such as relu
                closed = parameters[inner]
                return self.convert(closed.jaxpr, closed.consts, inputs)
        if all(isinstance(i, np.ndarray) for i in inputs):
            found = equation.primitive.bind(*inputs, **parameters)
            return [np.asarray(array) for array in (found if equation.primitive.multiple_results else [found])]
        if name not in OPERATIONS:
            raise UserError(f"--format onnx: the network has the operation {name}, which cannot be written as ONNX yet")
        return [OPERATIONS[name](self, equation, *inputs)]

    def model(self, result: Value, program: Program, aval: Any) -> Any:
        """Returns the ONNX model of what the result needs."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        name = self.node("Identity", self.in_order(result, range(len(aval.shape))))
        self._nodes[name].output[0] = program.outputs
        needed, nodes = {program.outputs}, []
        for node in reversed(self._nodes.values()):
            if needed & {*node.output}:
                nodes.append(node)
                needed |= {*node.input}
        kind = types.UINT8 if program.outputs == "labels" else types.FLOAT

        def shape(dims: Sequence[Any]) -> list[Any]:
            return [dim if layers.is_known(dim) else "N" for dim in dims]

        graph = helper.make_graph(
            nodes[::-1],
            "pspnet",
            [helper.make_tensor_value_info("image", types.UINT8, shape(program.images.shape))],
            [helper.make_tensor_value_info(program.outputs, kind, shape(aval.shape))],
            [self.onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in self._constants.items() if k in needed],
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="pspnet_jax")

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


def _binary(kind: str) -> Callable[..., Value]:
    def apply(graph: _Graph, equation: Any, a: Value, b: Value) -> Value:
        first = a if isinstance(a, Stored) else b
        assert isinstance(first, Stored)
        order, axes = first.order, np.argsort(first.order)
        folded = isinstance(b, np.ndarray) and (b.ndim == 0 or b.size == b.shape[-1]) and len(order) == 4
        if folded and kind in AFFINE and (found := graph.scaled_convolution(first.name, *AFFINE[kind](b))):
            return Stored(found, order)
        if kind == "Max" and isinstance(b, np.ndarray) and b.ndim == 0 and b == 0:
            return Stored(graph.node("Relu", first.name), order)
        names = [x if isinstance(x, np.ndarray) and x.ndim == 0 else graph.in_order(x, axes) for x in (a, b)]
        return Stored(graph.node(kind, *names), order)

    return apply


# How x + c and so on scale and shift x.
AFFINE: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "Add": lambda c: (np.ones_like(c), c),
    "Sub": lambda c: (np.ones_like(c), -c),
    "Mul": lambda c: (c, np.zeros_like(c)),
}


def _convolution(graph: _Graph, equation: Any, x: Value, kernel: np.ndarray) -> Value:
    p = equation.params
    lhs, rhs, out = p["dimension_numbers"]
    name = graph.node(
        "Conv",
        graph.in_order(x, lhs),
        kernel.transpose(rhs),
        np.zeros(kernel.shape[rhs[0]], np.float32),
        strides=p["window_strides"],
        dilations=p["rhs_dilation"],
        pads=[before for before, _ in p["padding"]] + [after for _, after in p["padding"]],
        group=p["feature_group_count"],
    )
    return Stored(name, tuple(int(i) for i in np.argsort(out)))


def _max_pool(graph: _Graph, equation: Any, x: Value) -> Value:
    p, channels_first = equation.params, (0, 3, 1, 2)
    pads = p["padding"][1:3]
    name = graph.node(
        "MaxPool",
        graph.in_order(x, channels_first),
        kernel_shape=p["window_dimensions"][1:3],
        strides=p["window_strides"][1:3],
        pads=[before for before, _ in pads] + [after for _, after in pads],
    )
    return Stored(name, (0, 2, 3, 1))


def _dot(graph: _Graph, equation: Any, a: Value, b: Value) -> Value:
    """Multiplies an array by a constant along any axes."""
    (contracted, _) = equation.params["dimension_numbers"]
    x_first = isinstance(a, Stored)
    x, matrix, summed, of_matrix = (a, b, *contracted) if x_first else (b, a, *reversed(contracted))
    shape = equation.invars[0 if x_first else 1].aval.shape
    free = [axis for axis in range(len(shape)) if axis not in summed]
    others = [axis for axis in range(matrix.ndim) if axis not in of_matrix]
    sizes = [matrix.shape[axis] for axis in others]
    matrix = matrix.transpose([*of_matrix, *others]).reshape(math.prod(matrix.shape[i] for i in of_matrix), -1)
    rank = len(shape)
    if len(summed) == len(others) == 1 and x.order[summed[0]] >= rank - 2:  # in place, along one of the last two axes
        place = x.order[summed[0]]
        name = graph.node("MatMul", x.name, matrix) if place == rank - 1 else graph.node("MatMul", matrix.T, x.name)
        kept, new = [x.order[axis] for axis in free], [place]
    else:
        name = graph.in_order(x, [*free, *summed])
        if len(summed) > 1:
            name = graph.node("Reshape", name, _shape([*(shape[axis] for axis in free), len(matrix)]))
        name = graph.node("MatMul", name, matrix)
        if len(others) != 1:
            name = graph.node("Reshape", name, _shape([*(shape[axis] for axis in free), *sizes]))
        kept, new = [*range(len(free))], [*range(len(free), len(free) + len(others))]
    return Stored(name, tuple(kept + new if x_first else new + kept))


def _shape(dims: Sequence[Any]) -> np.ndarray:
    """Returns a shape for Reshape, in which one size may be unknown."""
    return np.array([dim if layers.is_known(dim) else -1 for dim in dims], np.int64)


def _reshape(graph: _Graph, equation: Any, x: Value) -> Value:
    shape = equation.outvars[0].aval.shape
    name = graph.in_order(x, range(len(equation.invars[0].aval.shape)))
    return Stored(graph.node("Reshape", name, _shape(shape)), tuple(range(len(shape))))


def _broadcast(graph: _Graph, equation: Any, x: Value) -> Value:
    """Inserts axes of size 1 and repeats along others of size 1."""
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    old = equation.invars[0].aval.shape
    name = graph.in_order(x, range(len(old)))
    if new := [axis for axis in range(len(shape)) if axis not in kept]:
        name = graph.node("Unsqueeze", name, np.array(new, np.int64))
    repeated = [axis for axis, size in enumerate(shape) if axis in new or old[kept.index(axis)] != size]
    if any(shape[axis] != 1 for axis in repeated):
        sizes = [size if axis in repeated else 1 for axis, size in enumerate(shape)]
        name = graph.node("Expand", name, np.array(sizes, np.int64))
    return Stored(name, tuple(range(len(shape))))


def _reduce(kind: str) -> Callable[..., Value]:
    def apply(graph: _Graph, equation: Any, x: Stored) -> Value:
        places = [x.order[axis] for axis in equation.params["axes"]]
        kept = [place for place in x.order if place not in places]
        if kind == "ArgMax":
            name = graph.node("Cast", graph.node(kind, x.name, axis=places[0], keepdims=0), to=_dtype(graph, equation))
        else:
            name = graph.node(kind, x.name, np.array(places, np.int64), keepdims=0)
        return Stored(name, tuple(sorted(kept).index(place) for place in kept))

    return apply


def _slice(graph: _Graph, equation: Any, x: Stored) -> Value:
    p, shape = equation.params, equation.invars[0].aval.shape
    strides = p["strides"] or (1,) * len(shape)
    cut = [i for i, size in enumerate(shape) if (p["start_indices"][i], p["limit_indices"][i], strides[i]) != (0, size, 1)]
    columns = (p["start_indices"], p["limit_indices"], x.order, strides)
    bounds = [np.array([column[axis] for axis in cut], np.int64) for column in columns]
    return Stored(graph.node("Slice", x.name, *bounds), x.order)


def _concatenate(graph: _Graph, equation: Any, *values: Value) -> Value:
    order = next(value.order for value in values if isinstance(value, Stored))
    names = [graph.in_order(value, np.argsort(order)) for value in values]
    return Stored(graph.node("Concat", *names, axis=order[equation.params["dimension"]]), order)


def _reverse(graph: _Graph, equation: Any, x: Stored) -> Value:
    name = x.name
    for axis in equation.params["dimensions"]:
        indices = np.arange(equation.invars[0].aval.shape[axis])[::-1]
        name = graph.node("Gather", name, np.ascontiguousarray(indices), axis=x.order[axis])
    return Stored(name, x.order)


def _transpose(graph: _Graph, equation: Any, x: Stored) -> Value:
    return Stored(x.name, tuple(x.order[axis] for axis in equation.params["permutation"]))


def _cast(graph: _Graph, equation: Any, x: Stored) -> Value:
    return Stored(graph.node("Cast", x.name, to=_dtype(graph, equation)), x.order)


def _dtype(graph: _Graph, equation: Any) -> int:
    return graph.onnx.helper.np_dtype_to_tensor_dtype(equation.outvars[0].aval.dtype)


def _exp(graph: _Graph, equation: Any, x: Stored) -> Value:
    return Stored(graph.node("Exp", x.name), x.order)


# By the name of JAX's primitive: (graph, its equation, its inputs) -> its output.
OPERATIONS: dict[str, Callable[..., Value]] = {
    "add": _binary("Add"),
    "argmax": _reduce("ArgMax"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _binary("Div"),
    "dot_general": _dot,
    "exp": _exp,
    "max": _binary("Max"),
    "mul": _binary("Mul"),
    "name": lambda graph, equation, x: x,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _max_pool,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "squeeze": _reshape,
    "stop_gradient": lambda graph, equation, x: x,
    "sub": _binary("Sub"),
    "transpose": _transpose,
}
