"""Reads and writes PyTorch and safetensors files as flat dicts of arrays, and never runs code in a file."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 -- adds bfloat16 to NumPy, which safetensors uses
import numpy as np
import safetensors.numpy
from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import UserError

Arrays = dict[str, np.ndarray]
# Objects other than weights in training checkpoints: mmengine's message hub, timm's and Lightning's arguments. They are read
# as `_Ignored`, so that nothing is imported or called, and then dropped.
IGNORED_TYPES = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
)
DICT_TYPES = (  # types of hyper_parameters in different versions of Lightning, read as dicts
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
)
# Entries of a checkpoint that may hold the weights, in order of preference: raw weights before moving averages.
ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema"),
)


class Content(NamedTuple):
    """Contents of a weights file."""

    arrays: Arrays
    metadata: Mapping[str, Any] = MappingProxyType({})  # mmsegmentation's "meta"
    entry: str = ""  # the entry of the checkpoint that the arrays are from
    others: tuple[str, ...] = ()  # other entries with weights


class _Ignored:
    """Accepts any arguments and any state, and keeps neither."""

    def __new__(cls, *args: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_safetensors(path: epath.Path) -> Arrays:
    """Reads a .safetensors file.

    Raises:
      UserError: the file is damaged, of another kind, or has a type that NumPy lacks.
    """
    try:
        return safetensors.numpy.load_file(path)  # supports bfloat16, unlike `load`
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again, or check its format") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path}: has arrays of a type that NumPy lacks ({error}); convert them to float32") from error


def read_torch(path: epath.Path, entry: str = "") -> Content:
    """Reads a state_dict, or an entry of a checkpoint, and the checkpoint's "meta". Floats are converted to float32.

    Raises:
      UserError: torch is missing, or the file is damaged, of another kind, has Python objects, or has no state_dict.
    """
    content = _load(path, _import_torch(path))
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: contains a {type(content).__name__}; expected a state_dict, or a checkpoint with one")
    tensors = content
    names = [name for name in ENTRIES if isinstance(content.get(name), Mapping)]
    taken = entry = entry or next(iter(names), "")
    while entry:
        if not isinstance(tensors.get(entry), Mapping):
            entries = [str(name) for name, value in tensors.items() if isinstance(value, Mapping)]
            raise UserError(f"{path}: has no entry {entry!r} with weights; the entries are {', '.join(entries) or 'none'}")
        tensors = tensors[entry]
        entry = next((name for name in ENTRIES if isinstance(tensors.get(name), Mapping)), "")
    arrays = {}
    for key, tensor in tensors.items():
        try:
            tensor = tensor.detach()
            arrays[str(key)] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except (AttributeError, TypeError, RuntimeError) as error:  # not a tensor, or sparse or quantized
            entries = [f"{path.name}:{name}" for name, value in content.items() if name != taken and _has_tensors(value)]
            problem = f"{key!r} is not a dense tensor"
            if not entries and not _has_tensors(tensors):
                problem = f"has no weights, only {', '.join(map(str, [*tensors][:4]))}"
            raise UserError(
                f"{path}: {problem}; expected a state_dict, or a checkpoint with one"
                f"{'; name ' + ' or '.join(entries[:4]) if entries else ''}"
            ) from error
    metadata = content.get("meta")
    others = tuple(name for name in names if name != taken and _has_tensors(content[name]))
    return Content(arrays, metadata if isinstance(metadata, Mapping) else {}, taken, others)


def _has_tensors(value: object) -> bool:
    """Returns whether `value` is a state_dict or contains one."""
    if not isinstance(value, Mapping):
        return False
    return any(hasattr(t, "detach") for t in value.values()) or any(_has_tensors(value.get(name)) for name in ENTRIES)


def _load(path: epath.Path, torch: ModuleType) -> object:
    safe: list[Any] = [*((_Ignored, name) for name in IGNORED_TYPES), *((dict, name) for name in DICT_TYPES)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
            warnings.simplefilter("ignore")  # about the pickle protocol; real problems raise
            if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch does not check CRCs
                raise UserError(f"{path}: is damaged ({damaged} does not match its CRC-32); download it again")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (MemoryError, OSError, UserError):
        raise
    except Exception as error:  # a damaged or hostile file can make torch raise anything
        reason = "cannot be read as a PyTorch file of tensors; download it again, or check its format"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (
                f"contains Python objects as well as tensors ({found[1]}); loading them could run code, so nothing was read; "
                "if you trust the file, load it with torch.load(FILE, weights_only=False) and torch.save only its state_dict"
            )
        raise UserError(f"{path}: {reason}") from error


def _import_torch(path: epath.PathLike) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{path}: this format needs PyTorch: pip install "pspnet_jax[torch]", or use .safetensors instead'
        ) from error
    return torch


def write_safetensors(path: epath.PathLike, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays, which must be contiguous, under their keys, and metadata."""
    with files.atomic(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, dict(metadata or {})))


def write_torch(path: epath.PathLike, arrays: Arrays) -> None:
    """Writes a checkpoint like semseg's training, for `DataParallel(...).load_state_dict(checkpoint["state_dict"])`.

    Raises:
      UserError: torch is missing.
    """
    torch, buffer = _import_torch(path), io.BytesIO()
    torch.save({"epoch": 0, "state_dict": {f"module.{key}": torch.from_numpy(a) for key, a in arrays.items()}}, buffer)
    with files.atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
