"""Devices that share the height of images compute the same train step as one device, with less memory."""

import jax
import numpy as np
import pytest

from pspnet_jax import parallel
from pspnet_jax.train.step import make_init_state, make_train_step
from tests.train import parts_of, tiny_config

pytestmark = pytest.mark.slow
TOLERANCE = 3e-5  # as in test_step.py
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]  # sizes of the axes "data" and "spatial"


def config_for(height, dtype="float32"):
    config = tiny_config()
    config.model.update(output_stride=8, bins=(1, 2, 3), dtype=dtype)
    config.optimizer.clip_norm = 0.0
    config.augment.crop = (height, 40)
    return config


def batch_of(height):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, (8, height, 40), dtype=np.uint8)
    images = 80 * labels[..., None] + random.integers(0, 80, (8, height, 40, 3), dtype=np.uint8)
    return {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(255), labels)}


def mesh_of(data, spatial):
    return parallel.make_mesh(jax.devices()[: data * spatial], spatial)


def one_step(config, mesh, height):
    """Returns the metrics, parameters, gradients (momentum) and statistics after one step."""
    parts = parts_of(config)
    state = make_init_state(config, parts["model"], parts["optimizer"], mesh, (height, 40, 3))()
    step = make_train_step(config, **parts, mesh=mesh)
    state, metrics = step(state, next(parallel.to_devices([batch_of(height)], mesh)))
    values = {name: metric.compute() for name, metric in metrics.items()}
    return jax.tree.map(np.asarray, {"metrics": values, "opt_state": state.opt_state, "statistics": state.batch_stats})


@pytest.mark.parametrize("height", [64, 83])
def test_a_step_is_the_same_however_devices_share_images(height):
    """83 rows, and the features' 42, 21 and 11, cannot be divided evenly."""
    config = config_for(height)
    expected = one_step(config, mesh_of(1, 1), height)
    for data, spatial in MESHES:
        found = one_step(config, mesh_of(data, spatial), height)
        parts = {name: largest_difference(found[name], expected[name]) for name in expected}
        print(f"\n{height} rows on {data} x {spatial} devices: largest differences {parts}")
        assert max(parts.values()) < TOLERANCE


def largest_difference(tree, other):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0), tree, other)))
