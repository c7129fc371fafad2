"""Pascal Context, 59 classes: python -m pspnet_jax.main --config configs/pascal_context.py --config.dataset.root=DIR

`configs/pascal_context.py:50` trains depth 50. Network, schedule and evaluation are mmsegmentation's, whose depth 101 has mIoU
52.02 on the 5,105 validation images, 53.54 at six scales with flip (configs/pspnet/README.md, 40,000 steps).
All start from ImageNet weights: add --config.init_from=hf://timm/resnet101c.gluon_in1k, or see configs/imagenet.py.
Six scales: --mode evaluate --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75 --config.eval.flip=true
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(depth: str = "101") -> ConfigDict:
    config = base_config()
    config.name = f"pascal_context_{depth}"
    config.model.update(depth=int(depth), stem="deep32", first_block_dilation="half", align_corners=False)
    config.model.remat = "norm"  # less memory, and on TPUs less time, see benchmarks/model.md
    config.dataset.name = "pascal_context"
    config.batch_size = 16
    config.total_steps = 40_000
    config.optimizer.update(learning_rate=0.004, end_rate=1e-4, head_multiplier=1.0, decay_norm=True)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0)
    config.augment.update(brightness=32.0, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18)
    config.augment.scale = (0.52, 2.08)  # 0.5 to 2 times the long side 520; most images have 500
    config.augment.crop = config.eval.crop = (480, 480)
    config.eval.update(protocol="mmseg", base_size=520, short_size=520, flip=False)
    return config
