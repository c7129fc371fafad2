"""The manifest of a checkpoint: the shape, dtype and SHA-256 of each of its arrays, which detect bit rot.

Neither orbax nor tensorstore notices a changed value. The digests are those of the values in memory, before they are written
and after they are read. So they cover everything in between (compression, file formats, networks, disks, buckets), and no file
has to be read again to compute them. The manifest is another item of the checkpoint, so it is written before the checkpoint
counts as complete.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pspnet_jax import files, parallel
from pspnet_jax.errors import listed

ITEM = "sha256"
Manifest = dict[str, dict[str, list[Any]]]  # {item: {path of an array: [shape, dtype, SHA-256]}}


class DamagedError(Exception):
    """The contents of a checkpoint have changed since it was saved."""


def describe(items: Mapping[str, Any]) -> Manifest:
    """Returns the manifest of some items, which are trees of replicated arrays. Computes several digests at a time."""
    leaves = [(item, *leaf) for item, tree in items.items() for leaf in _leaves(tree)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(_sha256, [leaf for _, _, leaf in leaves])
    manifest: Manifest = {item: {} for item in items}
    for (item, path, leaf), digest in zip(leaves, digests, strict=True):
        manifest[item][path] = [list(leaf.shape), str(leaf.dtype), digest]
    return manifest


def document(value: Any) -> np.ndarray:
    """Returns data that is saved as JSON as an array that can be part of a manifest, uint8[N]."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def read(checkpoint: epath.Path) -> Manifest:
    """Reads the manifest of a checkpoint; empty if it is missing or damaged itself."""
    return files.read_json(checkpoint / ITEM / "metadata")


def shapes(manifest: Manifest, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of an item's arrays, by path."""
    return {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, (shape, dtype, _) in manifest.get(item, {}).items()}


def verify(manifest: Manifest, item: str, tree: Any) -> None:
    """Raises DamagedError, which lists them, if arrays of an item have changed. Those not in the manifest are not checked."""
    if not (expected := manifest.get(item)):
        return
    found = describe({item: tree})[item]
    if changed := [path for path, entry in found.items() if expected.get(path, entry) != entry]:
        names = [f"{item}/{path}".rstrip("/") for path in changed]
        raise DamagedError(f"content has changed since it was saved: {listed(names)}")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _sha256(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(parallel.local(array)).reshape(-1).view(np.uint8).data).hexdigest()
