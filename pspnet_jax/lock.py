"""The lock of a directory: one process at a time writes a run or predictions there, on whatever machine it is.

On one machine the kernel holds the lock and drops it when its process ends, however that happens. Between machines that share a
file system it may know nothing; there the owner sets the file's time every few seconds, and one who finds the lock of another
machine watches whether that goes on.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
BEAT, PATIENCE = 10.0, 45.0  # seconds between two signs of life, and without one until the owner counts as dead


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Makes the directory and holds its lock, DIRECTORY/lock, for all processes of this job; a bucket has none.

    Raises:
      UserError: another process writes there, or nobody can.
    """
    descriptor, refusal = None, None
    if jax.process_index() == 0:
        try:
            with files.writing(directory, "choose another place, or make it writable"):
                directory.mkdir(parents=True, exist_ok=True)
                descriptor = None if files.is_remote(directory) else _take(os.fspath(directory / "lock"))
        except UserError as error:
            refusal = error
    if parallel.agree(refusal is not None):
        raise refusal or UserError(f"{directory}: the first process of this job may not write there, and says why")
    if descriptor is None:
        yield
        return
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(descriptor, over), daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        with contextlib.suppress(OSError):
            os.unlink(directory / "lock")  # before the lock is dropped: see `_take`
        os.close(descriptor)


def _take(path: str) -> int:
    """Returns the open lock file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            known = _lock(descriptor)
            owner = _owner(descriptor)
            if known is False or (owner and (known is None or owner["host"] != socket.gethostname()) and _lives(path, owner)):
                raise UserError(_refusal(path, owner))
            if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.close(descriptor)  # its owner ended, and took the file away, after it was opened here
                continue
            began = datetime.datetime.now().isoformat(" ", "seconds")
            content = {"host": socket.gethostname(), "pid": os.getpid(), "since": began}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel gives the lock; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(descriptor: int) -> dict[str, object]:
    """What the file says of its owner; nothing where it is new, or the disk was full."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
        return {name: owner[name] for name in ("host", "pid", "since")}
    except (ValueError, KeyError, TypeError):
        return {}


def _lives(path: str, owner: dict[str, object]) -> bool:
    """Watches the lock of another machine's process for a sign of life."""
    logger.warning(
        f"{path}: process {owner['pid']} on {owner['host']} has written here since {owner['since']}; waiting up to "
        f"{PATIENCE:.0f} s for a sign of life"
    )
    seen, end = os.stat(path).st_mtime_ns, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if not os.path.exists(path):
            return False
        if os.stat(path).st_mtime_ns != seen:
            return True
    logger.warning(f"{path}: there is none; the lock is taken over")
    return False


def _beat(descriptor: int, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _refusal(path: str, owner: dict[str, object]) -> str:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "a process that it does not name"
    return f"another process writes to {os.path.dirname(path)} ({who}); wait for its end, stop it, or choose another directory"
