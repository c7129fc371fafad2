"""PSPNet (Zhao et al., CVPR 2017) put together from `config.model`: backbone, pyramid, head and auxiliary head."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pspnet_jax.models.layers import BatchNorm, ConvNorm, resize
from pspnet_jax.models.pyramid import Pyramid, PyramidConv
from pspnet_jax.models.resnet import ResNet
from pspnet_jax.validation import model_problems


class Classifier(nn.Module):
    """Dropout of whole channels, then a 1x1 convolution with bias: [N, h, w, C] -> f32[N, h, w, K]."""

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        kernel = self.param("kernel", nn.initializers.normal(0.01), (1, 1, x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x.astype(jnp.float32) @ kernel[0, 0] + bias


class PSPNet(nn.Module):
    """The whole network; its fields are those of `config.model`, which says what each means.

    With C the backbone's last channel count: the pyramid's levels have C/N channels, the head C/4, the auxiliary head C/8.
    """

    num_classes: int
    depth: int
    width: int
    stem: str
    stride_in: str
    first_block_dilation: str
    output_stride: int
    bins: Sequence[int]
    pool: str
    reduce_channels: bool
    head_kernel: int
    factored_head: bool
    align_corners: bool
    auxiliary: bool
    dropout: float
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array | tuple[jax.Array, jax.Array | None]:
        """Segments normalized images of any size.

        Args:
          images: f32[N, H, W, 3], normalized (see `normalize`).
          train: normalize by the batch's statistics (unless frozen; mutable "batch_stats"), drop channels (rng "dropout").

        Returns:
          Logits f32[N, H, W, K]; with train a pair of them and the auxiliary head's, f32[N, H, W, K], or None without one.
        """
        dtype, frozen = jnp.dtype(self.dtype), self.norm == "frozen"
        conv_norm = functools.partial(ConvNorm, frozen=frozen, dtype=dtype)
        third, fourth = ResNet(
            self.depth,
            self.width,
            self.stem,
            self.stride_in,
            self.first_block_dilation,
            self.output_stride,
            conv_norm,
            name="backbone",
        )(images.astype(dtype), train)
        levels = Pyramid(self.bins, self.pool, self.reduce_channels, conv_norm, name="pyramid")(fourth, train)
        channels = fourth.shape[-1]
        head_conv = PyramidConv(
            channels // 4, self.head_kernel, self.align_corners, self.factored_head, dtype, name="head_conv"
        )
        x = nn.relu(BatchNorm(frozen, dtype, name="head_bn")(head_conv(fourth, levels), train))
        logits = self._upsampled(Classifier(self.num_classes, self.dropout, name="classifier")(x, train), images)
        auxiliary = None
        if self.auxiliary and (train or self.is_initializing()):
            x = conv_norm(channels // 8, name="auxiliary_conv")(third, train)
            x = Classifier(self.num_classes, self.dropout, name="auxiliary_classifier")(x, train)
            auxiliary = self._upsampled(x, images)
        return (logits, auxiliary) if train else logits

    def _upsampled(self, logits: jax.Array, images: jax.Array) -> jax.Array:
        return resize(logits, images.shape[1], images.shape[2], self.align_corners)


def build(model: ConfigDict, num_classes: int) -> PSPNet:
    """Builds the network of `config.model` for K = num_classes.

    Raises:
      ValueError: names every field with an impossible value.
    """
    if problems := model_problems(model):
        raise ValueError("\n".join(problems))
    return PSPNet(num_classes=num_classes, **model.to_dict())


def normalize(images: jax.Array, statistics: ConfigDict) -> jax.Array:
    """(images - mean) / std per channel: uint8[..., 3] in RGB order -> f32[..., 3] in `statistics.order`.

    `statistics` is `config.normalize`; its mean and std are in RGB order.
    """
    mean, std = jnp.asarray(statistics.mean, jnp.float32), jnp.asarray(statistics.std, jnp.float32)
    normalized = (images.astype(jnp.float32) - mean) / std
    return normalized[..., ::-1] if statistics.order == "BGR" else normalized
