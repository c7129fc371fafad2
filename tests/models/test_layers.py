"""Layers against hand-worked numbers and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.errors import UserError
from pspnet_jax.models import layers
from tests.models import reference

pytestmark = pytest.mark.slow

# Kernel size (and stride) that pools a crop's features to b x b, by crop and b; 473 and 713 are in the authors' release.
FIXED_KERNELS = {
    320: {1: 40, 2: 20, 4: 10, 8: 5},
    473: {1: 60, 2: 30, 3: 20, 6: 10},
    512: {1: 64, 2: 32, 4: 16, 8: 8},
    713: {1: 90, 2: 45, 3: 30, 6: 15},
}
# (samples, align_corners, interpolated), worked out by hand from the two conventions.
RESIZED = [
    ([2, 6], True, [2, 4, 6]),
    ([2, 6, 0], True, [2, 4, 6, 3, 0]),
    ([2, 6, 0, 8, 4], True, [2, 4]),  # the two ends: no antialiasing
    ([2, 6, 0], True, [2]),
    ([2, 6], False, [2, 3, 5, 6]),  # centers at -1/4, 1/4, 3/4, 5/4
    ([2, 6, 0], False, [3, 1.5]),  # centers at 1/4 and 7/4
    ([2, 6, 0], False, [6]),
    ([5], True, [5, 5, 5]),
    ([5], False, [5, 5, 5]),
]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("samples", "align_corners", "expected"), RESIZED)
def test_resize_by_hand(samples, align_corners, expected):
    row = layers.resize_matrix(len(samples), len(expected), align_corners) @ np.array(samples, np.float32)
    np.testing.assert_array_equal(row, np.array(expected, np.float32))


def test_resize_by_hand_in_two_dimensions():
    x = jnp.array([[0, 2], [4, 10]], jnp.float32)[None, :, :, None]
    aligned = layers.resize(x, 3, 5, align_corners=True)[0, :, :, 0]
    np.testing.assert_array_equal(aligned, [[0, 0.5, 1, 1.5, 2], [2, 3, 4, 5, 6], [4, 5.5, 7, 8.5, 10]])
    centered = layers.resize(x, 2, 4, align_corners=False)[0, :, :, 0]
    np.testing.assert_array_equal(centered, [[0, 0.5, 1.5, 2], [4, 5.5, 8.5, 10]])


@pytest.mark.parametrize("align_corners", [True, False])
def test_resize_equals_its_definition_up_and_down(align_corners):
    x = noise(2, 7, 5, 3)
    for height, width in ((11, 13), (4, 3), (1, 20), (30, 2)):
        expected = reference.resize(x, height, width, align_corners)
        np.testing.assert_allclose(layers.resize(x, height, width, align_corners), expected, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_resize_weights_partition_unity_and_the_same_size_is_the_identity(align_corners):
    for size in range(1, 9):
        for new_size in range(1, 20):
            matrix = layers.resize_matrix(size, new_size, align_corners)
            np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-7)
            assert matrix.min() >= 0
            assert (matrix > 0).sum(1).max() <= 2
        np.testing.assert_array_equal(layers.resize_matrix(size, size, align_corners), np.eye(size))
    x = noise(1, 6, 9, 2)
    np.testing.assert_array_equal(layers.resize(x, 6, 9, align_corners), x)


@pytest.mark.parametrize("crop", FIXED_KERNELS)
def test_adaptive_average_pooling_equals_the_fixed_kernels(crop):
    features = -(-crop // 8)
    x = noise(1, features, features, 2)
    for bins, kernel in FIXED_KERNELS[crop].items():
        assert bins * kernel == features
        average = x.reshape(1, bins, kernel, bins, kernel, 2).mean((2, 4), dtype=np.float64)
        np.testing.assert_allclose(layers.adaptive_average_pool(x, bins), average, atol=2e-7)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_adaptive_pooling_equals_its_definition_where_bins_do_not_divide(bins):
    for height, width in ((7, 10), (5, 13), (4, 1)):  # the last is smaller than most bins: cells overlap
        x = noise(2, height, width, 3)
        np.testing.assert_allclose(layers.adaptive_average_pool(x, bins), reference.adaptive_pool(x, bins, "mean"), atol=3e-7)
        np.testing.assert_array_equal(layers.adaptive_max_pool(x, bins), reference.adaptive_pool(x, bins, "max"))


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_both_ways_of_max_pooling_agree(size):
    """Values and gradients, where no values of a window are tied."""
    x, weights = jnp.asarray(noise(2, *size, 3)), jnp.asarray(noise(2, -(-size[0] // 2), -(-size[1] // 2), 3))
    found, expected = (
        jax.value_and_grad(lambda x, pool=pool: jnp.vdot(pool(x), weights))(x)
        for pool in (layers.max_pool_by_windows, layers.max_pool_by_slices)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def conv_norm_of_ones(**fields: object) -> tuple[layers.ConvNorm, dict]:
    """Returns a ConvNorm whose convolution is the identity on one channel, with running mean 0 and variance 1."""
    module = layers.ConvNorm(1, 1, relu=False, **fields)
    variables = module.init(jax.random.key(0), jnp.ones((2, 1, 1, 1)), train=False)
    return module, variables | {"params": variables["params"] | {"conv": {"kernel": jnp.ones((1, 1, 1, 1))}}}


def test_batch_norm_by_hand():
    x = jnp.array([0, 4], jnp.float32).reshape(2, 1, 1, 1)  # mean 2, variance 4
    module, variables = conv_norm_of_ones()
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), np.array([-2, 2]) / np.sqrt(4 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["bn"]["mean"], [0.9 * 0 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["bn"]["var"], [0.9 * 1 + 0.1 * 4], rtol=1e-6)
    y = module.apply(variables | updates, x, train=False)
    np.testing.assert_allclose(y.ravel(), np.array([-0.2, 3.8]) / np.sqrt(1.3 + 1e-5), rtol=1e-6)


def test_frozen_batch_norm_uses_and_keeps_the_running_statistics():
    x = noise(2, 3, 3, 4)
    module = layers.ConvNorm(5, frozen_norm=True)
    variables = reference.random_variables(module, x, False)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, layers.ConvNorm(5).apply(variables, x, train=False))
    jax.tree.map(np.testing.assert_array_equal, updates, {"batch_stats": variables["batch_stats"]})


def test_batch_norm_refuses_to_train_on_one_value_per_channel():
    x = jnp.full((1, 1, 1, 1), 3.0)
    module, variables = conv_norm_of_ones()
    with pytest.raises(UserError, match=r"one value per channel, whose variance is 0: train on 2 or more images"):
        module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(module.apply(variables, x, train=False), x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (3, 2, 2), (7, 2, 1)]
)
def test_conv_norm_equals_its_definition_and_keeps_the_input_dtype(size, stride, dilation):
    x = noise(2, 9, 6, 4)
    module = layers.ConvNorm(3, size, stride, dilation, relu=False)
    variables = module.init(jax.random.key(0), x, train=False)  # running mean 0, variance 1
    y = module.apply(variables, x, train=False)
    assert y.shape == (2, -(-9 // stride), -(-6 // stride), 3)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    np.testing.assert_allclose(y * np.sqrt(1 + 1e-5), reference.convolve(x, kernel, stride, dilation), atol=2e-5)
    assert module.apply(variables, x.astype(jnp.bfloat16), train=False).dtype == jnp.bfloat16
