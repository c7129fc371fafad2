"""Cityscapes on whole frames of 2048x1024, each shared by two devices: training and evaluation without crops or windows.

python -m pspnet_jax.main --config configs/cityscapes_frames.py --config.dataset.root=DIR

`configs/cityscapes_frames.py:50` trains depth 50. No score of this recipe is published; the networks of `cityscapes.py` were
trained on crops. To share a frame among more devices, which then need less memory each, add --config.parallel.spatial=4.
Start from ImageNet weights: --config.init_from=hf://timm/resnet101s.gluon_in1k.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "101") -> ConfigDict:
    config = base_config()
    config.name = f"cityscapes_frames_{depth}"
    config.parallel.spatial = 2
    config.model.depth = int(depth)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "cityscapes"
    config.eval.split = "val"
    config.batch_size = 16
    config.total_steps = 90_000
    config.augment.scale = (1.0, 1.0)  # frames keep their size
    config.augment.rotate_probability = 0.0
    config.augment.blur_probability = 0.0
    config.augment.crop = (1024, 2048)
    config.eval.inference = "whole"
    config.eval.base_size = 2048
    return config
