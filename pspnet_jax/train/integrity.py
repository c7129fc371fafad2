"""What is wrong with a checkpoint: damaged, if that is proven; out of reach, of another network, or not finite."""

import collections
import enum
import json
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pspnet_jax import files

CHECKSUMS = "checksums.json"


class Verdict(enum.IntEnum):
    """Several processes act on the largest of theirs."""

    GOOD = 0
    NOT_FINITE = 1
    DAMAGED = 2
    OTHER_NETWORK = 3
    UNREACHABLE = 4


class OtherNetworkError(Exception):
    """The arrays that were saved are not those that were asked for."""


# Of the words with which tensorstore and gRPC begin an error, those that speak of what a file holds.
_OF_CONTENT = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_OF_FILES = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def judge(error: Exception) -> Verdict:
    """What an exception on reading a checkpoint says of it."""
    if isinstance(error, OtherNetworkError):
        return Verdict.OTHER_NETWORK
    if isinstance(error, OSError):
        return Verdict.DAMAGED if isinstance(error, _OF_FILES) else Verdict.UNREACHABLE
    word = re.match(r"([A-Z_]{6,}): ", str(error))
    if word or not isinstance(error, ValueError | KeyError | TypeError | EOFError):
        return Verdict.DAMAGED if word and word[1] in _OF_CONTENT else Verdict.UNREACHABLE
    return Verdict.DAMAGED


def reason(error: Exception) -> str:
    """One line of an exception, without what tensorstore tells of itself."""
    return re.split(r"\n| \[(?:tensorstore_spec|source locations)", str(error))[0][-300:] or type(error).__name__


def write_checksums(directory: epath.Path) -> None:
    """Notes the size and CRC-32 of each file of a checkpoint's items; buckets have checksums of their own."""
    if not files.is_remote(directory):
        paths = [path for path in sorted(pathlib.Path(directory).rglob("*/*")) if path.is_file()]
        found = {str(path.relative_to(directory)): _checksum(epath.Path(path)) for path in paths}
        (directory / CHECKSUMS).write_text(json.dumps(found, indent=0) + "\n")


def problems(directory: epath.Path, items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compares the files of some of a checkpoint's items with their checksums: those that are missing, and those that differ.

    A missing file may be one that reading does without. Where there are no checksums, only missing items are found.
    """
    missing = [f"{item}/" for item in items if not (directory / item).is_dir()]
    path = directory / CHECKSUMS
    expected = json.loads(path.read_text()) if path.exists() else {}
    differing = []
    for name, checksum in expected.items():
        item, file = name.partition("/")[0], directory / name
        if item not in items or f"{item}/" in missing:
            continue
        if not file.is_file():
            missing.append(name)
        elif _checksum(file) != checksum:
            differing.append(name)
    return missing, differing


def _checksum(path: epath.Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def check_shapes(directory: epath.Path, targets: dict[str, Any]) -> None:
    """Compares the arrays of a checkpoint's items with those that are to be read, by name; the optimizer's by their shapes.

    Raises:
      OtherNetworkError: lists the arrays that differ.
    """
    for item, target in targets.items():
        saved = ocp.PyTreeCheckpointHandler().metadata(directory / item).tree
        if item == "optimizer":
            found, wanted = ([tuple(leaf.shape) for leaf in jax.tree.leaves(tree)] for tree in (saved, target))
            if collections.Counter(found) != collections.Counter(wanted):
                raise OtherNetworkError("the optimizer's state has other arrays")
            continue
        old, new = ({k: tuple(v.shape) for k, v in _leaves(tree).items()} for tree in (saved, target))
        differing = [
            f"{k} {old.get(k, 'is not there')} -> {new.get(k, 'is gone')}" for k in {**old, **new} if old.get(k) != new.get(k)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OtherNetworkError(f"saved -> this network: {'; '.join(differing[:3])}{more}")


def not_finite(tree: Any) -> str | None:
    """The first array with a value that is no number, or infinite, and how many there are; None where all is well."""
    bad = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            continue
        values = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        if jax.numpy.issubdtype(values.dtype, jax.numpy.floating) and (count := int((~np.isfinite(values)).sum())):
            bad.append(f"{count} of {values.size} values of {jax.tree_util.keystr(path, simple=True, separator='/')}")
    if not bad:
        return None
    return f"{bad[0]} are NaN or infinite" + (f", and {len(bad) - 1} other arrays have such" if len(bad) > 1 else "")


def _leaves(tree: Any) -> dict[str, Any]:
    return {k: v for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items() if hasattr(v, "shape")}
