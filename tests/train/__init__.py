"""Helpers for the training tests: small networks, configs and batches."""

import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import losses, models, optimizers, parallel
from pspnet_jax.config import base_config
from pspnet_jax.models import Classifier, ConvNorm
from pspnet_jax.train import loop
from pspnet_jax.train.step import TrainState, make_init_state

CLASSES = ("sky", "road", "car")


def tiny_config() -> ConfigDict:
    """Returns the config of a thin ResNet-18 on 33x33 crops, with 12 steps of 8 images and all optimizer options enabled."""
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
    """The smallest trainable network: a convolution with BatchNorm and a classifier."""

    frozen: bool = False

    @nn.compact
    def __call__(self, images, train):
        x = ConvNorm(8, frozen_norm=self.frozen, name="layer")(images, train)
        logits = Classifier(3, dropout=0.0, name="classifier")(x, train)
        return (logits, None) if train else logits


def make_batch(step: int, size: int = 8) -> dict[str, np.ndarray]:
    """Returns the batch of a step: noise whose brightness depends on the class, with a tenth of the pixels ignored."""
    random = np.random.default_rng(step)
    labels = random.integers(0, len(CLASSES), (size, 33, 33), dtype=np.uint8)
    images = 80 * labels[..., None] + random.integers(0, 80, (size, 33, 33, 3), dtype=np.uint8)
    return {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(255), labels)}


def make_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    return map(make_batch, itertools.count(start))


def score(variables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replaces an evaluation: returns metrics that depend only on the weights, and one picture."""
    kernel = np.abs(np.asarray(variables["params"]["classifier"]["kernel"], np.float64))
    metrics = {"mean_iou": float(kernel.mean()), "pixel_accuracy": 0.75, "images": 2, "classes": [{"name": "car", "iou": None}]}
    return metrics, {"street": np.full((2, 4, 3), (255, 0, 0), np.uint8)}


def parts_of(config: ConfigDict) -> dict[str, Any]:
    """Builds the model, loss and optimizer of a config."""
    return {
        "model": models.build(config.model, len(config.dataset.class_names)),
        "loss": losses.build(config),
        "optimizer": optimizers.build(config.optimizer, config.total_steps),
    }


def fit(config: ConfigDict, batches: Any, evaluate: Any, workdir: Any, **more: Any) -> TrainState:
    """Calls `loop.fit` with the model, loss and optimizer of the config, unless others are given."""
    return loop.fit(config, **(parts_of(config) | more), batches=batches, evaluate=evaluate, workdir=workdir)


def mesh_of(devices: int) -> Mesh:
    return parallel.make_mesh(jax.devices()[:devices])


def filled_state(config: ConfigDict, value: float) -> TrainState:
    """Returns the train state of a config, filled with `value`, and with twice the value in the moving average."""
    parts, everywhere = parts_of(config), parallel.replicated(mesh_of(1))
    init = make_init_state(config, parts["model"], parts["optimizer"], mesh_of(1), (33, 33, config.model.channels))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init))

    def fill(tree, value):
        return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, value, x.dtype), x.sharding), tree)

    return fill(shapes, value).replace(ema=fill(shapes.ema, 2 * value))
