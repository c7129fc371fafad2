"""The network, as Flax linen modules that map normalized images f32[N, H, W, 3] to logits f32[N, H, W, K].

model = models.build(config.model, num_classes=150)                               # from the config
model = models.PSPNet(backbone=MyBackbone(), head=models.PyramidHead(num_classes=150), pyramid=models.Pyramid())
"""

from pspnet_jax.models.classifier import ImageClassifier
from pspnet_jax.models.heads import AuxiliaryHead, Classifier, PyramidHead
from pspnet_jax.models.layers import CoarseLogits, ConvNorm, by_rows, resize, share_rows
from pspnet_jax.models.pspnet import CHOICES, PSPNet, build, normalize, problems
from pspnet_jax.models.pyramid import Pyramid
from pspnet_jax.models.resnet import FREEZE, STAGE_NAMES, ResNet

__all__ = [
    "CHOICES",
    "FREEZE",
    "STAGE_NAMES",
    "AuxiliaryHead",
    "Classifier",
    "CoarseLogits",
    "ConvNorm",
    "ImageClassifier",
    "PSPNet",
    "Pyramid",
    "PyramidHead",
    "ResNet",
    "build",
    "by_rows",
    "normalize",
    "problems",
    "resize",
    "share_rows",
]
