"""Convolutions with fewer multiplications agree with direct ones, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.models import cpu, layers

pytestmark = pytest.mark.slow


def direct(x, kernel, dilation):
    padding, dilations = [(dilation, dilation)] * 2, (dilation, dilation)
    options = {"rhs_dilation": dilations, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, **options)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(12, 16), (13, 7), (1, 2)])
def test_winograd_equals_the_direct_convolution(size, dilation):
    rng = np.random.default_rng(0)
    x, kernel, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, *size, 5), (3, 3, 5, 4), (2, *size, 4)))

    def value_and_gradients(function):
        total, pullback = jax.vjp(lambda x, kernel: function(x, kernel, dilation), x, kernel)
        return total, *pullback(weights)

    both = zip(value_and_gradients(cpu.winograd), value_and_gradients(direct), strict=True)
    errors = [float(jnp.abs(a - b).max() / b.std()) for a, b in both]
    print("values and gradients differ by", *(f"{error:.1e}" for error in errors), "standard deviations")
    assert max(errors) < 1e-5


def test_winograd_of_bfloat16_is_no_less_precise_than_the_direct_convolution():
    """It computes in float32, so only its output is rounded."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((1, 12, 12, 64), (3, 3, 64, 8)))
    exact = direct(x.astype(jnp.float32), kernel.astype(jnp.float32), 1)
    ours, plain = cpu.winograd(x, kernel), direct(x, kernel, 1)
    assert ours.dtype == jnp.bfloat16
    errors = [float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) for y in (ours, plain)]
    print("relative errors of Winograd and of the direct convolution:", *(f"{error:.2e}" for error in errors))
    assert 0 < errors[0] <= 1.01 * errors[1]


def test_a_function_can_be_another_where_it_is_differentiated():
    function = cpu.if_differentiated(lambda x, kernel: 3 * x * kernel, otherwise=lambda x, kernel: x - kernel)
    x, kernel = jnp.float32(5), jnp.float32(2)
    assert function(x, kernel) == 3
    value, gradients = jax.value_and_grad(function, (0, 1))(x, kernel)
    assert (value, *gradients) == (30, 6, 15)


@pytest.mark.parametrize(
    ("images", "channels", "stride", "padding", "uses"),
    [
        ((1, 128, 128), 91, 1, "SAME", True),
        ((1, 128, 128), 91, 1, [(2, 2)] * 2, True),
        ((1, 128, 128), 90, 1, "SAME", False),
        ((4, 64, 128), 91, 1, "SAME", False),
        ((1, 128, 128), 91, 2, "SAME", False),
        ((1, 128, 128), 91, 1, "VALID", False),
    ],
)
def test_only_large_convolutions_that_keep_the_size_use_it_and_only_on_cpus(images, channels, stride, padding, uses):
    x, kernel = jnp.zeros((*images, channels)), jnp.zeros((3, 3, channels, channels))
    dilation = (2, 2) if padding != "SAME" else (1, 1)
    compute = jax.jit(lambda x, kernel: layers.convolve(x, kernel, (stride, stride), padding, rhs_dilation=dilation))
    for platform, expected in {"cpu": uses, "tpu": False, "cuda": False}.items():
        text = compute.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert ("convolution" not in text) == expected, platform


def test_winograd_adds_up_parts_of_the_channels(monkeypatch):
    """Values and gradients are those of all channels at once."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 6, 6, 8), (3, 3, 8, 4)))

    def compute():
        return jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(cpu.winograd(x, kernel))), (0, 1))(x, kernel)

    together = compute()
    monkeypatch.setattr(cpu, "CHANNELS", 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), compute(), together)
