"""JAX's operations as nodes of ONNX: those of our networks, as they are traced within `models.layers.plain`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pspnet_jax.deploy.onnx_graph import Graph, Stored, Value
from pspnet_jax.models import layers

Operation = Callable[..., Value]  # (graph, the equation of the jaxpr, its inputs) -> its output; some input is no constant


def _binary(kind: str) -> Operation:
    def apply(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
        first = a if isinstance(a, Stored) else b
        assert isinstance(first, Stored)
        order, axes = first.order, np.argsort(first.order)
        if isinstance(b, np.ndarray):
            per_channel = b.ndim == 0 or b.size == b.shape[-1]
            if kind in AFFINE and per_channel and (found := graph.scaled_convolution(first.name, *AFFINE[kind](b))):
                return Stored(found, order)  # batch normalization becomes part of the convolution
            if kind == "Max" and b.ndim == 0 and b == 0:
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


def _convolution(graph: Graph, equation: Any, x: Value, kernel: np.ndarray) -> Value:
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


def _max_pool(graph: Graph, equation: Any, x: Value) -> Value:
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


def _dot(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
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


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    shape = equation.outvars[0].aval.shape
    name = graph.in_order(x, range(len(equation.invars[0].aval.shape)))
    return Stored(graph.node("Reshape", name, _shape(shape)), tuple(range(len(shape))))


def _broadcast(graph: Graph, equation: Any, x: Value) -> Value:
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


def _reduce(kind: str) -> Operation:
    def apply(graph: Graph, equation: Any, x: Stored) -> Value:
        places = [x.order[axis] for axis in equation.params["axes"]]
        kept = [place for place in x.order if place not in places]
        if kind == "ArgMax":
            name = graph.node("Cast", graph.node(kind, x.name, axis=places[0], keepdims=0), to=_dtype(graph, equation))
        else:
            name = graph.node(kind, x.name, np.array(places, np.int64), keepdims=0)
        return Stored(name, tuple(sorted(kept).index(place) for place in kept))

    return apply


def _slice(graph: Graph, equation: Any, x: Stored) -> Value:
    p, shape = equation.params, equation.invars[0].aval.shape
    strides = p["strides"] or (1,) * len(shape)
    cut = [i for i, size in enumerate(shape) if (p["start_indices"][i], p["limit_indices"][i], strides[i]) != (0, size, 1)]
    columns = (p["start_indices"], p["limit_indices"], x.order, strides)
    bounds = [np.array([column[axis] for axis in cut], np.int64) for column in columns]
    return Stored(graph.node("Slice", x.name, *bounds), x.order)


def _concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
    order = next(value.order for value in values if isinstance(value, Stored))
    names = [graph.in_order(value, np.argsort(order)) for value in values]
    return Stored(graph.node("Concat", *names, axis=order[equation.params["dimension"]]), order)


def _reverse(graph: Graph, equation: Any, x: Stored) -> Value:
    name = x.name
    for axis in equation.params["dimensions"]:
        indices = np.arange(equation.invars[0].aval.shape[axis])[::-1]
        name = graph.node("Gather", name, np.ascontiguousarray(indices), axis=x.order[axis])
    return Stored(name, x.order)


def _transpose(graph: Graph, equation: Any, x: Stored) -> Value:
    return Stored(x.name, tuple(x.order[axis] for axis in equation.params["permutation"]))


def _cast(graph: Graph, equation: Any, x: Stored) -> Value:
    return Stored(graph.node("Cast", x.name, to=_dtype(graph, equation)), x.order)


def _dtype(graph: Graph, equation: Any) -> int:
    return graph.onnx.helper.np_dtype_to_tensor_dtype(equation.outvars[0].aval.dtype)


# By the name of JAX's primitive.
OPERATIONS: dict[str, Operation] = {
    "add": _binary("Add"),
    "argmax": _reduce("ArgMax"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _binary("Div"),
    "dot_general": _dot,
    "exp": lambda graph, equation, x: Stored(graph.node("Exp", x.name), x.order),
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
