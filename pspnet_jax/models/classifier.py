"""An image classifier, which pretrains a backbone."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ImageClassifier(nn.Module):
    """Normalized images f32[N, H, W, 3] -> logits f32[N, K]: the mean of the backbone's last features, and a linear layer."""

    backbone: nn.Module
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        _, features = self.backbone(images, train)
        means = features.mean((1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="fc")(means)
