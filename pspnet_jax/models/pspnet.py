"""PSPNet (Zhao et al., CVPR 2017), composed of a backbone, a pyramid, a head and an auxiliary head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError
from pspnet_jax.models.heads import AuxiliaryHead, PyramidHead
from pspnet_jax.models.layers import REMAT, CoarseLogits, not_a_choice
from pspnet_jax.models.pyramid import POOLS, Pyramid
from pspnet_jax.models.resnet import BLOCKS, FIRST_BLOCK_DILATION, STAGES, STEMS, STRIDE_IN, ResNet

# As in config.model.
RESNET_FIELDS = ("channels", "depth", "width", "stem", "stride_in", "first_block_dilation", "output_stride")
CHOICES = {  # allowed values of the fields of config.model
    "depth": tuple(BLOCKS),
    "stem": tuple(STEMS),
    "stride_in": tuple(STRIDE_IN),
    "first_block_dilation": tuple(FIRST_BLOCK_DILATION),
    "output_stride": tuple(STAGES),
    "pool": tuple(POOLS),
    "head_kernel": (3, 1),
    "norm": ("batch", "frozen"),
    "remat": tuple(REMAT),
    "dtype": ("float32", "bfloat16"),
}
MAX_BINS = 100  # more than any network needs: the largest published crop, 713 pixels, has a 90 x 90 feature map


class PSPNet(nn.Module):
    """A segmentation network of four parts, each of which you can replace with a module of your own.

    Attributes:
      backbone: (images f32[N, H, W, 3], train) -> (third [N, h', w', C/2], fourth [N, h, w, C]), such as `ResNet`.
      head: (fourth, levels, train) -> scores f32[N, h, w, K], such as `PyramidHead`; `levels` is [] without a pyramid.
      pyramid: (fourth, train) -> a list of levels [N, b, b, C'], such as `Pyramid`, or None.
      auxiliary_head: (third, train) -> scores f32[N, h', w', K], such as `AuxiliaryHead`, or None; it runs in training only.
      align_corners: convention for upsampling the scores bilinearly: True as in Caffe and semseg, False as in mmseg.

    Parameters are stored under the field names, such as "backbone/...". Those of `PyramidHead` and `AuxiliaryHead` are stored
    at the top level: "head_conv", "head_bn", "classifier", "auxiliary_conv", "auxiliary_classifier".
    """

    backbone: nn.Module
    head: nn.Module
    pyramid: nn.Module | None = None
    auxiliary_head: nn.Module | None = None
    align_corners: bool = True

    def setup(self) -> None:
        # Puts the default heads' parameters at the top level, where existing checkpoints have them. Their initial values and
        # dropout depend on these paths as well.
        for head in (self.head, self.auxiliary_head):
            if isinstance(head, PyramidHead | AuxiliaryHead):
                nn.share_scope(self, head)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array | tuple[CoarseLogits, CoarseLogits | None]:
        """Segments normalized images of any size.

        Args:
          images: f32[N, H, W, 3], normalized (see `normalize`).
          train: use batch statistics unless frozen (needs mutable "batch_stats") and dropout (needs rng "dropout").

        Returns:
          Logits f32[N, H, W, K]. In training, (logits, auxiliary logits) before upsampling; the latter are None without an
          auxiliary head.
        """

        def logits_of(scores: jax.Array) -> CoarseLogits:
            return CoarseLogits(scores, images.shape[1], images.shape[2], self.align_corners)

        third, fourth = self.backbone(images, train)
        levels = self.pyramid(fourth, train) if self.pyramid else []
        logits, auxiliary = logits_of(self.head(fourth, levels, train)), None
        if self.auxiliary_head and (train or self.is_initializing()):
            auxiliary = logits_of(self.auxiliary_head(third, train))
        return (logits, auxiliary) if train else logits.upsample()


def build(model: ConfigDict, num_classes: int, freeze: str = "") -> PSPNet:
    """Builds the network that `config.model` describes, with K = num_classes, for training with config.optimizer.freeze.

    Raises:
      UserError: lists every field with an invalid value.
    """
    wrong = problems(model) + ([f"num_classes={num_classes}: expected 1 or more"] if num_classes < 1 else [])
    if wrong:
        raise UserError("\n".join(wrong))
    frozen_norm = model.norm == "frozen"
    return PSPNet(
        backbone=ResNet(
            **{field: model[field] for field in RESNET_FIELDS},
            frozen_norm=frozen_norm,
            freeze=freeze,
            remat=model.remat,
            dtype=jnp.dtype(model.dtype),
        ),
        pyramid=Pyramid(model.bins, model.pool, model.reduce_channels, frozen_norm),
        head=PyramidHead(
            num_classes=num_classes,
            kernel_size=model.head_kernel,
            factored=model.factored_head,
            align_corners=model.align_corners,
            dropout=model.dropout,
            frozen_norm=frozen_norm,
        ),
        auxiliary_head=AuxiliaryHead(num_classes, model.dropout, frozen_norm) if model.auxiliary else None,
        align_corners=model.align_corners,
    )


def problems(model: ConfigDict) -> list[str]:
    """Returns one message for each field of `config.model` with an invalid value."""
    found = [not_a_choice(choices, f"model.{f}", model[f]) for f, choices in CHOICES.items() if model[f] not in choices]
    if not 1 <= model.channels <= 16:
        found.append(f"model.channels={model.channels}: expected 1 to 16")
    if model.width < 8 or model.width % 8:
        found.append(f"model.width={model.width}: expected a multiple of 8 (the standard ResNet has 64)")
    if len({b for b in model.bins if 1 <= b <= MAX_BINS}) < len(model.bins) or len(model.bins) > 16:
        found.append(f"model.bins={model.bins}: expected at most 16 distinct numbers from 1 to {MAX_BINS}")
    if not 0 <= model.dropout < 1:
        found.append(f"model.dropout={model.dropout}: expected a value from 0 up to, not including, 1")
    return found


def normalize(images: jax.Array, statistics: ConfigDict) -> jax.Array:
    """Returns (images - mean) / std per channel: [..., C] of any type -> f32[..., C] in `statistics.order`.

    `statistics` is `config.normalize`; its mean and std are in the order of the files, RGB.
    """
    mean, std = jnp.asarray(statistics.mean, jnp.float32), jnp.asarray(statistics.std, jnp.float32)
    normalized = (images.astype(jnp.float32) - mean) / std
    return jnp.flip(normalized, -1) if statistics.order == "BGR" else normalized
