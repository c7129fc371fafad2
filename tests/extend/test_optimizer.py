"""Another optimizer: Adam with layer-wise learning rates, half as high in each stage as in the next."""

import numpy as np
import optax

from pspnet_jax import losses, optimizers
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config, small_model

RATES = (("backbone/stage1/.*", 0.25), ("backbone/stage2/.*", 0.5), (".*", 1.0))


def test_layer_wise_rates(tmp_path):
    config, schedule = small_config(steps=1), optax.constant_schedule(1e-3)
    adam = optax.chain(optax.scale_by_adam(), optimizers.scale_by_rules(RATES), optax.scale_by_learning_rate(schedule))
    parts = {"model": small_model(), "optimizer": optimizers.Optimizer(adam, {"learning_rate": schedule})}
    state = fit(config, **parts, loss=losses.build(config), batches=noise, evaluate=None, workdir=tmp_path)
    biases = (state.params["backbone"]["stage1"], state.params["backbone"]["stage2"])  # Adam moves them from 0 by the rate
    moved = [np.abs(layer["bn"]["bias"]).max() for layer in biases] + [np.abs(state.params["head_bn"]["bias"]).max()]
    np.testing.assert_allclose(moved, [0.25e-3, 0.5e-3, 1e-3], rtol=0.01)
