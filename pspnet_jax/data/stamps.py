"""An on-disk cache of results that depend on files. A result is computed again when one of its files has changed."""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from pspnet_jax import files as files_
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
MIN_AGE = 2.0  # seconds; a younger file may change without a new time stamp, because file systems round it
THREADS = 32  # for reading file times, which is slow in a bucket


def directory(cache_dir: str) -> pathlib.Path:
    """Creates and returns config.dataset.cache_dir, by default a directory in the system's temporary directory.

    If the default belongs to another user, this user's id is appended to its name.

    Raises:
      UserError: the directory cannot be written to.
    """
    if "://" in cache_dir:
        raise UserError(f"dataset.cache_dir={cache_dir!r}: expected a local directory")
    try:
        path = pathlib.Path(os.path.expanduser(cache_dir or f"{tempfile.gettempdir()}/pspnet_jax"))
        if not cache_dir and path.exists() and path.stat().st_uid != os.getuid():
            path = path.with_name(f"{path.name}_{os.getuid()}")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        where = cache_dir or "the directory for temporary files (TMPDIR)"
        raise UserError(
            f"dataset.cache_dir={cache_dir!r}: cannot write to {where} ({error.strerror}); expected a local directory"
        ) from error


def stat(file: str) -> tuple[int, ...]:
    """Returns values that change whenever a file does: its size, times (ns) and, if local, inode; () if it is missing."""
    try:
        if "://" in file:
            status = tf.io.gfile.stat(file)
            return status.length, status.mtime_nsec
        local = os.stat(file)
        return local.st_size, local.st_mtime_ns, local.st_ctime_ns, local.st_ino  # users cannot set st_ctime
    except (OSError, tf.errors.NotFoundError):
        return ()


def stats(files: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns `stat` of many files, read in parallel."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(stat, files))


def sizes(file_stats: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the size in bytes of each file, 0 if it is missing, given `stats`."""
    return [known[0] if known else 0 for known in file_stats]


def compute_once(
    cache_dir: str,
    name: str,
    files: Sequence[str],
    key: object,
    compute: Callable[[], bytes],
    file_stats: Sequence[tuple[int, ...]] | None = None,
) -> bytes:
    """Returns the result of `compute`, from the cache if the files are unchanged.

    One of the processes that share the directory computes the result while the others wait. If nothing can be cached (the
    directory cannot be written to, or a file has just changed), each process computes it.

    Args:
      cache_dir: config.dataset.cache_dir, which keeps the result.
      name: of the result.
      files: the files that the result depends on; without files, it is not cached.
      key: other values that the result depends on, compared by their repr.
      compute: computes the result.
      file_stats: `stats(files)`, if the caller has it.
    """
    now = time.time_ns()
    file_stats = stats(files) if file_stats is None else file_stats
    newest = max((ns for values in file_stats for ns in values[1:3]), default=0)
    if not files or now - newest < MIN_AGE * 1e9:
        return compute()
    try:
        path = directory(cache_dir) / f"{name}_{digest((key, list(zip(files, file_stats, strict=True))))}"
    except UserError as error:
        logger.warning(f"{error}; the next start has to compute {name!r} again")
        return compute()
    with _locked(path.with_suffix(".lock")):
        try:
            return zlib.decompress(path.read_bytes())
        except (OSError, zlib.error):  # missing or damaged
            result = compute()
        try:
            with files_.atomic(path) as temporary:
                temporary.write_bytes(zlib.compress(result, 1))
        except OSError as error:  # usually because the disk is full
            logger.warning(f"{path}: cannot be written ({error})")
    return result


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock, which the system releases even if the process is killed."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without file locks, each process computes the result
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield
