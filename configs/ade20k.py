"""ADE20K scene parsing, 150 classes: python -m pspnet_jax.main --config configs/ade20k.py --config.dataset.root=DIR

`configs/ade20k.py:101` trains depth 101. Published mIoU on the 2,000 validation images with flip, at one scale / six scales:
depth 50: 41.68 / 42.78, 101: 41.96 / 43.29, 152: 42.62 / 43.51, 269: 43.81 / 44.94 (paper, depth ablation).
All start from ImageNet weights: add --config.init_from=hf://timm/resnet50s.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "50") -> ConfigDict:
    config = base_config()
    config.name = f"ade20k_{depth}"
    config.model.depth = int(depth)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "ade20k"
    config.dataset.train_split = "training"
    config.eval.split = "validation"
    config.batch_size = 16
    config.total_steps = 150_000
    config.augment.crop = config.eval.crop = (473, 473)
    config.eval.base_size = 512
    return config
