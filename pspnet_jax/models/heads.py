"""The segmentation head and the auxiliary head: backbone features to class scores of the same resolution."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.layers import ConvNorm
from pspnet_jax.models.norm import BatchNorm
from pspnet_jax.models.pyramid import PyramidConv


class Classifier(nn.Module):
    """Channel dropout, then a 1x1 convolution with bias: [N, h, w, C] -> f32[N, h, w, K]."""

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        kernel = self.param("kernel", nn.initializers.normal(0.01), (1, 1, x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x.astype(jnp.float32) @ kernel[0, 0] + bias


class PyramidHead(nn.Module):
    """Classifies backbone features and pyramid levels: [N, h, w, C], levels [N, b, b, C'] -> scores f32[N, h, w, K].

    Concatenates the features and the upsampled levels, then applies a convolution to C/4 channels, batch normalization, ReLU
    and the classifier.

    Attributes:
      num_classes: K.
      kernel_size: size of the convolution, an odd number.
      factored: compute the same function without building the concatenation.
      align_corners: how the levels are upsampled; use the same value as in `PSPNet`.
      dropout: rate of the classifier's channel dropout.
      frozen_norm: as in `ConvNorm`.
    """

    num_classes: int
    kernel_size: int = 3
    factored: bool = True
    align_corners: bool = True
    dropout: float = 0.1
    frozen_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, levels: Sequence[jax.Array], train: bool) -> jax.Array:
        conv = PyramidConv(x.shape[-1] // 4, self.kernel_size, self.align_corners, self.factored, name="head_conv")
        norm = BatchNorm(not train or self.frozen_norm, name="head_bn")
        return Classifier(self.num_classes, self.dropout, name="classifier")(nn.relu(norm(conv(x, levels))), train)


class AuxiliaryHead(nn.Module):
    """Classifies the third stage's features, for an auxiliary training loss: [N, h, w, C/2] -> scores f32[N, h, w, K].

    A 3x3 convolution to C/8 channels, batch normalization, ReLU and the classifier; attributes as in `PyramidHead`.
    """

    num_classes: int
    dropout: float = 0.1
    frozen_norm: bool = False

    @nn.compact
    def __call__(self, third: jax.Array, train: bool) -> jax.Array:
        x = ConvNorm(third.shape[-1] // 4, frozen_norm=self.frozen_norm, name="auxiliary_conv")(third, train)
        return Classifier(self.num_classes, self.dropout, name="auxiliary_classifier")(x, train)
