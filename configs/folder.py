"""Your own images: copy this file and change the lines marked CHANGE.

python -m pspnet_jax.main --config configs/folder.py --config.dataset.root=DIR
DIR holds images/{train,val}/NAME.jpg, labels/{train,val}/NAME.png (class indices, 255 = ignore) and classes.txt.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "folder"  # CHANGE: runs are saved in runs/<name>
    config.model.depth = 50  # 18 is several times faster; 101 is slightly better
    config.batch_size = 16  # over all devices
    config.total_steps = 20_000  # CHANGE: epochs * training images / batch_size; the learning rate reaches 0 at the end
    config.optimizer.learning_rate = 0.01  # with pretrained weights (init_from); from scratch: 0.05, and head_multiplier 1
    config.optimizer.head_multiplier = 10.0
    config.augment.scale = (0.5, 2.0)  # CHANGE: relative to the original size; use less for large photos, such as (0.25, 1.0)
    config.augment.crop = (473, 473)  # height, width; a larger crop has more context and needs more memory
    config.eval.crop = (473, 473)
    config.eval.base_size = 0  # CHANGE together with augment.scale: long side of images in evaluation; 0: original size
    config.every.eval = 2_000
    return config
