"""What is found out about the examples once and then kept: their decoded pixels, and which classes they hold."""

import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.data.sources import Source
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
Read = Callable[[int], tuple[np.ndarray, np.ndarray]]  # an index -> its image uint8[H,W,3] and label uint8[H,W]
VERSION = 1  # of decoding: examples that another version has kept on disk are not used


class Room:
    """What may be kept, by all datasets together: until half of the bytes that are free now are left."""

    def __init__(self, dataset: ConfigDict):
        """Looks at the memory or disk of config.dataset.cache.

        Raises:
          ValueError: config.dataset.cache_dir cannot be written to.
        """
        self._path = _directory(dataset) if dataset.cache == "disk" else None
        self._least = self._free() // 2 if dataset.cache else 0
        self._taken, self._closed, self._lock = 0, False, threading.Lock()

    def _free(self) -> int:
        return shutil.disk_usage(self._path).free if self._path else _available_memory()

    def take(self, size: int) -> bool:
        """Whether there was room for this.

        Raises:
          OSError: the directory is gone.
        """
        with self._lock:
            if not self._closed and self._free() - size >= self._least:
                self._taken += size
                return True
        self.close("half of what was free")
        return False

    def close(self, reason: str) -> None:
        """Leaves no more room, and says so once."""
        with self._lock:
            told, self._closed = self._closed, True
        if not told:
            kept, where = self._taken / 2**30, self._path or "memory"
            logger.warning(f"dataset.cache: {kept:.1f} GiB are kept in {where} ({reason}); the rest is decoded each time")


def cached(read: Read, source: Source, dataset: ConfigDict, room: Room) -> Read:
    """Returns `read` with a memory: examples are kept when they are first read, as config.dataset.cache says.

    They may take half of the memory or disk space that was free, together with all else that takes of it meanwhile, such as
    other processes with a cache; what does not fit is decoded each time. On disk, an example is found by its name and by
    path, size and time of its files, so that a changed file is read anew.

    Raises:
      ValueError: config.dataset.cache_dir cannot be written to.
    """
    if dataset.cache == "memory":
        return _Memory(read, room)
    if dataset.cache == "disk":
        path = _directory(dataset)
        name = functools.cache(lambda index: _digest(_identity(source, index, dataset)))
        return _Disk(read, room, lambda index: path / f"{name(index)}.npy")
    return read


def classes_held(read: Read, source: Source, num_classes: int, dataset: ConfigDict) -> np.ndarray:
    """Returns bool[N,K]: which of the K classes are in the label of each of the source's N examples.

    Looks at all labels once, and keeps the table in config.dataset.cache_dir for as long as names and files stay as they are.

    Raises:
      ValueError: see `cached`; or no label has a class in it.
    """
    with ThreadPoolExecutor(32) as pool:  # in a bucket, to ask for a file's time takes long
        identities = list(pool.map(lambda index: _identity(source, index, dataset), range(len(source))))
    path = _directory(dataset) / f"classes_{_digest(repr((num_classes, identities)))}.npy"
    if (kept := _load(path)) is not None:
        return kept

    def held(index: int) -> np.ndarray:
        found = np.zeros(256, bool)
        found[read(index)[1]] = True
        return found[:num_classes]

    logger.info(f"dataset.balance: looking for the classes in {len(source)} labels, once; {path} keeps what is found")
    table = np.zeros((len(source), num_classes), bool)
    with progress("classes", len(source)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, row in enumerate(pool.map(held, range(len(source)))):
            table[index] = row
            advance(1)
    if not table.any():
        raise ValueError(f"dataset.balance={dataset.balance}: no label of {dataset.root} has a class in it; expected 0 there")
    with files.atomic(path) as temporary:
        np.save(temporary, table)
    return table


class _Memory:
    def __init__(self, read: Read, room: Room):
        self._read, self._room = read, room
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self._kept:
            return self._kept[index]
        image, label = self._read(index)
        if self._room.take(image.nbytes + label.nbytes):
            self._kept[index] = image, label
        return image, label


class _Disk:
    """One .npy an example, which is mapped, not read: uint8[4H,W], the bytes of the image and then the label."""

    def __init__(self, read: Read, room: Room, path: Callable[[int], pathlib.Path]):
        self._read, self._room, self._path = read, room, path

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(index)
        if (rows := _load(path, mmap_mode="r")) is not None:
            height = len(rows) // 4
            return rows[: 3 * height].reshape(height, -1, 3), rows[3 * height :]
        image, label = self._read(index)
        try:
            if self._room.take(image.nbytes + label.nbytes):
                with files.atomic(path) as temporary:
                    np.save(temporary, np.concatenate([image.reshape(-1, label.shape[1]), label]))
        except OSError as error:  # others have filled the disk, above all
            self._room.close(str(error))
        return image, label


def _load(path: pathlib.Path, **how: Any) -> np.ndarray | None:
    """Returns an array that is kept; None if it is not, or damaged."""
    try:
        return np.asarray(np.load(path, **how))
    except (OSError, ValueError, EOFError):
        return None


def _available_memory() -> int:
    """Bytes that can be taken without swapping, and within a container's limit."""
    available = psutil.virtual_memory().available
    limit, used, stat = (pathlib.Path(f"/sys/fs/cgroup/memory{s}") for s in (".max", ".current", ".stat"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        reclaimable = int(dict(line.split() for line in stat.read_text().splitlines())["inactive_file"])
        available = min(available, int(most) - int(used.read_text()) + reclaimable)
    return available


def _directory(dataset: ConfigDict) -> pathlib.Path:
    path = pathlib.Path(os.path.expanduser(dataset.cache_dir or f"{tempfile.gettempdir()}/pspnet_jax"))
    if "://" in dataset.cache_dir:
        raise ValueError(f"dataset.cache_dir={dataset.cache_dir!r}: expected a local directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(
            f"dataset.cache_dir={dataset.cache_dir!r}: cannot write to {path} ({error.strerror}); expected a local directory"
        ) from error


def _identity(source: Source, index: int, dataset: ConfigDict) -> str:
    """Changes whenever the example may: where it is, its name, and its files' paths, sizes and times."""
    where = (VERSION, dataset.name, dataset.root, dataset.tfds_name, len(dataset.class_names), source.names[index])
    stats = [(file, tf.io.gfile.stat(file)) for file in source.files(index)]
    return repr((*where, [(file, stat.length, stat.mtime_nsec) for file, stat in stats]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
