"""Your own images: copy this file and change the lines marked CHANGE.

python -m pspnet_jax.main --config configs/folder.py --config.dataset.root=DIR
DIR holds images/{train,val}/NAME.jpg, labels/{train,val}/NAME.png (class indices, 255 = ignore) and classes.txt.

configs/folder.py:rare trains a small network from scratch, in minutes on a CPU, for thin and rare structures such as vessels,
cracks and membranes, 1 to 8 pixels wide.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config


def get_config(kind: str = "") -> ConfigDict:
    if kind not in ("", "rare"):
        raise ValueError("expected rare, or no argument")
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
    return rare(config) if kind else config


def rare(config: ConfigDict) -> ConfigDict:
    """Crops are enlarged by 1.5 to 2.5, and evaluation by 2, because the features have an eighth of a crop's resolution.

    Without class weights, a network that was to find cracks of 1 to 3 pixels, 3% of all pixels, predicted background everywhere
    after 250 steps; with class_weighting="inverse", the IoU of cracks was 27% after 200 steps. That of real membranes is
    67% after all 1,000. Enlarging by 4 was worse: 21% (benchmarks/rare.md).
    """
    config.name = "rare"
    config.model.depth = 18
    config.model.width = 16
    config.model.stem = "deep32"
    config.batch_size = 8
    config.total_steps = 1_000
    config.loss.terms = "cross_entropy+dice"
    config.loss.class_weighting = "inverse"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.weight_decay = 0.01
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained
    config.augment.scale = (1.5, 2.5)
    config.augment.blur_probability = 0.0
    config.augment.crop = config.eval.crop = (129, 129)
    config.eval.scales = (2.0,)
    config.every.eval = 250
    return config
