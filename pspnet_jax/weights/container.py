"""Any file of weights as a flat dict of arrays: the format by its first bytes, shards put together, prefixes off."""

import json
import os
import re
import zipfile
from collections.abc import Callable

from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.weights import caffe, pytorch
from pspnet_jax.weights.pytorch import Content

Reader = Callable[[epath.Path, str], Content]
EXPECTED = "PyTorch's .pth, .pt, .bin or .ckpt, .safetensors, an .index.json of shards, or a .caffemodel"
AGAIN = "download it again"
# First bytes of what is no file of weights: what it is, and what to do.
REFUSED = (
    (b"<", f"a web page, such as a failed download leaves: {AGAIN}"),
    (b"version https://git-lfs", f"a pointer of Git LFS, not the file itself: run git lfs pull, or {AGAIN}"),
    (b"\x1f\x8b", "a gzip archive: unpack it, and name the file of weights in it"),
    (b"BZh", "a bzip2 archive: unpack it, and name the file of weights in it"),
    (b"\xfd7zXZ", "an xz archive: unpack it, and name the file of weights in it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it, and name the file of weights in it"),
    (b"Rar!", "a rar archive: unpack it, and name the file of weights in it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes, which cannot be read: convert it to .safetensors"),
)
# What others put before all keys: DataParallel, torch.compile, Lightning, and modules that hold the network.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
# What stands beside the network: counts of averages, losses' weights, and what classified images on a backbone.
BESIDE = re.compile(r"(.*\.)?(n_averaged|steps)|(criterion|loss\w*|head)\..*")


def read(path: epath.PathLike) -> Content:
    """Reads a file of weights.

    Args:
      path: local or gs://; FILE:NAME takes the entry NAME of a PyTorch checkpoint, such as "net.pth:state_dict_ema".

    Returns:
      Arrays by key without `PREFIXES`, and what else the file tells.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is empty, damaged or something else.
    """
    path, entry = split_entry(files.absolute(path))
    if path.is_dir():
        raise UserError(f"{path}: {_directory(path)}")
    if not files.is_there(path):
        raise MissingFileError(f"{path}: no such file; expected a file of weights: {EXPECTED}")
    reader = _read_index if path.name.endswith(".index.json") else _reader(path)
    if entry and reader is not pytorch.read_torch:
        raise UserError(f"{path}:{entry}: only PyTorch's checkpoints have entries; name the file alone")
    content = reader(path, entry)
    if not (arrays := without_prefixes(content.arrays)):
        raise UserError(f"{path}: holds no weights; expected those of a ResNet or a PSPNet")
    return content._replace(arrays=arrays)


def split_entry(path: epath.Path) -> tuple[epath.Path, str]:
    """Splits FILE:NAME, unless there is a file of that name."""
    name, _, entry = path.name.rpartition(":")
    return (path.with_name(name), entry) if name and not path.exists() else (path, "")


def _directory(path: epath.Path) -> str:
    """What a directory is that was given in the place of a file."""
    for run in (path, *path.parents[:2]):
        if (run / "checkpoints").is_dir():
            return (
                f"is part of a run of this program: evaluate, predict and export take it with --workdir={run}, "
                f"training with --config.init_from={run}"
            )
    found = sorted(
        p.name for p in path.iterdir() if re.search(r"\.(pth|pt|bin|ckpt|safetensors|caffemodel|index\.json)$", p.name)
    )
    return f"is a directory; name a file of weights{', such as ' + ', '.join(found[:3]) if found else ''}"


def _reader(path: epath.Path) -> Reader:
    with path.open("rb") as file:
        head = file.read(512)
    if not head.strip(b"\0"):
        raise UserError(f"{path}: {'holds nothing but zeros' if head else 'is empty'}: {AGAIN}")
    if shard := re.search(r"(.*)-\d{5}-of-(\d{5})(\.\w+)$", path.name):
        index = f"{shard[1]}{shard[3]}.index.json"
        raise UserError(f"{path}: is one of {int(shard[2])} shards; name their index, {path.with_name(index)}")
    for magic, what in REFUSED:
        if head.lstrip().startswith(magic):
            raise UserError(f"{path}: is {what}")
    if head.startswith(b"PK"):
        return _zip_reader(path)
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive: unpack it, and name the file of weights in it")
    if path.suffix.lower() == ".caffemodel":
        return lambda path, entry: Content(caffe.read(path))
    if head[8:9] == b"{":
        return lambda path, entry: Content(pytorch.read_safetensors(path))
    if head[:1] == b"\x80":
        return pytorch.read_torch
    raise UserError(f"{path}: is no file of weights that can be read: expected {EXPECTED}")


def _zip_reader(path: epath.Path) -> Reader:
    try:
        with path.open("rb") as file:
            names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is damaged, its end is missing: {AGAIN}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: is a TorchScript archive, a program with its weights; where you trust it, write these alone: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path}: is an archive of {', '.join(names[:3])}: unpack it, and name the file of weights in it")
    return pytorch.read_torch


def _read_index(path: epath.Path, entry: str) -> Content:
    """Puts shards together: model.safetensors.index.json, pytorch_model.bin.index.json."""
    try:
        shards = sorted({os.path.basename(name) for name in json.loads(path.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no index of shards, which has a weight_map from keys to files") from error
    arrays: pytorch.Arrays = {}
    for shard in map(path.with_name, shards):
        if not shard.is_file():
            raise MissingFileError(f"{shard}: no such file; {path.name} wants it, one of {len(shards)} shards")
        arrays |= pytorch.read_safetensors(shard) if shard.suffix == ".safetensors" else pytorch.read_torch(shard).arrays
    return Content(arrays)


def without_prefixes(arrays: pytorch.Arrays) -> pytorch.Arrays:
    """Takes off whatever of `PREFIXES` all keys share, again and again, and leaves out what is `BESIDE` the network."""
    arrays = {key: array for key, array in arrays.items() if not BESIDE.fullmatch(key)}
    while shared := next((p for p in PREFIXES if arrays and all(key.startswith(p) for key in arrays)), None):
        arrays = {key.removeprefix(shared): array for key, array in arrays.items()}
    return arrays
