"""A narrow ResNet-18 on built-in synthetic scenes: minutes on a CPU. python -m pspnet_jax.main --config configs/quickstart.py

`configs/quickstart.py:1` trains with a single 1x1 level, `configs/quickstart.py:none` without a pyramid; see
benchmarks/pyramid.md.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config

BINS = {"1236": (1, 2, 3, 6), "1": (1,), "none": ()}


def get_config(pyramid: str = "1236") -> ConfigDict:
    if pyramid not in BINS:
        raise ValueError(f"expected one of {', '.join(BINS)}")
    config = base_config()
    config.name = "quickstart" if pyramid == "1236" else f"quickstart_{pyramid}"
    config.dataset.name = "scenes"
    config.eval.split = "validation"
    config.model.depth = 18
    config.model.width = 32
    config.model.stem = "deep32"
    config.model.bins = BINS[pyramid]
    config.batch_size = 16
    config.total_steps = 160
    config.loss.class_weights = (0.5, 1, 0.5, 1, 0.5, 3, 3, 4, 4, 3, 4)  # so that small objects are learned in a short run
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.weight_decay = 0.01
    config.optimizer.head_multiplier = 1.0  # the backbone is not pretrained
    config.augment.scale = (0.95, 1.05)  # the crop has to contain the whole scene: the clue is far from the vehicle
    config.augment.rotate_probability = 0.0
    config.augment.blur_probability = 0.0
    config.augment.crop = (80, 192)
    config.eval.inference = "whole"
    config.eval.base_size = 0
    config.every.log = 20
    config.every.eval = 80
    config.every.save = 80
    return config
