"""The network, as Flax linen modules: normalized images f32[N, H, W, 3] to logits f32[N, H, W, K]."""

from pspnet_jax.models.pspnet import PSPNet, build, normalize

__all__ = ["PSPNet", "build", "normalize"]
