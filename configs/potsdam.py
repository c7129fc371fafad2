"""ISPRS Potsdam, 6 classes of land cover: python -m pspnet_jax.main --config configs/potsdam.py --config.dataset.root=DIR

DIR has the 512x512 tiles that mmsegmentation cuts (tools/dataset_converters/potsdam.py). `configs/potsdam.py:101` trains depth
101. Network, schedule and evaluation are mmsegmentation's, which publishes mIoU on the 2,016 validation tiles at one scale /
six scales with flip: depth 18: 77.09 / 78.30, 50: 78.12 / 78.98, 101: 78.62 / 79.47 (configs/pspnet/README.md).
All start from ImageNet weights: add --config.init_from=hf://timm/resnet50c.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75 --config.eval.flip=true
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "50") -> ConfigDict:
    config = base_config()
    config.name = f"potsdam_{depth}"
    config.model.update(depth=int(depth), stem="deep32", first_block_dilation="half", align_corners=False)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "potsdam"
    config.batch_size = 16
    config.total_steps = 80_000
    config.optimizer.update(end_rate=1e-4, head_multiplier=1.0, weight_decay=5e-4, decay_norm=True)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0)
    config.augment.update(brightness=32.0, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18)
    config.augment.crop = (512, 512)
    config.eval.update(protocol="mmseg", inference="whole", base_size=512, short_size=512, flip=False)
    return config
