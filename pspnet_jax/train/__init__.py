"""Training. The package can also be called: `pspnet_jax.train(config)` is `api.train`."""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """Makes the attribute `train` of the package both a function and, once it is imported, this package."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from pspnet_jax import api

        return api.train(*args, **options)


sys.modules[__name__].__class__ = _Callable
