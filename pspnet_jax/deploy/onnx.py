"""ONNX: writes the operations that JAX traces as nodes of a graph.

The converters at hand do not do: tf2onnx 1.17 (from TFLite) gives labels a type that ONNX forbids, fails for some heads and
fixes the number of images; jax2onnx 0.17 drops the padding of max-pooling without a message and needs an older
orbax-checkpoint than ours.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.extend import core

from pspnet_jax import files
from pspnet_jax.deploy.export import Program
from pspnet_jax.deploy.onnx_graph import Graph, Stored, Value
from pspnet_jax.deploy.onnx_operations import OPERATIONS
from pspnet_jax.errors import UserError
from pspnet_jax.models import layers


def write(program: Program, path: epath.Path) -> None:
    """Writes a file for `onnxruntime.InferenceSession(path).run(None, {"image": images})`.

    Raises:
      UserError: the package onnx is missing, or the network has an operation that this module does not know.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("--format onnx needs the package onnx: pip install 'pspnet_jax[export]'") from error
    program = program.in_float32()
    with layers.plain():
        traced = jax.make_jaxpr(program.__call__)(program.images)
    graph = Graph(onnx)
    [result] = _convert(graph, traced.jaxpr, traced.consts, [Stored("image", (0, 1, 2, 3))])
    model = graph.model(result, program.outputs, program.images.shape, traced.out_avals[0].shape)
    with files.atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _convert(graph: Graph, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """Adds the operations of a jaxpr, and returns its outputs."""
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        if isinstance(literal := atom, core.Literal):
            return np.asarray(literal.val, literal.aval.dtype)  # type: ignore[attr-defined]
        return values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        values |= dict(zip(equation.outvars, _apply(graph, equation, given), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    """Returns the outputs of one equation; what does not depend on the images is computed."""
    name, parameters = equation.primitive.name, equation.params
    for inner in ("jaxpr", "call_jaxpr"):
        if inner in parameters:  # a function of JAX, such as relu
            return _convert(graph, parameters[inner].jaxpr, parameters[inner].consts, inputs)
    if all(isinstance(value, np.ndarray) for value in inputs):
        found = equation.primitive.bind(*inputs, **parameters)
        return [np.asarray(array) for array in (found if equation.primitive.multiple_results else [found])]
    if name not in OPERATIONS:
        raise UserError(f"--format onnx: the network has the operation {name}, which this version cannot write as ONNX")
    return [OPERATIONS[name](graph, equation, *inputs)]
