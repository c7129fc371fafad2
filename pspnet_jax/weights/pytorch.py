"""PyTorch and safetensors files as flat dicts of arrays; no code in a file is ever run."""

import contextlib
import io
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 -- teaches NumPy, and through it safetensors, bfloat16
import numpy as np
import safetensors.numpy
from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import UserError

Arrays = dict[str, np.ndarray]
# Names in checkpoints of training runs besides the weights: mmengine's message hub, timm's arguments, Lightning's. Their
# objects are read as `_Inert`, so that nothing of these names is imported or called, and dropped.
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
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
)
DICTS = (  # Lightning's hyper_parameters, by its version: a dict is made of them
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
)
# The entries of a checkpoint in which the weights are looked for, in this order: raw ones, then their moving average.
ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema"),
)


class Content(NamedTuple):
    """What a file holds."""

    arrays: Arrays
    metadata: Mapping[str, Any] = MappingProxyType({})  # mmsegmentation's "meta"
    entry: str = ""  # of a checkpoint, whose weights were taken
    others: tuple[str, ...] = ()  # the entries with further weights


class _Inert:
    """Takes any arguments and any state, and keeps neither."""

    def __new__(cls, *args: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_safetensors(path: epath.Path) -> Arrays:
    """Reads a .safetensors file.

    Raises:
      UserError: it is damaged or something else.
    """
    try:
        with _local(path) as file:
            return safetensors.numpy.load_file(file)  # unlike `load`, with bfloat16
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again, or check what it is") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path}: has numbers of a type that NumPy lacks ({error}); convert its arrays to float32") from error


def read_torch(path: epath.Path, entry: str = "") -> Content:
    """Reads a state_dict, bare or an entry of a checkpoint: its arrays (float32 if floats), and the checkpoint's "meta".

    Raises:
      UserError: torch is missing, the file is damaged or something else, holds objects, or holds no state_dict.
    """
    content = _load(path, _import_torch(path))
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a state_dict, or a checkpoint with one")
    tensors = content
    names = [name for name in ENTRIES if isinstance(content.get(name), Mapping)]
    taken = entry = entry or next(iter(names), "")
    while entry:
        if not isinstance(tensors.get(entry), Mapping):
            entries = [str(name) for name, value in tensors.items() if isinstance(value, Mapping)]
            raise UserError(f"{path}: has no entry {entry!r} with weights; its entries are {', '.join(entries) or 'none'}")
        tensors = tensors[entry]
        entry = next((name for name in ENTRIES if isinstance(tensors.get(name), Mapping)), "")
    arrays = {}
    for key, tensor in tensors.items():
        try:
            tensor = tensor.detach()
            arrays[str(key)] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        except (AttributeError, TypeError, RuntimeError) as error:  # no tensor, or a sparse or quantized one
            entries = [f"{path.name}:{name}" for name, value in content.items() if name != taken and _has_tensors(value)]
            what = f"{key!r} is no dense tensor"
            if not entries and not _has_tensors(tensors):
                what = f"holds no weights, only {', '.join(map(str, [*tensors][:4]))}"
            raise UserError(
                f"{path}: {what}; expected a state_dict, or a checkpoint with one"
                f"{': name ' + ' or '.join(entries[:4]) if entries else ''}"
            ) from error
    metadata = content.get("meta")
    others = tuple(name for name in names if name != taken and _has_tensors(content[name]))
    return Content(arrays, metadata if isinstance(metadata, Mapping) else {}, taken, others)


def _has_tensors(value: object) -> bool:
    """Whether this is a state_dict, or an entry with one."""
    if not isinstance(value, Mapping):
        return False
    return any(hasattr(t, "detach") for t in value.values()) or any(_has_tensors(value.get(name)) for name in ENTRIES)


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """Yields the name of the file on this machine, a copy of one on gs://."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path.copy(copy := os.path.join(folder, path.name))
        yield copy


def _load(path: epath.Path, torch: ModuleType) -> object:
    inert: list[Any] = [*((_Inert, name) for name in INERT), *((dict, name) for name in DICTS)]
    try:
        with _local(path) as file, warnings.catch_warnings(), torch.serialization.safe_globals(inert):
            warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read raises
            if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):  # torch does not compare them
                raise UserError(f"{path}: is damaged ({damaged} differs from its CRC-32); download it again")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (MemoryError, OSError, UserError):
        raise
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        why = "cannot be read as a PyTorch file of tensors alone; download it again, or check what it is"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = (
                f"holds Python objects besides tensors ({found[1]}), and reading these could run code, so nothing was read; "
                "where you trust it, load it with torch.load(FILE, weights_only=False) and torch.save its state_dict alone"
            )
        raise UserError(f"{path}: {why}") from error


def _import_torch(path: epath.PathLike) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path}: this format needs PyTorch: pip install ".[torch]", or use .safetensors instead') from error
    return torch


def write_safetensors(path: epath.PathLike, arrays: Arrays) -> None:
    """Writes contiguous arrays under their keys."""
    with files.atomic(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays))


def write_torch(path: epath.PathLike, arrays: Arrays) -> None:
    """Writes what semseg's training writes, for its `DataParallel(...).load_state_dict(checkpoint["state_dict"])`.

    Raises:
      UserError: torch is missing.
    """
    torch, buffer = _import_torch(path), io.BytesIO()
    torch.save({"epoch": 0, "state_dict": {f"module.{key}": torch.from_numpy(a) for key, a in arrays.items()}}, buffer)
    with files.atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
