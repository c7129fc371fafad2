"""Another task: depth estimation on the built-in scenes, with the pyramid but its own loss, metric and evaluation."""

import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Metric

from pspnet_jax import models, optimizers
from pspnet_jax.config import base_config
from pspnet_jax.data.scenes import SKY, scene
from pspnet_jax.losses import Term
from pspnet_jax.train.loop import fit


def example(split, index):
    """Returns an image and its depth f32[H, W]: 1 in the sky; elsewhere, from 1 at the top to 0 at the bottom."""
    image, label = scene(split, index)
    below = 1 - np.arange(len(label), dtype=np.float32)[:, None] / len(label)
    return image, np.where(label == SKY, np.float32(1), below)


def batches(start):
    while True:
        images, depths = zip(*(example("train", 8 * start + i) for i in range(8)), strict=True)
        yield {"image": np.stack(images), "depth": np.stack(depths)}
        start += 1


@flax.struct.dataclass
class Rmse(Metric):
    squares: jax.Array
    count: jax.Array

    def merge(self, other):
        return Rmse(self.squares + other.squares, self.count + other.count)

    def compute(self):
        return float(np.sqrt(self.squares / self.count))


def l1(outputs, batch, step):
    errors = outputs[0].upsample()[..., 0] - batch["depth"]
    count = jnp.float32(errors.size)
    return {"l1": Term(jnp.sum(jnp.abs(errors)), count)}, {"rmse": Rmse(jnp.sum(errors**2), count)}


def test_depth_is_learned_and_evaluated(tmp_path):
    config = base_config()
    config.model.update(depth=18, width=8)
    config.batch_size, config.total_steps = 8, 40
    config.optimizer.update(learning_rate=0.05, head_multiplier=1.0)
    config.eval.best_metric = "negative_rmse"
    config.every.update(log=10, eval=20)
    model = models.PSPNet(
        backbone=models.ResNet(depth=18, width=8),
        pyramid=models.Pyramid(),
        head=models.PyramidHead(num_classes=1, dropout=0.0),
    )

    @jax.jit
    def predict(variables, images):
        return model.apply(variables, models.normalize(images, config.normalize), train=False)[..., 0]

    def evaluate(variables):
        images, depths = map(np.stack, zip(*(example("validation", i) for i in range(16)), strict=True))
        predictions = np.asarray(predict(variables, images))
        rmse = float(np.sqrt(np.mean((predictions - depths) ** 2)))
        picture = np.uint8(255 * np.clip(np.concatenate([depths[0], predictions[0]], 1), 0, 1))
        return {"rmse": rmse, "negative_rmse": -rmse}, {"depth": picture[..., None].repeat(3, -1)}

    optimizer = optimizers.build(config.optimizer, config.total_steps)
    fit(config, model=model, loss=l1, optimizer=optimizer, batches=batches, evaluate=evaluate, workdir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train, scores = ([line["rmse"] for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    assert train[-1] < 0.5 * train[0]
    assert scores[-1] < np.std(np.stack([example("validation", i)[1] for i in range(16)]))  # better than the best constant
    assert (tmp_path / "pictures" / "depth.png").exists()
