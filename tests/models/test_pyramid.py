"""The convolution over the pyramid: factored equals plain, in values and in all gradients."""

import jax
import numpy as np
import pytest

from pspnet_jax.models.pyramid import PyramidConv
from tests.models import reference

TOLERANCE = 5e-6  # in standard deviations, in float32; up to 2.3e-6 observed


@pytest.mark.parametrize(
    ("kernel_size", "align_corners", "level_channels", "size"),
    [
        (3, True, 2, (11, 7)),
        (3, False, 2, (7, 13)),
        (1, True, 2, (9, 5)),
        (1, False, 2, (11, 7)),
        (3, True, 8, (5, 9)),  # without reduction every level is as wide as x
        (3, False, 8, (3, 5)),  # fewer features than bins: the 6 x 6 level is downsampled
    ],
)
def test_factored_equals_plain(kernel_size, align_corners, level_channels, size):
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    x, levels = noise(2, *size, 8), [noise(2, bins, bins, level_channels) for bins in (1, 2, 3, 6)]
    kernel, cotangent = noise(kernel_size, kernel_size, 8 + 4 * level_channels, 5), noise(2, *size, 5)

    def value_and_gradients(factored: bool) -> tuple[jax.Array, tuple]:
        module = PyramidConv(5, kernel_size, align_corners, factored)
        value, pull_back = jax.vjp(lambda k, *inputs: module.apply({"params": {"kernel": k}}, *inputs), kernel, x, levels)
        return value, pull_back(cotangent)

    compute = jax.jit(value_and_gradients, static_argnums=0)
    value, *gradients = jax.tree.leaves(jax.tree.map(reference.relative_error, compute(True), compute(False)))
    print(f"factored against plain, in standard deviations: values {value:.1e}, gradients {max(gradients):.1e}")
    assert max(value, *gradients) < TOLERANCE


def test_plain_is_the_convolution_of_the_concatenation():
    random = np.random.default_rng(1)
    x, kernel = (random.normal(size=shape).astype(np.float32) for shape in ((2, 7, 5, 4), (3, 3, 10, 6)))
    levels = [random.normal(size=(2, bins, bins, 3)) for bins in (2, 3)]
    concatenated = np.concatenate([x, *(reference.resize(level, 7, 5, True) for level in levels)], -1)
    y = PyramidConv(6, 3, True, False).apply({"params": {"kernel": kernel}}, x, levels)
    assert reference.relative_error(y, reference.convolve(concatenated, kernel)) < TOLERANCE
