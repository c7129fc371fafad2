"""Reads a weights file of any format into a flat dict of arrays: detects the format, joins shards, and strips prefixes."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.weights import caffe, own, ports, pytorch
from pspnet_jax.weights.pytorch import Content

Reader = Callable[..., Content]  # of a path and, in PyTorch checkpoints, optionally the entry
EXPECTED = (
    "PyTorch's .pth, .pt, .bin or .ckpt, .safetensors, an .index.json of shards, a .caffemodel, Keras' .h5, "
    "caffe-tensorflow's .npy, or the .index of a TensorFlow checkpoint"
)
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".caffemodel", ".h5", ".npy", ".index", ".index.json")
AGAIN = "download it again"
UNPACK = "unpack it, and name the weights file in it"
ARCHIVES = ((b"\x1f\x8b", "a gzip"), (b"BZh", "a bzip2"), (b"\xfd7zXZ", "an xz"), (b"7z\xbc\xaf", "a 7z"), (b"Rar!", "a rar"))
# First bytes of files that do not hold weights, what they are, and what to do.
UNSUPPORTED = (
    *((start, f"a web page, perhaps from a failed download: {AGAIN}") for start in (b"<!", b"<?", b"<h", b"<H")),
    (b"version https://git-lfs", f"a Git LFS pointer, not the file itself: run git lfs pull, or {AGAIN}"),
    *((magic, f"{kind} archive: {UNPACK}") for magic, kind in ARCHIVES),
)
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")
TABLE_END = 0xDB4775248B80FB57.to_bytes(8, "little")  # of the index of a TensorFlow checkpoint, as of LevelDB's tables
# Prefixes of all keys, from DataParallel, torch.compile, Lightning, and modules that contain the network.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
# Keys that are not part of the network: counters of weight averages, weights of losses, and heads of image classifiers.
OTHER_KEYS = re.compile(r"(.*\.)?(n_averaged|steps)|(criterion|loss\w*|head)\..*")


def read(path: epath.PathLike) -> Content:
    """Reads a weights file.

    Args:
      path: a local file; FILE:NAME selects the entry NAME of a PyTorch checkpoint, such as "net.pth:state_dict_ema".

    Returns:
      The arrays by key, without `PREFIXES`, and the metadata of the file.

    Raises:
      MissingFileError: the file does not exist.
      UserError: the file is empty, damaged or of another kind.
    """
    path, entry = split_entry(files.absolute(path))
    path = path / own.WEIGHTS if own.is_folder(path) else path
    if path.is_dir():
        raise UserError(f"{path}: {_directory_advice(path)}")
    if not files.is_there(path):
        raise MissingFileError(f"{path}: no such file; expected a weights file: {EXPECTED}")
    reader: Reader = _read_index if path.name.endswith(".index.json") else _detect_reader(path)
    if entry and reader is not pytorch.read_torch:
        raise UserError(f"{path}:{entry}: only PyTorch checkpoints have entries; give the file name alone")
    content = reader(path, entry) if entry else reader(path)
    if not (arrays := without_prefixes(content.arrays)):
        raise UserError(f"{path}: has no weights; expected those of a ResNet or a PSPNet")
    return content._replace(arrays=arrays)


def split_entry(path: epath.Path) -> tuple[epath.Path, str]:
    """Splits FILE:NAME, unless a file with the whole name exists. NAME.index replaces TensorFlow's NAME of a checkpoint."""
    name, _, entry = path.name.rpartition(":")
    if path.exists() or not path.name:
        return path, ""
    if (index := path.with_name(f"{path.name}.index")).exists():
        return index, ""
    return (path.with_name(name), entry) if name else (path, "")


def _directory_advice(path: epath.Path) -> str:
    """Returns what to tell the user who gave a directory instead of a file."""
    for run in (path, *path.parents[:2]):
        if (run / "checkpoints").is_dir():
            return (
                f"belongs to a training run; to evaluate, predict or export, use --workdir={run}; to train from it, use "
                f"--config.init_from={run}"
            )
    found = sorted(p.name for p in path.iterdir() if p.name.endswith(ENDINGS))
    return f"is a directory; name a weights file{', such as ' + ', '.join(found[:3]) if found else ''}"


def _detect_reader(path: epath.Path) -> Reader:
    with path.open("rb") as file:
        head = file.read(512)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(TABLE_END), 0))
        end = file.read()
    if not head.strip(b"\0"):
        raise UserError(f"{path}: {'has only zeros' if head else 'is empty'}: {AGAIN}")
    if path.suffix == ".meta" or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        raise UserError(f"{path}: is a part of a TensorFlow checkpoint; give its index instead: {path.with_suffix('.index')}")
    if shard := SHARD.fullmatch(path.name):
        index = f"{shard[1]}{shard[3]}.index.json"
        raise UserError(f"{path}: is one of {int(shard[2])} shards; give their index instead: {path.with_name(index)}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:  # first: its length may look like other formats
        return _read_safetensors
    for magic, advice in UNSUPPORTED:
        if head.lstrip().startswith(magic):
            raise UserError(f"{path}: is {advice}")
    if head.startswith(b"PK"):
        return _detect_zip_reader(path)
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive: {UNPACK}")
    for recognized, read_arrays in (
        (path.suffix.lower() == ".caffemodel", caffe.read),
        (head.startswith(b"\x89HDF"), ports.read_h5),
        (head.startswith(b"\x93NUMPY"), ports.read_npy),
        (end == TABLE_END, ports.read_checkpoint),
    ):
        if recognized:
            return lambda path: Content(read_arrays(path))
    if head[8:9] == b"{":  # damaged
        return _read_safetensors
    if head[:1] == b"\x80":
        return pytorch.read_torch
    raise UserError(f"{path}: is not a supported weights file: expected {EXPECTED}")


def _read_safetensors(path: epath.Path) -> Content:
    return Content(pytorch.read_safetensors(path), own.read_config(path))


def _detect_zip_reader(path: epath.Path) -> Reader:
    try:
        with path.open("rb") as file:
            names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is damaged (its end is missing): {AGAIN}") from error
    except (ValueError, NotImplementedError) as error:  # a name or a version that no file has
        raise UserError(f"{path}: is damaged ({error}): {AGAIN}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: is a TorchScript archive, a program with its weights; if you trust it, save the weights alone: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path}: is an archive of {', '.join(names[:3])}: {UNPACK}")
    return pytorch.read_torch


def _read_index(path: epath.Path) -> Content:
    """Joins the shards of a model.safetensors.index.json or pytorch_model.bin.index.json."""
    names, arrays = shards(path), dict[str, Any]()
    for shard in map(path.with_name, names):
        if not shard.is_file():
            raise MissingFileError(f"{shard}: no such file; it is one of the {len(names)} shards in {path.name}")
        arrays |= pytorch.read_safetensors(shard) if shard.suffix == ".safetensors" else pytorch.read_torch(shard).arrays
    if missing := [key for key in json.loads(path.read_bytes())["weight_map"] if key not in arrays]:
        raise UserError(f"{path}: lists {len(missing)} array(s) that its shards lack, such as {missing[0]}: {AGAIN}")
    return Content(arrays)


def shards(path: epath.Path, siblings: Iterable[str] = ()) -> list[str]:
    """Returns the names of the files that belong to an index: of shards or, among its siblings, of a TensorFlow checkpoint.

    Raises:
      UserError: the index is damaged.
    """
    if path.suffix == ".index":
        return [name for name in siblings if name.startswith(f"{path.stem}.data-")]
    if not path.name.endswith(".index.json"):
        return []
    try:
        names = {os.path.basename(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
        if names & {"", ".", ".."}:
            raise ValueError("a shard without a name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is not an index of shards: expected a weight_map from keys to files") from error
    return sorted(names)


def without_prefixes(arrays: pytorch.Arrays) -> pytorch.Arrays:
    """Drops `OTHER_KEYS`, and strips `PREFIXES` that all remaining keys share, repeatedly."""
    arrays = {key: array for key, array in arrays.items() if not OTHER_KEYS.fullmatch(key)}
    while shared := next((p for p in PREFIXES if arrays and all(key.startswith(p) for key in arrays)), None):
        arrays = {key.removeprefix(shared): array for key, array in arrays.items()}
    return arrays
