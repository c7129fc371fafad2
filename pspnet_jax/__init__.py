"""PSPNet (Zhao et al., CVPR 2017) in JAX and Flax.

    segmenter = pspnet_jax.load("runs/camvid")
    result = segmenter("photo.jpg")
    result.labels, result.classes

`load` and `train` are described in `pspnet_jax.api`, which is imported when one of them is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pspnet_jax.api import load, train

__all__ = ["load", "train"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pspnet_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
