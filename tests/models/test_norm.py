"""Batch normalization compared with Flax's and with float64."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.models.norm import BatchNorm


def random(*shape: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, 1, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_with_flax(dtype: str) -> None:
    """Outputs, running statistics and gradients, in training and in inference; the variables have the same names."""
    x, target = random(4, 5, 6, 8, mean=0.3).astype(dtype), random(4, 5, 6, 8)

    def step(module: nn.Module) -> tuple:
        variables = module.init(jax.random.key(0), x)
        params = jax.tree.map(lambda p: p + random(8), variables["params"])
        statistics = {"mean": random(8), "var": random(8) ** 2}  # variances are computed about the running mean

        def loss(params: dict, x: jax.Array) -> tuple:
            y, new = module.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
            return jnp.sum(y * target), (y, new["batch_stats"])

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    for running, stores in itertools.product((False, True), (False, True)):
        ours = step(BatchNorm(running, stores))
        flax = step(nn.BatchNorm(running, momentum=0.9, epsilon=1e-5, dtype=dtype))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), flax)
        errors = jax.tree.map(lambda a, b: float(abs(a.astype("f4") - b.astype("f4")).max()), ours, flax)
        difference = max(jax.tree.leaves(errors))
        print(f"largest difference, running={running}, store_difference={stores}: {difference:.1e}")
        assert difference < (1e-4 if dtype == "float32" else 0.04)


def test_mean_far_larger_than_deviation() -> None:
    """With a mean of 100 standard deviations, the running mean soon makes the variance precise, which Flax's never is."""
    x = random(16, 32, 32, 4, mean=100)
    exact = x.astype(np.float64).var((0, 1, 2))

    def error(module: nn.Module, steps: int) -> float:
        variables = module.init(jax.random.key(0), x)
        update = jax.jit(lambda variables: variables | module.apply(variables, x, mutable=["batch_stats"])[1])
        for _ in range(steps):
            variables = update(variables)
        before = variables["batch_stats"]["var"]
        batch_var = (update(variables)["batch_stats"]["var"] - 0.9 * before) / 0.1
        return float(abs(batch_var / exact - 1).max())

    first, ours, flax = error(BatchNorm(False), 0), error(BatchNorm(False), 50), error(nn.BatchNorm(False, momentum=0.9), 50)
    print(f"relative error of the variance: {first:.1e}, after 50 steps {ours:.1e}, with Flax's {flax:.1e}")
    assert ours < 1e-5 < flax


def test_recomputed_differences_take_no_memory() -> None:
    """As compiled: of four layers in a row, each stores its input, its output, and the difference from the mean, or not."""

    class Layers(nn.Module):
        stores: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(4):
                x = models.ConvNorm(16, store_difference=self.stores)(x, True)
            return x

    def memory(stores: bool) -> int:
        def loss(variables: dict, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(Layers(stores).apply(variables, x, mutable=["batch_stats"])[0]))

        x = jax.ShapeDtypeStruct((2, 64, 64, 16), jnp.float32)
        variables = jax.eval_shape(Layers(stores).init, jax.random.key(0), x)
        stats = jax.jit(jax.grad(loss)).lower(variables, x).compile().memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes

    less, more = memory(False), memory(True)
    print(f"{less / 2**20:.1f} instead of {more / 2**20:.1f} MiB")
    assert less < 0.8 * more
