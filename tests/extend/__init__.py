"""Examples of extensions that leave the package unchanged. Each is one complete file, whose length `test_sizes` limits.

This module has the data and settings that they share.
"""

from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import base_config

CLASSES = ("dark", "gray", "light")


def small_config(steps: int) -> ConfigDict:
    """Returns a config for a small network: 33x33 crops, 8 images per step, metrics logged at each step."""
    config = base_config()
    config.model.update(depth=18, width=8, bins=(1, 2))
    config.dataset.class_names = CLASSES
    config.augment.crop = config.eval.crop = (33, 33)
    config.batch_size, config.total_steps = 8, steps
    config.optimizer.update(learning_rate=0.5, head_multiplier=1.0)
    config.every.log = 1
    return config


class TwoStages(nn.Module):
    """A minimal backbone."""

    @nn.compact
    def __call__(self, images, train):
        third = models.ConvNorm(16, stride=4, name="stage1")(images, train)
        return third, models.ConvNorm(32, stride=2, name="stage2")(third, train)


def small_model() -> models.PSPNet:
    """A network that compiles fast."""
    return models.PSPNet(TwoStages(), models.PyramidHead(num_classes=3), models.Pyramid(bins=(1, 2)))


def noise(start: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of noise with one class per image, given by its brightness; a tenth of the pixels is ignored."""
    while True:
        random = np.random.default_rng(start)
        labels = np.broadcast_to(random.integers(0, 3, (8, 1, 1), dtype=np.uint8), (8, 33, 33))
        images = 80 * labels[..., None] + random.integers(0, 80, (8, 33, 33, 3), dtype=np.uint8)
        yield {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(255), labels)}
        start += 1
