"""Devices that share images compute the same as one device, in training and evaluation, with less memory."""

import functools
import itertools

import jax
import numpy as np
import pytest

from pspnet_jax import models, parallel
from pspnet_jax.errors import UserError
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.train.step import make_init_state, make_train_step
from pspnet_jax.validation import validate
from tests.train import CLASSES, OneLayer, fit, parts_of, tiny_config

pytestmark = pytest.mark.slow
TOLERANCE = 3e-5  # as in test_step.py


def config_for(height, width=40, spatial=1):
    config = tiny_config()
    config.model.update(output_stride=8, bins=(1, 2, 3))
    config.optimizer.clip_norm = 0.0
    config.augment.crop = (height, width)
    config.parallel.spatial = spatial
    return config


def batch_of(config):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, (config.batch_size, *config.augment.crop), dtype=np.uint8)
    images = 80 * labels[..., None] + random.integers(0, 80, (*labels.shape, 3), dtype=np.uint8)
    return {"image": images, "label": np.where(random.random(labels.shape) < 0.1, np.uint8(255), labels)}


def mesh_of(data, spatial):
    return parallel.make_mesh(jax.devices()[: data * spatial], spatial)


def step_and_state(config, mesh):
    parts = parts_of(config)
    init = make_init_state(config, parts["model"], parts["optimizer"], mesh, (*config.augment.crop, 3))
    return make_train_step(config, **parts, mesh=mesh), init


def one_step(config, mesh):
    """Returns the metrics, gradients (momentum) and statistics after one step."""
    step, init = step_and_state(config, mesh)
    state, metrics = step(init(), next(parallel.to_devices([batch_of(config)], mesh)))
    values = {name: metric.compute() for name, metric in metrics.items()}
    return jax.tree.map(np.asarray, {"metrics": values, "gradients": state.opt_state, "statistics": state.batch_stats})


def test_a_train_step_is_the_same_however_devices_share_images():
    """83 rows, and the features' 42, 21 and 11, cannot be divided evenly. A mesh of (4, 2) has 4 groups of 2 devices."""
    config = config_for(83)
    expected = one_step(config, mesh_of(1, 1))
    for data, spatial in [(8, 1), (4, 2), (2, 4)]:
        found = one_step(config, mesh_of(data, spatial))
        parts = {name: largest_difference(found[name], expected[name]) for name in expected}
        print(f"\n{data} x {spatial} devices: largest differences {parts}")
        assert max(parts.values()) < TOLERANCE
        assert relative_difference(found["gradients"], expected["gradients"]) < 1e-4


def test_memory_of_a_device_falls_with_their_number():
    """By the compiler's own figure, for 512x128 pixels on 1, 2 and 4 devices, with remat (as in whole frames) and without."""

    def memory(spatial, remat):
        config, mesh = config_for(512, 128, spatial), mesh_of(1, spatial)
        config.batch_size, config.model.remat = 2, remat
        step, init = step_and_state(config, mesh)
        return step.lower(jax.eval_shape(init), batch_of(config)).compile().memory_analysis().temp_size_in_bytes

    norm, none = ([memory(spatial, remat) for spatial in (1, 2, 4)] for remat in ("norm", "none"))
    for remat, sizes in (("norm", norm), ("none", none)):
        print(f"\ntemporary memory of a device, remat={remat}: {', '.join(f'{size / 2**20:.1f} MiB' for size in sizes)}")
    assert norm[1] < 0.65 * norm[0]
    assert norm[2] < 0.4 * norm[0]
    assert all(less < more for less, more in zip(none, norm, strict=True))


def test_evaluation_is_the_same_if_devices_share_images():
    """Whole images of two sizes, whose heights cannot be divided evenly, on one device, and on two groups of four."""
    config = config_for(33)
    config.eval.update(inference="whole", base_size=0, scales=(1.0, 1.25), flip=True)
    model = models.build(config.model, len(CLASSES))
    variables = model.init(jax.random.key(0), np.zeros((1, 33, 33, 3), np.float32), train=False)
    images = [
        np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i, size in enumerate([(57, 40, 3), (70, 51, 3)])
    ]

    def probabilities(spatial, devices):
        config.parallel.spatial = spatial
        predictor = Predictor(lambda v, x: model.apply(v, x, train=False), config, len(CLASSES), devices)
        found = np.asarray(predictor.probabilities(predictor.place(variables), images))
        return [x[: image.shape[0], : image.shape[1]] for x, image in zip(found, images, strict=False)]

    expected, found = probabilities(1, jax.devices()[:1]), probabilities(4, jax.devices())
    difference = max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))
    print(f"\nlargest difference of a probability: {difference:.1e}")
    assert difference < 1e-5


def test_a_run_goes_on_with_other_groups_of_devices(tmp_path):
    """Two steps on 8 devices, then two on 4 groups of 2 devices, are four steps on 8 devices."""
    config = config_for(33)
    config.total_steps, config.every.save, config.every.eval = 4, 2, 0

    def interrupt(step):
        if step == 2:
            raise InterruptedError

    train = functools.partial(fit, config, lambda start: itertools.repeat(batch_of(config)), None, model=OneLayer())
    expected = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", hooks=[interrupt])
    config.parallel.spatial = 2
    found = train(tmp_path / "run")
    difference = largest_difference(*(jax.tree.map(np.asarray, state.params) for state in (found, expected)))
    print(f"\nlargest difference of a parameter: {difference:.1e}")
    assert int(found.step) == 4
    assert difference < TOLERANCE


def test_groups_that_cannot_be_formed_are_refused():
    config = config_for(33, spatial=3)
    with pytest.raises(UserError, match=r"^parallel.spatial=3: expected a divisor of the number of devices, 8$"):
        validate(config, num_devices=8)
    config.parallel.spatial = 2
    config.batch_size = 6
    with pytest.raises(UserError, match=r"batch_size=6: expected a multiple of 4 \(8 device\(s\) / parallel.spatial=2 x"):
        validate(config, num_devices=8)


def largest_difference(tree, other):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0), tree, other)))


def relative_difference(tree, other):
    """Returns the largest difference relative to the largest value of its array."""
    pairs = jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(y), initial=0), 1e-6), tree, other)
    return max(jax.tree.leaves(pairs))
