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

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.data.sources import Source
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
Read = Callable[[int], tuple[np.ndarray, np.ndarray]]  # an index -> its image uint8[H,W,3] and label uint8[H,W]
VERSION = 1  # of decoding: examples that another version has kept on disk are not used


def cached(read: Read, source: Source, dataset: ConfigDict) -> Read:
    """Returns `read` with a memory: examples are kept when they are first read, as config.dataset.cache says.

    They take up to half of the memory or disk space that is free now, shared by the datasets of a mixture; what does not fit
    is decoded each time. On disk, an example is found by its name and by path, size and time of its files, so that a changed
    file is read anew.

    Raises:
      ValueError: config.dataset.cache_dir cannot be written to.
    """
    share = 2 * (1 + len(dataset.mixture))
    if dataset.cache == "memory":
        return _Memory(read, _Room(_available_memory() // share, "memory"))
    if dataset.cache == "disk":
        path = _directory(dataset)
        name = functools.cache(lambda index: _digest(_identity(source, index, dataset)))
        return _Disk(read, _Room(shutil.disk_usage(path).free // share, str(path)), lambda index: path / f"{name(index)}.npy")
    return read


def classes_held(read: Read, source: Source, num_classes: int, dataset: ConfigDict) -> np.ndarray:
    """Returns bool[N,K]: which of the K classes are in the label of each of the source's N examples.

    Looks at all labels once, and keeps the table in config.dataset.cache_dir for as long as names and files stay as they are.

    Raises:
      ValueError: see `cached`; or no label has a class in it.
    """
    identities = [_identity(source, index, dataset) for index in range(len(source))]
    path = _directory(dataset) / f"classes_{_digest(repr((num_classes, identities)))}.npy"
    if path.exists():
        return np.load(path)

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


class _Room:
    """Bytes that may be kept, shared out among threads."""

    def __init__(self, size: int, where: str):
        self._size, self._taken, self._where, self._closed = size, 0, where, False
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there was room for this."""
        with self._lock:
            if not self._closed and self._taken + size <= self._size:
                self._taken += size
                return True
        self.close("all that it may take")
        return False

    def close(self, reason: str) -> None:
        """Leaves no more room, and says so once."""
        with self._lock:
            told, self._closed = self._closed, True
        if not told:
            kept = self._taken / 2**30
            logger.warning(f"dataset.cache: {kept:.1f} GiB are kept in {self._where} ({reason}); the rest is decoded each time")


class _Memory:
    def __init__(self, read: Read, room: _Room):
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

    def __init__(self, read: Read, room: _Room, path: Callable[[int], pathlib.Path]):
        self._read, self._room, self._path = read, room, path

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(index)
        if path.exists():
            rows = np.asarray(np.load(path, mmap_mode="r"))
            height = len(rows) // 4
            return rows[: 3 * height].reshape(height, -1, 3), rows[3 * height :]
        image, label = self._read(index)
        if self._room.take(image.nbytes + label.nbytes):
            try:
                with files.atomic(path) as temporary:
                    np.save(temporary, np.concatenate([image.reshape(-1, label.shape[1]), label]))
            except OSError as error:  # others have filled the disk, above all
                self._room.close(str(error))
        return image, label


def _available_memory() -> int:
    """Bytes that can be taken without swapping, as Linux estimates it; elsewhere half of the machine's memory."""
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _directory(dataset: ConfigDict) -> pathlib.Path:
    path = pathlib.Path(dataset.cache_dir or f"{tempfile.gettempdir()}/pspnet_jax").expanduser()
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
    where = (VERSION, dataset.name, dataset.root, dataset.tfds_name, source.names[index])
    stats = [(file, tf.io.gfile.stat(file)) for file in source.files(index)]
    return repr((*where, [(file, stat.length, stat.mtime_nsec) for file, stat in stats]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
