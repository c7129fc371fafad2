"""The user's own augmentation, named by config.augment.extra."""

import inspect
import pkgutil
import traceback
from collections.abc import Callable

import numpy as np

from pspnet_jax.data import checks
from pspnet_jax.data.sources import Example
from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

Extra = Callable[[np.ndarray, np.ndarray, np.random.Generator], Example]


def load(name: str, num_classes: int) -> Extra:
    """Imports a function, and returns it with a check of its results.

    Args:
      name: "module:function". The function takes a crop [h,w,C] of dataset.image_dtype, its label uint8[h,w] and a random
        generator, and returns an image and a label of the same types and shapes. It may change both in place, and is called by
        several threads at a time.
      num_classes: K; the values of labels are 0 to K-1, or 255 for pixels that are ignored.

    Raises:
      UserError: there is no such function, or it takes other arguments; when called, the results are not as described.
    """
    try:
        function = pkgutil.resolve_name(name)
        inspect.signature(function).bind(None, None, None)
    except Exception as error:  # whatever the module raises
        raise UserError(
            f"augment.extra={name!r}: {error}; expected 'module:function' of a module that Python finds (PYTHONPATH=FOLDER "
            "adds a folder), and a function of an image, a label and a random generator"
        ) from error

    def call(image: np.ndarray, label: np.ndarray, random: np.random.Generator) -> Example:
        expected = _describe(image, label)
        try:
            result = function(image, label, random)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"augment.extra={name!r}: {place.filename}, line {place.lineno}: {type(error).__name__}: {error}"
            ) from error
        found = _describe(*result) if isinstance(result, tuple) else _describe(result)
        if found != expected:
            raise UserError(f"augment.extra={name!r} returns {found}; expected the types and shapes given, {expected}")
        if checks.has_wrong_value(result[1], num_classes):
            values = np.unique(result[1]).tolist()
            raise UserError(
                f"augment.extra={name!r} returns a label with the values {values}; expected 0 to {num_classes - 1}, or {IGNORE}"
            )
        return result

    return call


def _describe(*values: object) -> str:
    return " and ".join(f"{v.dtype}{list(v.shape)}" if isinstance(v, np.ndarray) else type(v).__name__ for v in values)
