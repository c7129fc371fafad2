"""Cityscapes, fine labels, 19 classes: python -m pspnet_jax.main --config configs/cityscapes.py --config.dataset.root=DIR

`configs/cityscapes.py:50` trains depth 50. Published mIoU on the 500 validation images with flip, at one scale / six scales:
depth 101: 79.70 / 80.91 (Caffe), 78.63 / 79.29 (semseg); depth 50: 77.30 / 78.38 (semseg). On the test server: 78.4 (paper).
All start from ImageNet weights: add --config.init_from=hf://timm/resnet101s.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "101") -> ConfigDict:
    config = base_config()
    config.name = f"cityscapes_{depth}"
    config.model.depth = int(depth)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "cityscapes"
    config.eval.split = "val"
    config.batch_size = 16
    config.total_steps = 90_000
    config.augment.rotate_probability = 0.0  # as in the paper; semseg rotates and blurs with probability 0.5
    config.augment.blur_probability = 0.0
    config.augment.crop = config.eval.crop = (713, 713)
    config.eval.base_size = 2048
    return config
