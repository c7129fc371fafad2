"""Another loss: soft Dice with squares (Milletari et al. 2016), a mean over images, with gradient accumulation over 2 parts."""

import jax
import jax.numpy as jnp

from pspnet_jax import losses, optimizers
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config, small_model


def squared_dice(outputs, batch, step):
    truth = jax.nn.one_hot(batch["label"], 3)  # zeros where the label is 255
    scores = jax.nn.softmax(outputs[0].upsample()) * truth.sum(-1, keepdims=True)
    overlap, size = (scores * truth).sum((1, 2)), (scores**2 + truth**2).sum((1, 2))
    dice = (2 * overlap / (size + 1e-6)).mean(-1)
    return {"dice": losses.Term(jnp.sum(1 - dice), jnp.float32(len(dice)))}, {}


def test_dice_is_learned(tmp_path, logged):
    config = small_config(steps=30)
    config.optimizer.accumulate = 2
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    fit(config, model=small_model(), loss=squared_dice, optimizer=optimizer, batches=noise, evaluate=None, workdir=tmp_path)
    assert sum(logged("dice")[-3:]) < 0.92 * sum(logged("dice")[:3])
