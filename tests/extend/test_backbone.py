"""Another backbone: a small ConvNeXt (Liu et al. 2022) with output stride 8, under the pyramid and its heads."""

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax import losses, models, optimizers
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), feature_group_count=channels, name="depthwise")(x)
        y = nn.Dense(4 * channels, name="expand")(nn.LayerNorm(name="norm")(y))
        y = nn.Dense(channels, name="project")(nn.gelu(y))
        return x + self.param("scale", nn.initializers.constant(0.1), (channels,)) * y


class ConvNeXt(nn.Module):
    depths: tuple[int, ...] = (1, 1, 2, 1)
    widths: tuple[int, ...] = (8, 16, 24, 32)

    @nn.compact
    def __call__(self, images, train):
        x = nn.LayerNorm()(nn.Conv(self.widths[0], (4, 4), 4, name="stem")(images))
        stages = []
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if i:
                x = nn.Conv(width, (2, 2), 2 if i == 1 else 1, name=f"downsample{i}")(nn.LayerNorm()(x))
            for j in range(depth):
                x = Block(name=f"stage{i}_block{j}")(x)
            stages.append(x)
        return stages[2], stages[3]


def test_convnext_under_the_pyramid_learns(tmp_path, logged):
    config = small_config(steps=12)
    model = models.PSPNet(
        backbone=ConvNeXt(),
        pyramid=models.Pyramid(bins=(1, 2)),
        head=models.PyramidHead(num_classes=3),
        auxiliary_head=models.AuxiliaryHead(num_classes=3),
    )
    loss = losses.build(config)
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    state = fit(config, model=model, loss=loss, optimizer=optimizer, batches=noise, evaluate=None, workdir=tmp_path)
    assert state.params["backbone"]["stage2_block1"]["depthwise"]["kernel"].shape == (7, 7, 1, 24)
    assert model.apply(state.variables, jnp.zeros((1, 40, 56, 3)), train=False).shape == (1, 40, 56, 3)
    values = logged("loss")
    assert sum(values[-3:]) < 0.7 * sum(values[:3])
