"""Another head: atrous spatial pyramid pooling (Chen et al. 2017) on our backbone, in place of the pyramid."""

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax import losses, models, optimizers
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config


class ASPP(nn.Module):
    num_classes: int
    channels: int = 16
    rates: tuple[int, ...] = (2, 4)

    @nn.compact
    def __call__(self, x, levels, train):
        branches = [models.ConvNorm(self.channels, 1, name="point")(x, train)]
        for rate in self.rates:
            branches.append(models.ConvNorm(self.channels, 3, dilation=rate, name=f"rate{rate}")(x, train))
        whole = models.ConvNorm(self.channels, 1, name="whole")(x.mean((1, 2), keepdims=True), train)
        branches.append(jnp.broadcast_to(whole, branches[0].shape))
        x = models.ConvNorm(self.channels, 1, name="project")(jnp.concatenate(branches, -1), train)
        return models.Classifier(self.num_classes, dropout=0.1, name="classifier")(x, train)


def test_aspp_on_our_backbone_learns(tmp_path, logged):
    config = small_config(steps=12)
    config.optimizer.learning_rate = 0.1
    backbone = models.ResNet(depth=18, width=8, output_stride=16)
    model = models.PSPNet(backbone=backbone, head=ASPP(num_classes=3), auxiliary_head=models.AuxiliaryHead(num_classes=3))
    loss = losses.build(config)
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    state = fit(config, model=model, loss=loss, optimizer=optimizer, batches=noise, evaluate=None, workdir=tmp_path)
    assert set(state.params["head"]) == {"point", "rate2", "rate4", "whole", "project", "classifier"}
    values = logged("loss")
    assert sum(values[-3:]) < 0.8 * sum(values[:3])
