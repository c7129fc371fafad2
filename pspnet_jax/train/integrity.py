"""What is wrong with a checkpoint: damaged, if that is proven; out of reach, of another network, or not finite."""

import collections
import contextlib
import enum
import json
import logging
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
CHECKSUMS = "checksums.json"
PAUSES = (1.0, 5.0, 15.0)  # seconds before a checkpoint that storage does not hand out is read again


class Verdict(enum.IntEnum):
    """Several processes act on the largest of theirs."""

    GOOD = 0
    NOT_FINITE = 1
    DAMAGED = 2
    OTHER_NETWORK = 3
    UNREACHABLE = 4


SAID = {
    Verdict.NOT_FINITE: "is not finite",
    Verdict.DAMAGED: "is damaged",
    Verdict.OTHER_NETWORK: "holds another network",
    Verdict.UNREACHABLE: "could not be read",
}


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
    """One line of an exception, without what tensorstore tells of itself, and without its middle if it is long."""
    line = re.split(r"\n| \[(?:tensorstore_spec|source locations|os_error_code)", str(error))[0] or type(error).__name__
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}"


Items = Callable[[], Sequence[str]]


def attempt(directory: epath.Path, items: Items, read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
    """Reads and judges a checkpoint, together with the other processes; tries again where storage does not hand it out.

    Args:
      directory: of the checkpoint.
      items: returns those that `read` reads, whose files are compared with their checksums before.
      read: returns a tree of arrays, or anything else.

    Returns:
      the verdict of all processes, the reason as "is damaged (...)", and what `read` returned.

    Raises:
      UserError: storage does not hand it out.
    """
    for pause in (*PAUSES, None):
        own, why, result = _attempt(directory, items, read)
        verdict = Verdict(parallel.agree(own))
        if verdict != own:
            why = "was refused by another process of this job, which says why"
        if verdict is not Verdict.UNREACHABLE:
            return verdict, why, result
        if pause is not None:
            logger.warning("checkpoint %s %s; trying again in %.0f s", directory.name, why, pause)
            time.sleep(pause)
    raise UserError(
        f"checkpoint {directory.name} in {directory.parent} {why}; it may be all right, and nothing was changed: "
        "try again when the storage answers"
    )


def _attempt(directory: epath.Path, items: Items, read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
    try:
        missing, differing = problems(directory, items())
        if missing:  # also of files that could be done without: orbax, which would have to find out, is loud where it fails
            return Verdict.DAMAGED, f"is damaged or incomplete (missing: {_listed(missing)})", None
        if differing:
            return Verdict.DAMAGED, f"is damaged (other content than was saved: {_listed(differing)})", None
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):
        raise  # not the file's fault
    except Exception as error:  # whatever a damaged file makes orbax raise
        verdict = judge(error)
        return verdict, f"{SAID[verdict]} ({reason(error)})", None
    if found := not_finite(result):
        return Verdict.NOT_FINITE, f"{SAID[Verdict.NOT_FINITE]} ({found})", result
    return Verdict.GOOD, "", result


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_checksums(directory: epath.Path) -> None:
    """Notes the size and CRC-32 of each file of a checkpoint's items; buckets have checksums of their own."""
    if not files.is_remote(directory):
        paths = [path for path in sorted(pathlib.Path(directory).rglob("*/*")) if path.is_file()]
        found = {str(path.relative_to(directory)): _checksum(epath.Path(path)) for path in paths}
        (directory / CHECKSUMS).write_text(json.dumps(found, indent=0) + "\n")


def problems(directory: epath.Path, items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compares the files of some of a checkpoint's items with their checksums: those that are missing, and those that differ.

    Where there are no checksums, only missing items are found.
    """
    missing = [f"{item}/" for item in items if not files.is_there(directory / item)]
    expected = _read_checksums(directory / CHECKSUMS)
    if not expected and files.is_there(directory / "data") and not files.is_remote(directory):  # else nobody has written any
        logger.warning("checkpoint %s has lost its %s: damage to its numbers would not be seen", directory.name, CHECKSUMS)
    differing = []
    for name, checksum in expected.items():
        item, file = name.partition("/")[0], directory / name
        if item not in items or f"{item}/" in missing:
            continue
        if not files.is_there(file):
            missing.append(name)
        elif _checksum(file) != checksum:
            differing.append(name)
    return missing, differing


def _read_checksums(path: epath.Path) -> dict[str, list[int]]:
    """What `write_checksums` has written; nothing where the file is missing or damaged itself."""
    with contextlib.suppress(ValueError):
        if files.is_there(path) and isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    return {}


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
