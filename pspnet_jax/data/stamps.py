"""Results that hold for as long as some files stay as they are: computed once, not at each start, and kept beside the cache."""

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
SETTLED = 2.0  # seconds: a file younger than this may change again without a change of its time, as file systems round it
THREADS = 32  # in a bucket, to ask for a file's time takes long


def directory(cache_dir: str) -> pathlib.Path:
    """Returns config.dataset.cache_dir, or its default in the system's temporary directory, and makes it.

    Where the default is another user's, it is one with this user's number.

    Raises:
      UserError: it cannot be written to.
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
        where = cache_dir or "the directory for temporary files, TMPDIR"
        raise UserError(
            f"dataset.cache_dir={cache_dir!r}: cannot write to {where} ({error.strerror}); expected a local directory"
        ) from error


def stat(file: str) -> tuple[int, ...]:
    """Returns what changes whenever a file does: size and times (ns), of a local file also its inode; () if it is missing."""
    try:
        if "://" in file:
            status = tf.io.gfile.stat(file)
            return status.length, status.mtime_nsec
        local = os.stat(file)
        return local.st_size, local.st_mtime_ns, local.st_ctime_ns, local.st_ino  # nobody can set st_ctime back
    except (OSError, tf.errors.NotFoundError):
        return ()


def stats(files: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns `stat` of many files, asked for at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(stat, files))


def once(
    cache_dir: str,
    name: str,
    files: Sequence[str],
    also: object,
    compute: Callable[[], bytes],
    known: Sequence[tuple[int, ...]] | None = None,
) -> bytes:
    """Returns what `compute` returns, without calling it where that is known for the same files as they are now.

    One process of those that share the directory computes it, while the others wait. Where nothing can be kept (the directory
    cannot be written to, or a file has changed just now), each computes it for itself.

    Args:
      cache_dir: config.dataset.cache_dir, which keeps it.
      name: of what is computed.
      files: those that the result depends on; a result that depends on none is not kept.
      also: what else it depends on, something with a repr.
      compute: the work.
      known: `stats(files)`, if the caller has it.
    """
    now = time.time_ns()
    known = stats(files) if known is None else known
    newest = max((ns for times in known for ns in times[1:3]), default=0)
    if not files or now - newest < SETTLED * 1e9:
        return compute()
    try:
        path = directory(cache_dir) / f"{name}_{digest((also, list(zip(files, known, strict=True))))}"
    except UserError as error:
        logger.warning(f"{error}; {name} will be looked for again at the next start")
        return compute()
    with _locked(path.with_suffix(".lock")):
        try:
            return zlib.decompress(path.read_bytes())
        except (OSError, zlib.error):  # not there, or damaged
            result = compute()
        try:
            with files_.atomic(path) as temporary:
                temporary.write_bytes(zlib.compress(result, 1))
        except OSError as error:  # the disk is full, above all
            logger.warning(f"{path}: cannot be written ({error})")
    return result


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process holds the lock; it ends with its process, however that ends."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks: then each process works for itself
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield
