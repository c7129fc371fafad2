"""Dilations and strides, proven by the input positions that one output position reads; sizes; error messages."""

import itertools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.errors import UserError
from pspnet_jax.models import resnet
from pspnet_jax.models.layers import ConvNorm

pytestmark = pytest.mark.slow


def backbone(**fields: object) -> resnet.ResNet:
    return resnet.ResNet(**{"width": 8} | fields)


def positive_variables(module: nn.Module, x: jax.Array) -> dict:
    """Returns weights that keep every ReLU active on positive inputs, so that gradients show every position read."""

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        value = {"kernel": 1 / np.prod(leaf.shape[:-1]), "mean": 0, "bias": 0}.get(path[-1].key, 1)
        return np.full(leaf.shape, value, np.float32)

    shapes = jax.eval_shape(lambda key: module.init(key, x, False), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def reads(function: Callable[[jax.Array], jax.Array], x: jax.Array, row: int, column: int) -> set[tuple[int, int]]:
    """Returns the positions of x, relative to the strided position, on which function(x)[:, row, column] depends."""

    def at_position(x: jax.Array) -> tuple[jax.Array, int]:
        y = function(x)
        return y[0, row, column].sum(), -(-x.shape[1] // y.shape[1])

    gradient, stride = jax.jit(jax.grad(at_position, has_aux=True))(x)
    rows, columns = np.nonzero(np.abs(gradient[0]).sum(-1))
    return {(int(r - stride * row), int(c - stride * column)) for r, c in zip(rows, columns, strict=True)}


def square(*offsets: int) -> set[tuple[int, int]]:
    return set(itertools.product(offsets, offsets))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (resnet.Bottleneck(4, 1, 1, ConvNorm), square(-1, 0, 1)),
        (resnet.Bottleneck(4, 1, 2, ConvNorm), square(-2, 0, 2)),
        (resnet.Bottleneck(4, 1, 4, ConvNorm), square(-4, 0, 4)),
        (resnet.Bottleneck(4, 2, 1, ConvNorm, "conv3x3"), square(-1, 0, 1)),
        (resnet.Bottleneck(4, 2, 1, ConvNorm, "conv1x1"), square(-2, 0, 2)),  # the 3x3 sees every second pixel
        (resnet.BasicBlock(4, 1, 2, ConvNorm), square(-3, -2, -1, 0, 1, 2, 3)),  # {-2, 0, 2} + {-1, 0, 1}
        (resnet.BasicBlock(4, 1, 4, ConvNorm), square(-5, -4, -3, -1, 0, 1, 3, 4, 5)),
    ],
)
def test_a_block_reads_the_positions_given_by_its_stride_and_dilation(block, expected):
    x = jnp.ones((1, 17, 19, 8))
    variables = positive_variables(block, x)
    center = 8 // block.stride
    assert reads(lambda x: block.apply(variables, x, False), x, center, center) == expected


@pytest.mark.parametrize(
    ("output_stride", "first_block_dilation", "third", "fourth"),
    [
        (8, "full", range(-12, 13, 2), range(-12, 13, 4)),  # six blocks of dilation 2, three of dilation 4
        (8, "half", range(-11, 12), range(-10, 11, 2)),  # but the first blocks have 1 and 2
        (16, "half", None, range(-5, 6)),  # three blocks of dilations 1, 2, 2
    ],
)
def test_a_stage_reads_the_positions_given_by_its_dilations(output_stride, first_block_dilation, third, fourth):
    module = backbone(output_stride=output_stride, first_block_dilation=first_block_dilation)
    images = jnp.ones((1, 25 * output_stride, 27 * output_stride, 3))
    variables = positive_variables(module, images)

    def stage(index: int, features: jax.Array) -> jax.Array:
        """Returns output 0 or 1 of the backbone if the last block before that stage returns these features."""
        before = ("layer2_block3", "layer3_block5")[index]

        def interceptor(call, args, kwargs, context):
            return features if context.module.name == before and context.method_name == "__call__" else call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            return module.apply(variables, images, False)[index]

    for index, channels, expected in ((0, 64, third), (1, 128, fourth)):
        if expected is not None:
            features = jnp.ones((1, 25, 27, channels))
            assert reads(lambda x, i=index: stage(i, x), features, 12, 13) == square(*expected)


@pytest.mark.parametrize("stem", resnet.STEMS)
@pytest.mark.parametrize(
    ("output_stride", "sizes"),
    [
        (8, {33: 5, 47: 6, 320: 40, 473: 60, 512: 64, 713: 90}),
        (16, {33: 3, 47: 3, 320: 20, 473: 30, 512: 32, 713: 45}),
        (32, {33: 2, 47: 2, 320: 10, 473: 15, 512: 16, 713: 23}),
    ],
)
def test_every_stride_halves_the_size_and_rounds_up(stem, output_stride, sizes):
    module = backbone(depth=18, stem=stem, output_stride=output_stride)
    for height, width in ((33, 47), (473, 320), (512, 713)):
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        (third, fourth), _ = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, False), images)
        assert fourth.shape == (1, sizes[height], sizes[width], 64)
        scale = min(output_stride, 16)
        assert third.shape == (1, -(-height // scale), -(-width // scale), 32)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("depth", 51, "18, 34, 50, 101, 152, 269"),
        ("stem", "wide", "'deep', 'deep32', 'conv7'"),
        ("stride_in", "conv5x5", "'conv3x3', 'conv1x1'"),
        ("first_block_dilation", "third", "'full', 'half'"),
        ("output_stride", 4, "8, 16, 32"),
        ("freeze", "layer5", "'', 'stem', 'layer1', 'layer2', 'layer3', 'layer4'"),
    ],
)
def test_a_wrong_field_is_refused_with_the_choices(field, value, choices):
    with pytest.raises(UserError, match=re.escape(f"{field}={value!r}: expected one of {choices}")):
        jax.eval_shape(lambda: backbone(**{field: value}).init(jax.random.key(0), jnp.ones((1, 33, 33, 3)), False))


@pytest.mark.parametrize(("remat", "frozen_norm"), [("norm", False), ("none", True)])
def test_equal_blocks_in_a_loop_compute_the_same(monkeypatch, remat, frozen_norm):
    """Features, running statistics and gradients of ResNet-34 are those of separate blocks, and variables keep their names."""
    module = backbone(depth=34, remat=remat, frozen_norm=frozen_norm)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 33, 3)), jnp.float32)

    def run() -> tuple:
        variables = module.init(jax.random.key(0), x, False)

        def total(params: dict) -> tuple:
            features, updates = module.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
            return sum(jnp.square(y).mean() for y in features), (features, updates)

        step = jax.jit(jax.grad(total, has_aux=True))
        return step(variables["params"]), step.lower(variables["params"]).as_text().count("stablehlo.while")

    separate, without_loops = run()
    monkeypatch.setattr(resnet, "LOOP", 3)
    together, loops = run()
    assert jax.tree.structure(together) == jax.tree.structure(separate)
    errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-6)), together, separate)
    print(f"relative differences up to {max(jax.tree.leaves(errors)):.1e}; {loops} loops")
    assert max(jax.tree.leaves(errors)) < 1e-4
    assert (without_loops, loops) == (0, 4)  # forward and backward in layer2 and layer3


def test_frozen_stages_compute_as_in_evaluation_and_get_no_gradient(monkeypatch):
    monkeypatch.setitem(resnet.BLOCKS, 18, (1, 1, 1, 1))  # compiles in half the time
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 33, 3)), jnp.float32)
    variables = positive_variables(backbone(depth=18, stem="conv7"), x)

    def gradient_of(freeze: str) -> Callable[[dict], tuple]:
        module = backbone(depth=18, stem="conv7", freeze=freeze)

        def total(params: dict) -> tuple:
            features, updates = module.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
            return sum(jnp.square(y).mean() for y in features), updates["batch_stats"]

        return jax.jit(jax.grad(total, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})

    gradient, statistics = gradient_of("layer2")(variables["params"])
    for module, tree in gradient.items():
        moved = jax.tree.map(lambda a, b: (a != b).any(), statistics[module], variables["batch_stats"][module])
        learns = module.startswith(("layer3_", "layer4_"))
        assert any((leaf != 0).any() for leaf in jax.tree.leaves(tree)) == any(jax.tree.leaves(moved)) == learns, module
    programs = [gradient_of(freeze).lower(variables["params"]).as_text() for freeze in ("", "stem", "layer2", "layer4")]
    counts = [program.count("stablehlo.convolution(") for program in programs]
    assert sorted(set(counts), reverse=True) == counts  # the frozen stages' gradients are not computed
    assert counts[-1] == 0
