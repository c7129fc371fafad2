"""PSPNet (Zhao et al., CVPR 2017) in JAX and Flax."""

__version__ = "0.2.0"
