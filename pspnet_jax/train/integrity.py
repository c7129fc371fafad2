"""Checks whether a checkpoint is usable, not finite, damaged (only if that is certain), of another network, or unreachable."""

import collections
import enum
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError, first_line, listed
from pspnet_jax.train import manifest
from pspnet_jax.train.manifest import DamagedError, Manifest

logger = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES = (1.0, 5.0, 15.0)  # seconds before each new attempt to read a checkpoint that could not be read


class Verdict(enum.IntEnum):
    """Result of reading a checkpoint. If processes differ, all of them act on the largest value."""

    GOOD = 0
    NOT_FINITE = 1
    DAMAGED = 2
    OTHER_NETWORK = 3
    UNREACHABLE = 4


DESCRIPTIONS = {
    Verdict.NOT_FINITE: "has values that are not finite",
    Verdict.DAMAGED: "is damaged",
    Verdict.OTHER_NETWORK: "belongs to another network",
    Verdict.UNREACHABLE: "could not be read",
}


class OtherNetworkError(Exception):
    """The saved arrays do not match those of the network."""


# Exceptions, and status codes at the start of tensorstore and gRPC errors, that mean a file has the wrong content.
_CONTENT_CODES = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_CONTENT_ERRORS = (DamagedError, *_NO_FILE, ValueError, KeyError, TypeError, EOFError)


def classify(error: Exception) -> Verdict:
    """Returns the verdict for an exception raised while reading a checkpoint."""
    if isinstance(error, OtherNetworkError):
        return Verdict.OTHER_NETWORK
    code = None if isinstance(error, OSError) else re.match(r"([A-Z_]{6,}): ", str(error))
    damaged = code[1] in _CONTENT_CODES if code else isinstance(error, _CONTENT_ERRORS)
    return Verdict.DAMAGED if damaged else Verdict.UNREACHABLE


Items = Callable[[], Sequence[str]]


def read_checked(directory: epath.Path, items: Items, read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
    """Reads and checks a checkpoint together with the other processes, and retries if it is unreachable.

    Args:
      directory: directory of the checkpoint.
      items: returns the names of the items that `read` reads.
      read: reads and returns a tree of arrays or other values.

    Returns:
      The common verdict of all processes, a description such as "is damaged (...)", and the result of `read`.

    Raises:
      UserError: the checkpoint is still unreachable after all retries.
    """
    for pause in (*PAUSES, None):
        own, description, result = _read_once(directory, items, read)
        verdict = Verdict(parallel.max_over_processes(own))
        if verdict != own:
            description = "was rejected by another process of this job; its own message says why"
        if verdict is not Verdict.UNREACHABLE:
            return verdict, description, result
        if pause is not None:
            logger.warning("checkpoint %s %s; trying again in %.0f s", directory.name, description, pause)
            time.sleep(pause)
    raise UserError(
        f"checkpoint {directory.name} in {directory.parent} {description}; it may be intact, and nothing was changed: "
        "try again when the storage is available"
    )


def _read_once(directory: epath.Path, items: Items, read: Callable[[], T]) -> tuple[Verdict, str, T | None]:
    try:
        if missing := missing_items(directory, items()):  # orbax would log long errors, even about files that are not essential
            return Verdict.DAMAGED, f"is damaged or incomplete (missing: {listed(missing)})", None
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):
        raise  # not caused by the files
    except Exception as error:  # orbax raises many types for damaged files
        verdict = classify(error)
        return verdict, f"{DESCRIPTIONS[verdict]} ({first_line(error)})", None
    if found := describe_non_finite(result):
        return Verdict.NOT_FINITE, f"{DESCRIPTIONS[Verdict.NOT_FINITE]} ({found})", result
    return Verdict.GOOD, "", result


def missing_items(directory: epath.Path, items: Sequence[str]) -> list[str]:
    """Returns which of some items a checkpoint lacks. Warns if it has lost its manifest."""
    if not manifest.read(directory) and files.is_there(directory / "data") and not files.is_remote(directory):
        logger.warning("checkpoint %s has lost its manifest: damage to its values would not be detected", directory.name)
    return [f"{item}/" for item in items if not files.is_there(directory / item)]


def check_shapes(directory: epath.Path, targets: dict[str, Any], saved: Manifest) -> None:
    """Compares the shapes of saved arrays with those of the targets: by name, or for the optimizer, as a multiset.

    Raises:
      OtherNetworkError: lists the arrays that differ.
      DamagedError: the shapes in the checkpoint differ, but not those in its manifest.
    """
    for item, target in targets.items():
        if difference := _difference(item, ocp.PyTreeCheckpointHandler().metadata(directory / item).tree, target):
            if saved and not _difference(item, manifest.shapes(saved, item), target):
                raise DamagedError(f"the description of {item} has changed since it was saved: {difference}")
            raise OtherNetworkError(difference)


def _difference(item: str, saved: Any, target: Any) -> str:
    """Describes how the shapes of an item's saved arrays differ from the target's; empty if they do not."""
    if item == "optimizer":
        found, wanted = ([tuple(leaf.shape) for leaf in jax.tree.leaves(tree)] for tree in (saved, target))
        same = collections.Counter(found) == collections.Counter(wanted)
        return "" if same else "the optimizer state has different arrays"
    old, new = ({k: tuple(v.shape) for k, v in _leaves(tree).items()} for tree in (saved, target))
    differing = [f"{k} {old.get(k, 'missing')} -> {new.get(k, 'missing')}" for k in {**old, **new} if old.get(k) != new.get(k)]
    return f"saved -> this network: {listed(differing, 3, '; ')}" if differing else ""


def describe_non_finite(tree: Any) -> str | None:
    """Describes the first array with NaN or infinite values and counts the others; None if all values are finite."""
    bad = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            continue
        values = np.asarray(parallel.local(leaf))
        if jax.numpy.issubdtype(values.dtype, jax.numpy.floating) and (count := int((~np.isfinite(values)).sum())):
            bad.append(f"{count} of {values.size} values of {jax.tree_util.keystr(path, simple=True, separator='/')}")
    if not bad:
        return None
    return f"{bad[0]} are NaN or infinite" + (f", and so are values of {len(bad) - 1} other array(s)" if len(bad) > 1 else "")


def _leaves(tree: Any) -> dict[str, Any]:
    return {k: v for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items() if hasattr(v, "shape")}
