"""Networks with random weights whose activations have about unit scale, and images, for tests and benchmarks of the export."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import datasets, models
from pspnet_jax.config import base_config
from pspnet_jax.models.norm import MOMENTUM


def make_config(num_classes: int, **fields: Any) -> ConfigDict:
    """Returns a config with these fields of config.model and classes with VOC's colors."""
    config = base_config()
    config.model.update(fields)
    config.dataset.class_names = tuple(f"class {i}" for i in range(num_classes))
    config.dataset.colors = datasets.voc_palette(num_classes)
    return config


def random_images(*shape: int) -> np.ndarray:
    """Returns uint8[N, H, W, 3]: a smooth field plus noise with standard deviation 20."""
    random = np.random.default_rng(0)
    coarse = jnp.asarray(random.uniform(0, 255, (shape[0], 9, 9, 3)), jnp.float32)
    smooth = np.asarray(models.resize(coarse, *shape[1:], align_corners=True))
    return np.clip(smooth + random.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def random_variables(config: ConfigDict, images: np.ndarray) -> Any:
    """Returns variables with the batch statistics of some images, uint8[N, H, W, 3] with N > 1, as NumPy arrays.

    Blocks are scaled to 0.2 before they are added to their shortcuts, as in benchmarks/fidelity.py; otherwise a deep network
    amplifies rounding. Classifiers are scaled so that the logits have a standard deviation of about 2.
    """
    model = models.build(config.model, len(config.dataset.class_names))
    inputs = models.normalize(images, config.normalize)
    variables = jax.jit(lambda: model.init(jax.random.key(0), inputs, train=False))()
    random = np.random.default_rng(0)

    def randomize(path: Any, array: jax.Array) -> np.ndarray:
        *parents, name = (key.key for key in path)
        scale = 0.2 if len(parents) > 2 and parents[2].startswith("layer") and parents[3] in block_ends else 1
        if name == "scale":
            return (scale * random.uniform(0.5, 1.5, array.shape)).astype(np.float32)
        if name == "bias":
            return (scale * random.normal(0, 0.3, array.shape)).astype(np.float32)
        return np.asarray(array) * np.float32(30 if parents[1:] == ["classifier"] else 1)

    block_ends = ["conv2"] if config.model.depth < 50 else ["conv3"]
    variables = jax.tree_util.tree_map_with_path(randomize, variables)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
    updated = jax.jit(lambda: model.apply(variables, inputs, **options)[1])()["batch_stats"]

    def undo_average(path: Any, new: jax.Array, old: np.ndarray) -> np.ndarray:
        constant = 0.05 if path[-1].key == "var" else 0  # for the 1x1 level, which has few values
        return ((np.asarray(new) - MOMENTUM * old) / (1 - MOMENTUM) + constant).astype(np.float32)

    return variables | {"batch_stats": jax.tree_util.tree_map_with_path(undo_average, updated, variables["batch_stats"])}
