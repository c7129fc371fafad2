"""Softmax cross-entropy over the labeled pixels, and the weight of the auxiliary loss."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE


def count_labeled(labels: jax.Array) -> jax.Array:
    """Number of pixels that are not 255, at least 1, f32[]: the loss of a batch without a labeled pixel is 0, not NaN."""
    return jnp.maximum(jnp.sum(labels != IGNORE, dtype=jnp.float32), 1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum over the labeled pixels of -log softmax(logits)[label]: f32[N, H, W, K], uint8[N, H, W] -> f32[].

    Divide by `count_labeled` of the whole batch for the mean; a sum adds up over parts of the batch.
    """
    labeled = labels != IGNORE
    pixels = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(labeled, labels, 0).astype(jnp.int32))
    return jnp.sum(jnp.where(labeled, pixels, 0))


def auxiliary_weight(loss: ConfigDict, total_steps: int) -> optax.Schedule:
    """`config.loss`'s weight of the auxiliary loss by step: constant, or linear down to 0 at total_steps."""
    if loss.auxiliary_schedule == "constant":
        return optax.constant_schedule(loss.auxiliary_weight)
    return optax.linear_schedule(loss.auxiliary_weight, 0.0, total_steps)
