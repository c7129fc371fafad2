"""ImageNet, 1,000 classes: pretrains a backbone, by default the ResNet-50 with the deep stem that the benchmark recipes train.

python -m pspnet_jax.main --mode pretrain --config configs/imagenet.py --config.dataset.root=DIR
python -m pspnet_jax.main --config configs/ade20k.py --config.dataset.root=ADE --config.init_from=runs/imagenet_50

DIR holds the TFDS dataset imagenet2012. After `pip install "pspnet_jax[train,prepare]"`, it is made from the official archives
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, in ARCHIVES:
tfds build imagenet2012 --file_format=array_record --manual_dir=ARCHIVES --data_dir=DIR

`configs/imagenet.py:101` trains depth 101. The settings are the usual ones for 90 epochs (He et al. 2016; learning rate and
warmup of Goyal et al. 2017), but with a linear decay. No score was measured. torchvision's ResNet-50, whose stem is one 7x7
convolution, has 76.13% accuracy after 90 epochs; to train that stem, add --config.model.stem=conv7 to both commands.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config

IMAGES = 1_281_167


def get_config(depth: str = "50") -> ConfigDict:
    config = base_config()
    config.name = f"imagenet_{depth}"
    config.model.depth = int(depth)
    config.model.output_stride = 32  # a classifier needs no dilation; the weights fit any output stride
    config.dataset.name = "tfds"
    config.dataset.tfds_name = "imagenet2012"
    config.eval.split = "validation"
    config.batch_size = 256
    config.total_steps = 90 * IMAGES // config.batch_size
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_steps = 5 * IMAGES // config.batch_size
    config.optimizer.power = 1.0
    config.optimizer.head_multiplier = 1.0
    config.augment.scale = (0.08, 1.0)  # here: the share of the image's area that a crop has
    config.augment.crop = config.eval.crop = (224, 224)
    config.every.eval = 5 * IMAGES // config.batch_size
    config.every.save = 5_000
    return config
