"""Batch normalization (Ioffe and Szegedy 2015). Under jit, statistics are those of the whole batch, over all devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # of the running statistics
EPSILON = 1e-5  # added to variances


class BatchNorm(nn.Module):
    """Normalizes each channel, then scales and shifts it: [..., C] -> [..., C], in the input's dtype.

    Parameters "scale" and "bias", and running statistics "mean" and "var", are f32[C]. Statistics are computed in float32.
    Running variances are biased (torch stores n / (n - 1) times as much).
    """

    use_running_average: bool  # normalize with the running statistics, without updating them, instead of those of the batch
    store_difference: bool = True  # store x - mean for the gradient, instead of computing it again from x in training

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        mean, var = running_mean.value, running_var.value
        if not self.use_running_average:
            mean, var = moments(x, about=running_mean.value)
            if not self.is_initializing():
                running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
                running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        apply = _normalize if self.store_difference or self.use_running_average else jax.checkpoint(_normalize)
        return apply(x, mean, jax.lax.rsqrt(var + EPSILON) * scale, bias)


def _normalize(x: jax.Array, mean: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return ((x - mean) * scale + bias).astype(x.dtype)


def moments(x: jax.Array, about: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each channel's mean and variance over all other axes, f32[C] each, from [..., C].

    Both come from one pass over x: the variance is the mean square minus the squared mean, of x - about. In float32, this is
    precise if `about`, f32[C], is within some ten standard deviations of the mean, as a running mean soon is.
    """
    difference = x - jax.lax.stop_gradient(about)
    axes = tuple(range(x.ndim - 1))
    mean, mean_square = difference.mean(axes), jnp.square(difference).mean(axes)
    return about + mean, jnp.maximum(mean_square - jnp.square(mean), 0)
