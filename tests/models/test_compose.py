"""The default network keeps its parameter paths and its random numbers; users' own modules can replace its parts."""

import hashlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pspnet_jax import models
from tests.models.test_pspnet import small

pytestmark = pytest.mark.slow

IMAGES = (2, 41, 57, 3)
# Fields; SHA-256 of the signs of all initial values by path (signs are the same on every machine); SHA-256 of the channels that
# dropout keeps. The hashes were taken before the network was divided into modules.
NETWORKS = [
    ({}, "f86516b8bd2b81a3", "14ad1b1024fbd210"),
    (
        {"depth": 50, "stem": "conv7", "bins": (1, 3), "head_kernel": 1, "reduce_channels": False},
        "29d9733fbcb1e69f",
        "8d2dc717bf9c3914",
    ),
]


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def compiled(function: Callable) -> Callable:
    """Compiles without optimizations, in a quarter of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("fields", "initial", "dropped"), NETWORKS)
def test_initial_values_and_dropout_are_those_of_earlier_versions(fields, initial, dropped):
    model, images = small(dropout=0.5, **fields), jnp.zeros(IMAGES)
    variables = compiled(lambda key: model.init(key, images, train=False))(jax.random.key(3))
    signs = hashlib.sha256()
    for path, value in sorted(flat(variables).items()):
        signs.update(path.encode() + np.packbits(value > 0).tobytes())
    assert signs.hexdigest()[:16] == initial

    kept = {}

    def record(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dropout):
            return call(*args, **kwargs)
        kept["/".join(context.module.path)] = call(jnp.ones_like(args[0]))[:, 0, 0] > 0
        return args[0]

    def train(variables, key):
        with nn.intercept_methods(record):
            model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return kept

    masks = compiled(train)(variables, jax.random.key(7))
    assert sorted(masks) == ["auxiliary_classifier/Dropout_0", "classifier/Dropout_0"]
    digest = hashlib.sha256(b"".join(np.packbits(masks[path]).tobytes() for path in sorted(masks)))
    assert digest.hexdigest()[:16] == dropped


class TwoConvolutions(nn.Module):
    """A backbone with features of 8 and 16 channels, at strides 4 and 8."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        third = nn.relu(nn.Conv(8, (4, 4), 4, name="stem")(images))
        return third, nn.relu(nn.Conv(16, (2, 2), 2, name="stage")(third))


class MeanHead(nn.Module):
    """A head that adds the mean over the image to each pixel's scores."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, levels: list[jax.Array], train: bool) -> jax.Array:
        assert levels == []
        return nn.Dense(self.num_classes)(x) + nn.Dense(self.num_classes)(x.mean((1, 2), keepdims=True))


class DenseHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, third: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes)(third)


def test_users_can_replace_every_part():
    model = models.PSPNet(backbone=TwoConvolutions(), head=MeanHead(3), auxiliary_head=DenseHead(3))
    images = jax.random.normal(jax.random.key(1), (2, 32, 40, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    parameters = {path.rsplit("/", 1)[0] for path in flat(variables)}
    assert parameters == {
        "params/backbone/stem",
        "params/backbone/stage",
        "params/head/Dense_0",
        "params/head/Dense_1",
        "params/auxiliary_head/Dense_0",
    }
    params = variables["params"]
    third, fourth = TwoConvolutions().apply({"params": params["backbone"]}, images, train=True)
    scores = MeanHead(3).apply({"params": params["head"]}, fourth, [], train=True)
    auxiliary_scores = DenseHead(3).apply({"params": params["auxiliary_head"]}, third, train=True)
    logits, auxiliary = model.apply(variables, images, train=True)
    np.testing.assert_array_equal(logits.upsample(), models.resize(scores, 32, 40, align_corners=True))
    np.testing.assert_array_equal(auxiliary.upsample(), models.resize(auxiliary_scores, 32, 40, align_corners=True))
    np.testing.assert_array_equal(model.apply(variables, images, train=False), logits.upsample())


def test_our_pyramid_and_heads_work_on_another_backbone():
    parts = {"pyramid": models.Pyramid(bins=(1, 2)), "auxiliary_head": models.AuxiliaryHead(3)}
    model = models.PSPNet(backbone=TwoConvolutions(), head=models.PyramidHead(3), **parts)
    images = jnp.zeros((2, 32, 40, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)["params"])
    assert {
        path: value.shape for path, value in traverse_util.flatten_dict(params, sep="/").items() if path.endswith("kernel")
    } == {
        "backbone/stem/kernel": (4, 4, 3, 8),
        "backbone/stage/kernel": (2, 2, 8, 16),
        "pyramid/level0/conv/kernel": (1, 1, 16, 8),
        "pyramid/level1/conv/kernel": (1, 1, 16, 8),
        "head_conv/kernel": (3, 3, 32, 4),
        "classifier/kernel": (1, 1, 4, 3),
        "auxiliary_conv/conv/kernel": (3, 3, 8, 2),
        "auxiliary_classifier/kernel": (1, 1, 2, 3),
    }
