"""PyTorch and safetensors files as flat dicts of arrays; no code in a file is ever run."""

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 -- teaches NumPy, and through it safetensors, bfloat16
import numpy as np
import safetensors.numpy

from pspnet_jax import files
from pspnet_jax.errors import UserError

Arrays = dict[str, np.ndarray]

# Names in checkpoints of training runs besides the weights: mmengine's message hub, timm's arguments. Their objects are read
# as `_Inert`, so that nothing of these names is imported or called, and dropped.
INERT = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)


class _Inert:
    """Takes any arguments and any state, and keeps neither."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_safetensors(path: str) -> tuple[Arrays, Mapping[str, Any]]:
    """Reads a .safetensors file: its arrays, and no metadata.

    Raises:
      UserError: it is damaged or something else.
    """
    try:
        return _without_module(safetensors.numpy.load_file(path)), {}
    except (safetensors.SafetensorError, TypeError, KeyError) as error:  # the last two: a dtype that NumPy lacks
        raise UserError(f"{path}: cannot be read as safetensors ({error}); fetch it again, or check what it is") from error


def read_torch(path: str) -> tuple[Arrays, Mapping[str, Any]]:
    """Reads a state_dict, bare or under "state_dict" or "model": its arrays (float32 if floats), and the checkpoint's "meta".

    Raises:
      UserError: torch is missing, the file is damaged or something else, holds objects, or holds no state_dict.
    """
    content = _load(path, _import_torch(path))
    content = content if isinstance(content, Mapping) else {}
    tensors = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), content)
    arrays = {}
    for key, tensor in tensors.items():
        try:
            tensor = tensor.detach()
            arrays[str(key)] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except (AttributeError, TypeError, RuntimeError) as error:  # no tensor, or a sparse or quantized one
            raise UserError(
                f"{path}: {key!r} is no dense tensor; expected a state_dict, bare or under 'state_dict' or 'model'"
            ) from error
    metadata = content.get("meta")
    return _without_module(arrays), metadata if isinstance(metadata, Mapping) else {}


def _load(path: str, torch: ModuleType) -> object:
    inert: list[Any] = [(_Inert, name) for name in INERT]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert):
            warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (MemoryError, OSError):
        raise  # not the file's fault
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        why = "cannot be read as a PyTorch file of tensors alone; fetch it again, or check what it is"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = (
                f"holds Python objects besides tensors ({found[1]}), and reading these could run code, so nothing was read; "
                "ask who made it for a file with the state_dict alone, best as .safetensors"
            )
        raise UserError(f"{path}: {why}") from error


def _import_torch(path: str) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path}: this format needs PyTorch: pip install ".[torch]", or use .safetensors instead') from error
    return torch


def _without_module(arrays: Arrays) -> Arrays:
    """Drops the prefix that DataParallel gives to all keys."""
    if all(key.startswith("module.") for key in arrays):
        return {key.removeprefix("module."): array for key, array in arrays.items()}
    return arrays


def write_safetensors(path: str | os.PathLike, arrays: Arrays) -> None:
    """Writes contiguous arrays under their keys."""
    with files.atomic(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays))  # save_file's file could be read by its owner alone


def write_torch(path: str | os.PathLike, arrays: Arrays) -> None:
    """Writes what semseg's training writes, for its `DataParallel(...).load_state_dict(checkpoint["state_dict"])`.

    Raises:
      UserError: torch is missing.
    """
    torch = _import_torch(str(path))
    state_dict = {f"module.{key}": torch.from_numpy(array) for key, array in arrays.items()}
    with files.atomic(path) as temporary:
        torch.save({"epoch": 0, "state_dict": state_dict}, temporary)
