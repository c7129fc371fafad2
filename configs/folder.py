"""Your own images: copy this, and change what is marked.

python -m pspnet_jax.main --config configs/folder.py --config.dataset.root=DIR
DIR holds images/{train,val}/NAME.jpg, labels/{train,val}/NAME.png (class numbers, 255 = ignore) and classes.txt.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "folder"  # CHANGE: the run is written to runs/<name>
    config.model.depth = 50  # 18 is several times faster, 101 somewhat better
    config.batch_size = 16  # over all devices
    config.total_steps = 20_000  # CHANGE: epochs * training images / batch_size; the learning rate reaches 0 here
    config.optimizer.learning_rate = 0.01  # for weights from config.init_from; from scratch 0.05 with head_multiplier 1
    config.optimizer.head_multiplier = 10.0
    config.augment.scale = (0.5, 2.0)  # CHANGE: of the images as they are; large photos want less, such as (0.25, 1.0)
    config.augment.crop = (473, 473)  # height, width; larger shows more context and costs more memory
    config.eval.crop = (473, 473)
    config.eval.base_size = 0  # CHANGE with the scales: long side at which images are scored; 0: as they are
    config.every.eval = 2_000
    return config
