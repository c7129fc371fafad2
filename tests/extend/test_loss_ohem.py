"""Another loss: cross-entropy over the harder half of each image's pixels, with gradient accumulation over 2 parts."""

import jax
import jax.numpy as jnp

from pspnet_jax import losses, optimizers
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config, small_model


def harder_half(outputs, batch, step):
    pixels = losses.pixel_cross_entropy(outputs[0], batch["label"]).reshape(len(batch["label"]), -1)
    middle = jnp.median(jax.lax.stop_gradient(pixels), axis=1, keepdims=True)
    kept = (pixels > middle).astype(jnp.float32)
    return {"hard_pixels": losses.Term(jnp.sum(kept * pixels), jnp.sum(kept))}, {}


def test_the_harder_half_is_learned(tmp_path, logged):
    config = small_config(steps=12)
    config.optimizer.accumulate = 2
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    fit(config, model=small_model(), loss=harder_half, optimizer=optimizer, batches=noise, evaluate=None, workdir=tmp_path)
    assert sum(logged("hard_pixels")[-3:]) < 0.7 * sum(logged("hard_pixels")[:3])
