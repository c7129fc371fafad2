"""Built-in synthetic scenes and a thin ResNet-18: minutes on a CPU. python -m pspnet_jax.main --config configs/quickstart.py

`configs/quickstart.py:1` trains with a 1x1 pyramid, `configs/quickstart.py:none` without one; see benchmarks/pyramid.md.
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
    config.model.factored_head = True
    config.batch_size = 16
    config.total_steps = 600
    config.optimizer.learning_rate = 0.05
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained, so nothing has to be spared
    config.augment.scale = (0.95, 1.15)  # the crop shows almost all of it: the clue to a vehicle's class may be anywhere
    config.augment.rotate_probability = 0.0
    config.augment.blur_probability = 0.0
    config.augment.crop = (96, 128)
    config.eval.inference = "whole"
    config.eval.base_size = 0
    config.every.log = 50
    config.every.eval = 300
    config.every.save = 300
    return config
