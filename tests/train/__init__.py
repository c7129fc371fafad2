"""What the training tests share: the smallest networks, and batches for them."""

import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from pspnet_jax.config import base_config
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.infer.evaluate import Report
from pspnet_jax.metrics import Metrics
from pspnet_jax.models.layers import ConvNorm
from pspnet_jax.models.pspnet import Classifier

CLASSES = ("sky", "road", "car")


def tiny_config() -> ConfigDict:
    """A thin ResNet-18 on 33x33 crops, 8 images a step, over 12 steps; every option of the optimizer is on."""
    config = base_config()
    config.model.update(depth=18, width=8, output_stride=32, bins=(1,))
    config.dataset.class_names = CLASSES
    config.augment.crop = config.eval.crop = (33, 33)
    config.batch_size = 8
    config.total_steps = 12
    config.optimizer.update(learning_rate=0.5, ema_decay=0.75, clip_norm=0.03, warmup_steps=2)
    config.every.update(log=1, save=4, eval=8)
    return config


class OneLayer(nn.Module):
    """The least network that a step can train: a normalized convolution and a classifier."""

    frozen: bool = False
    num_classes = 3
    output_stride = 8

    @nn.compact
    def __call__(self, images, train):
        x = ConvNorm(8, frozen=self.frozen, name="layer")(images, train)
        logits = Classifier(3, dropout=0.0, name="classifier")(x, train)
        return (logits, None) if train else logits


def make_batch(step: int, size: int = 8) -> dict[str, np.ndarray]:
    """The batch of a step: noise whose brightness tells the class, and a tenth of the pixels ignored."""
    random = np.random.default_rng(step)
    labels = random.integers(0, len(CLASSES), (size, 33, 33), dtype=np.uint8)
    images = 80 * labels[..., None] + random.integers(0, 80, (size, 33, 33, 3), dtype=np.uint8)
    return {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(255), labels)}


def make_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    return map(make_batch, itertools.count(start))


def score(variables: dict[str, Any]) -> Report:
    """Stands for an evaluation: numbers that follow from the weights alone, and one picture."""
    kernel = np.abs(np.asarray(variables["params"]["classifier"]["kernel"], np.float64))
    iou = np.array([kernel.mean(), kernel.max(), np.nan])
    info = DatasetInfo("tiny", CLASSES, ((0, 0, 255), (90, 90, 90), (255, 0, 0)))
    picture = Image.new("RGB", (4, 2), info.colors[2])
    return Report(Metrics(iou[0], 0.5, 0.75, iou, iou), np.ones(3, np.int64), 2, info, {}, "1 x cpu", 3.0, {"street": picture})
