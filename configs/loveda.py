"""LoveDA, 7 classes of land cover: python -m pspnet_jax.main --config configs/loveda.py --config.dataset.root=DIR

`configs/loveda.py:101` trains depth 101. Network, schedule and evaluation are mmsegmentation's, which publishes mIoU on the
1,669 validation images at one scale / six scales with flip: depth 18: 48.62 / 47.57, 50: 50.46 / 50.19, 101: 51.86 / 51.34
(configs/pspnet/README.md).
All start from ImageNet weights: add --config.init_from=hf://timm/resnet50c.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75 --config.eval.flip=true
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "50") -> ConfigDict:
    config = base_config()
    config.name = f"loveda_{depth}"
    config.model.update(depth=int(depth), stem="deep32", first_block_dilation="half", align_corners=False)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "loveda"
    config.batch_size = 16
    config.total_steps = 80_000
    config.optimizer.update(end_rate=1e-4, head_multiplier=1.0, weight_decay=5e-4, decay_norm=True)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0)
    config.augment.update(brightness=32.0, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18)
    config.augment.scale = (0.25, 1.0)  # 0.5 to 2 times the side 512; all images have 1024
    config.augment.crop = (512, 512)
    config.eval.update(protocol="mmseg", inference="whole", base_size=1024, short_size=1024, flip=False)
    return config
