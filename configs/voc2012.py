"""PASCAL VOC 2012 with SBD, 21 classes: python -m pspnet_jax.main --config configs/voc2012.py --config.dataset.root=DIR

`configs/voc2012.py:50` trains depth 50. Published mIoU on the 1,449 validation images with flip, at one scale / six scales:
depth 101: 79.07 / 79.63, depth 50: 77.05 / 78.02 (semseg, 50 epochs). The paper's 82.6 is from the test server.
All start from ImageNet weights: add --config.init_from=hf://timm/resnet101s.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "101") -> ConfigDict:
    config = base_config()
    config.name = f"voc2012_{depth}"
    config.model.depth = int(depth)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "voc2012"
    config.dataset.train_split = "train_aug"
    config.eval.split = "val"
    config.batch_size = 16
    config.total_steps = 30_000
    config.augment.crop = config.eval.crop = (473, 473)
    config.eval.base_size = 512
    return config
