"""The ONNX graph: what it consists of, and what cannot be written. Its values are compared in test_export.py."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from pspnet_jax.deploy import export
from pspnet_jax.deploy import onnx as writer
from pspnet_jax.errors import UserError
from pspnet_jax.models import layers
from tests.deploy import networks

onnx = pytest.importorskip("onnx", reason="needs the extra export")
from pspnet_jax.deploy.onnx_graph import Graph, Stored  # noqa: E402


@pytest.mark.slow
def test_convolutions_contain_their_batch_normalization(tmp_path):
    """Only that of the head, whose convolution is a sum over the pyramid levels, is left."""
    config = networks.make_config(3, depth=18, width=8, bins=(1, 2))
    shapes = jax.eval_shape(
        lambda: export.Program(config, {}).model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    writer.write(export.Program(config, variables, "labels", 0, (65, 73)), epath.Path(tmp_path) / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    print(kinds)
    convolutions = 16 + 4 + 3 + 2 + 1  # blocks, projections, stem, levels, head
    assert kinds["Conv"] == convolutions
    assert kinds["Relu"] == convolutions - 4
    assert (kinds["Mul"], kinds["BatchNormalization"], kinds["Einsum"]) == (1, 0, 0)
    [value] = model.graph.input
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == ["N", 65, 73, 3]


def convert(function, *shape: int) -> list:
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    order = tuple(range(len(shape)))
    return writer._convert(Graph(onnx), traced.jaxpr, traced.consts, [Stored("image", order)])


def test_an_unknown_operation_is_named():
    with pytest.raises(UserError, match="the network has the operation sin, which this version cannot write as ONNX"):
        convert(jnp.sin, 2, 3)


def test_what_does_not_depend_on_the_image_is_computed():
    [found] = convert(lambda x: jnp.sin(jnp.arange(3.0)) + 1, 2)
    np.testing.assert_allclose(found, np.sin([0, 1, 2]) + 1, rtol=1e-6)


def test_a_transposition_is_only_remembered():
    [found] = convert(lambda x: x.transpose(2, 0, 1), 2, 3, 4)
    assert found == Stored("image", (2, 0, 1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.einsum("ab,nbcd->nacd", MATRIX, x),
        lambda x: jnp.einsum("nbcd,da->nbca", x, MATRIX.T[:4]),
        lambda x: jnp.einsum("uda,nbcd->nubca", TENSOR, x),
        lambda x: jnp.einsum("udc,nbcd->nub", TENSOR, x),
        lambda x: jax.lax.slice_in_dim(x, 1, 3, axis=2).max((1, 2), keepdims=True) + x,
        lambda x: jnp.concatenate([x, jnp.flip(x, 3)], 1).transpose(3, 0, 2, 1).sum(2),
        lambda x: 1 / jnp.broadcast_to(jnp.exp(x)[:, :1], (2, 5, 3, 4)) - x.reshape(2, 5, 3, 4),
        lambda x: jax.nn.softmax(x, 1) * 3 - jnp.maximum(x, 0.5),
    ],
)
def test_operations_agree_with_numpy(function, tmp_path):
    """Along all axes, and stored in any order."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra dev")
    image = np.random.default_rng(0).integers(0, 9, (2, 5, 3, 4)).astype(np.uint8)
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):

        def reordered(x, order=order):
            x = x.astype(jnp.float32).transpose(order).transpose(np.argsort(order))
            return function(x)

        graph = Graph(onnx)
        traced = jax.make_jaxpr(reordered)(image)
        [result] = writer._convert(graph, traced.jaxpr, traced.consts, [Stored("image", (0, 1, 2, 3))])
        model = graph.model(result, "probabilities", image.shape, traced.out_avals[0].shape)
        onnx.checker.check_model(model, full_check=True)
        [found] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
        np.testing.assert_allclose(found, reordered(jnp.asarray(image)), rtol=1e-5)


MATRIX = np.random.default_rng(1).uniform(size=(6, 5)).astype(np.float32)
TENSOR = np.random.default_rng(2).uniform(size=(7, 4, 3)).astype(np.float32)


@pytest.mark.slow
def test_plain_networks_have_no_code_for_single_platforms():
    """And compute the same."""
    config = networks.make_config(3, depth=18, width=8, bins=(1, 2))
    program = export.Program(config, networks.random_variables(config, networks.random_images(2, 33, 33)), "probabilities")
    images = networks.random_images(1, 41, 33)
    with layers.plain():
        assert "platform_index" not in str(jax.make_jaxpr(program.__call__)(images))
        plain = jax.jit(program.__call__)(images)
    assert "platform_index" in str(jax.make_jaxpr(program.__call__)(images))
    np.testing.assert_allclose(plain, jax.jit(lambda images: program(images))(images), atol=1e-5)
