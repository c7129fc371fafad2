"""Weights for three channels start networks for other numbers of channels."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.weights import own, transfer

STEM = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 3, 2)  # kernels (1, 3, 5) and (2, 4, 6), whose means are 3 and 4


def first_kernel(variables):
    return variables["params"]["backbone"]["stem_conv1"]["conv"]["kernel"]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (1, [[9, 12]]),
        (2, [[4.5, 6], [4.5, 6]]),
        (4, [[0.75, 1.5], [2.25, 3], [3.75, 4.5], [2.25, 3]]),
        (6, [[0.5, 1], [1.5, 2], [2.5, 3], [1.5, 2], [1.5, 2], [1.5, 2]]),
    ],
)
def test_a_first_kernel_is_adapted_by_hand(channels, expected, caplog):
    variables = {"params": {"backbone": {"stem_conv1": {"conv": {"kernel": STEM}}}}}
    with caplog.at_level("INFO", "pspnet_jax"):
        adapted = weights.adapt_channels(variables, channels, "a.pth")
    np.testing.assert_allclose(first_kernel(adapted)[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(first_kernel(adapted).sum(2), STEM.sum(2), rtol=1e-6)  # equal channels keep their features
    assert f"a.pth: its first kernel, for 3 channels, is adapted to {channels}: " in caplog.text
    assert weights.adapt_channels(variables, 3, "a.pth") is variables


def test_a_file_for_three_channels_starts_a_network_for_four(tmp_path):
    config = base_config()
    config.model.update(depth=18, width=8, bins=(1, 2), auxiliary=False)
    config.dataset.class_names = ("a", "b")
    model, image = models.build(config.model, 2), np.zeros((1, 33, 33, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, np.float32), shapes)
    arrays = transfer.semseg_arrays(variables, config.model)
    save_file(arrays, tmp_path / "a.safetensors", {own.LIBRARY: json.dumps(own.describe(config))})
    config.model.channels = 4
    loaded = weights.load(tmp_path / "a.safetensors", models.build(config.model, 2), partial=True)
    np.testing.assert_array_equal(first_kernel(loaded), np.full((3, 3, 4, 8), 1.5))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    with pytest.raises(UserError, match=r"cannot compute this network, which has model.channels=4, not 3"):
        weights.save(tmp_path / "a.pth", loaded, models.build(config.model, 2), "torch")
