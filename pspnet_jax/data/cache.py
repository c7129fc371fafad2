"""A cache of decoded examples, in memory or on disk, filled as they are first read."""

import functools
import logging
import pathlib
import shutil
import struct
import threading
import zlib
from collections.abc import Callable

import numpy as np
import psutil
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.data import stamps
from pspnet_jax.data.sources import Example, Source
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Read = Callable[[int], Example]
VERSION = 3  # of decoding; examples on disk from another version are not used
HEADER = struct.Struct("<III")  # of an example on disk: CRC-32 of its pixels, height, width


class CacheBudget:
    """The limit on what all datasets together may cache: half of the bytes that are free at the start."""

    def __init__(self, dataset: ConfigDict):
        """Measures the free space where config.dataset.cache keeps examples.

        Raises:
          UserError: config.dataset.cache_dir cannot be written to.
        """
        self._path = stamps.directory(dataset.cache_dir) if dataset.cache == "disk" else None
        self._min_free = self._free() // 2 if dataset.cache else 0
        self._taken, self._closed, self._lock = 0, False, threading.Lock()

    def _free(self) -> int:
        return shutil.disk_usage(self._path).free if self._path else _available_memory()

    def take(self, size: int) -> bool:
        """Returns whether this many bytes may be cached, and if so, counts them as used.

        Raises:
          OSError: the directory no longer exists.
        """
        with self._lock:
            if not self._closed and self._free() - size >= self._min_free:
                self._taken += size
                return True
        self.close("half of the space that was free is used")
        return False

    def close(self, reason: str) -> None:
        """Stops caching, and logs the reason once."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            kept, where = self._taken / 2**30, self._path or "memory"
            logger.warning(f"dataset.cache: stopped at {kept:.1f} GiB in {where} ({reason}); the rest is decoded each time")


def cached(source: Source, dataset: ConfigDict, budget: CacheBudget) -> Read:
    """Returns `source.read` with the cache that config.dataset.cache selects.

    A memory cache belongs to one process. A disk cache is shared by all processes that use its directory. Its key is the
    example's name and the path, size and times of its files, so that a changed file is decoded again.

    Raises:
      UserError: config.dataset.cache_dir cannot be written to, or the source names no files that show when an example changes.
    """
    if source.by_windows:
        if dataset.cache:
            logger.warning("dataset.cache is not used, because the large TIFFs are read by windows")
        return source.read
    if dataset.cache == "memory":
        return _in_memory(source.read, budget)
    if dataset.cache == "disk":
        if not source.files(0):
            raise UserError("dataset.cache='disk': this source names no files, so changes would go unnoticed; use 'memory'")
        path = stamps.directory(dataset.cache_dir)
        path_of = functools.cache(lambda index: path / f"{_identity(source, index, dataset)}.npy")
        return _on_disk(source, budget, path_of)
    return source.read


def _in_memory(read: Read, budget: CacheBudget) -> Read:
    kept: dict[int, Example] = {}

    def call(index: int) -> Example:
        if index in kept:
            return kept[index]
        image, label = read(index)
        if budget.take(image.nbytes + label.nbytes):
            kept[index] = image, label
        return image, label

    return call


def _on_disk(source: Source, budget: CacheBudget, path_of: Callable[[int], pathlib.Path]) -> Read:
    """Keeps one memory-mapped .npy file per example: the `HEADER`, then the bytes of the image and of the label."""
    verified: set[int] = set()  # examples whose checksum has been compared
    channels, dtype = source.pixel_format

    def call(index: int) -> Example:
        path = path_of(index)
        try:
            kept = np.load(path, mmap_mode="r")
            checksum, height, width = HEADER.unpack(kept[: HEADER.size].tobytes())
            pixels = kept[HEADER.size :]
            if kept.dtype != np.uint8 or (index not in verified and zlib.crc32(pixels.data) != checksum):
                raise ValueError(f"{path} is damaged")
            verified.add(index)
            image, label = np.split(pixels, [-height * width])
            return image.view(dtype).reshape(height, width, channels), label.reshape(height, width)
        except (OSError, ValueError, EOFError, struct.error):  # missing or damaged
            image, label = source.read(index)
        try:
            if budget.take(image.nbytes + label.nbytes):
                pixels = np.concatenate([image.ravel().view(np.uint8), label.ravel()])
                header = np.frombuffer(HEADER.pack(zlib.crc32(pixels.data), *label.shape), np.uint8)
                with files.atomic(path) as temporary:
                    np.save(temporary, np.concatenate([header, pixels]))
        except OSError as error:  # usually because something else has filled the disk
            budget.close(str(error))
        return image, label

    return call


def _identity(source: Source, index: int, dataset: ConfigDict) -> str:
    """Returns a digest of the example's dataset and name, and of its files' paths, sizes and times."""
    kind = source.pixel_format, source.num_classes, source.reading
    key = (VERSION, *kind, dataset.name, dataset.root, dataset.tfds_name, source.names[index])
    return stamps.digest((*key, [(file, stamps.stat(file)) for file in source.files(index)]))


def _available_memory() -> int:
    """Returns the number of bytes that can be allocated without swapping and within a container's limit."""
    available = psutil.virtual_memory().available
    limit, used, stat = (pathlib.Path(f"/sys/fs/cgroup/memory{s}") for s in (".max", ".current", ".stat"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        reclaimable = int(dict(line.split() for line in stat.read_text().splitlines())["inactive_file"])
        available = min(available, int(most) - int(used.read_text()) + reclaimable)
    return available
