"""CamVid, 11 classes, on a CPU: trains a PSPNet with ResNet-18 from scratch on crops, and evaluates whole images.

python -m pspnet_jax.main --config configs/camvid.py --config.dataset.root=DIR

DIR holds images/{train,val} and labels/{train,val} at 480x360, with 255 for void. The README has the flags for the SegNet
tutorial's version, which has other folders and 11 for void.
"""

from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "camvid"
    camvid = datasets.table("camvid")
    config.dataset.class_names, config.dataset.colors = camvid.class_names, camvid.colors
    config.model.depth = 18
    config.model.stem = "deep32"
    config.batch_size = 8
    config.total_steps = 800  # 17 epochs of 367 images
    # Roots of median-frequency weights, with more for pole, sign and pedestrian
    config.loss.class_weights = (0.6, 0.6, 4.0, 0.5, 1.0, 0.7, 4.0, 1.4, 1.0, 4.0, 3.0)
    config.optimizer.learning_rate = 0.05
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained, so all layers learn at the same rate
    config.augment.scale = (0.5, 1.0)  # relative to the original 480x360 pixels
    config.augment.rotate_probability = 0.0
    config.augment.blur_probability = 0.0
    config.augment.crop = (181, 241)  # height, width
    config.eval.inference = "whole"
    config.eval.base_size = 361  # about 0.75 of the original 480
    config.every.log = 20
    config.every.eval = 400
    config.every.save = 400
    return config
