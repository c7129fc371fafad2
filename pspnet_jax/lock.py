"""A lock file that lets only one process at a time, on any machine, write to a run or prediction directory.

On one machine the kernel holds the lock and releases it when the process ends, even if the process is killed. On a shared file
system, machines may not see each other's kernel locks. So the owner also updates the file's modification time every few
seconds, and a process that finds a lock of another machine waits to see whether these updates continue.
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
HEARTBEAT = 10.0  # seconds between two updates of the lock file's time
TIMEOUT = 45.0  # seconds without an update after which an owner on another machine is considered dead


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Creates the directory and holds its lock, DIRECTORY/lock, for all processes of this job. Buckets are not locked.

    Raises:
      UserError: another process holds the lock, or the directory cannot be written.
    """
    descriptor, failure = None, None
    if jax.process_index() == 0:
        try:
            with files.writing(directory, "choose another place, or make it writable"):
                directory.mkdir(parents=True, exist_ok=True)
                descriptor = None if files.is_remote(directory) else _acquire(os.fspath(directory / "lock"))
        except UserError as error:
            failure = error
    if parallel.max_over_processes(failure is not None):
        raise failure or UserError(f"{directory}: the first process of this job cannot write there; its own message says why")
    if descriptor is None:
        yield
        return
    finished = threading.Event()
    heartbeat = threading.Thread(target=_update_time, args=(descriptor, finished), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        finished.set()
        heartbeat.join()
        with contextlib.suppress(OSError):
            os.unlink(directory / "lock")  # before the lock is released: see `_acquire`
        os.close(descriptor)


def _acquire(path: str) -> int:
    """Locks the file, writes this process's host and id into it, and returns its file descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            locked_here = _try_flock(descriptor)
            owner = _read_owner(descriptor)
            elsewhere = owner and (locked_here is None or owner["host"] != socket.gethostname())
            if locked_here is False or (elsewhere and _is_alive(path, owner)):
                raise UserError(_in_use(path, owner))
            if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.close(descriptor)  # its owner ended and deleted the file after it was opened here
                continue
            began = datetime.datetime.now().isoformat(" ", "seconds")
            content = {"host": socket.gethostname(), "pid": os.getpid(), "since": began}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _try_flock(descriptor: int) -> bool | None:
    """Returns whether the kernel grants the lock, or None if the file system does not support locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_owner(descriptor: int) -> dict[str, object]:
    """Returns the owner's host, process id and start time; empty if the file is new or damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
        return {name: owner[name] for name in ("host", "pid", "since")}
    except (ValueError, KeyError, TypeError):
        return {}


def _is_alive(path: str, owner: dict[str, object]) -> bool:
    """Returns whether a process on another machine updates its lock file within `TIMEOUT` seconds."""
    logger.warning(
        f"{path}: locked by process {owner['pid']} on {owner['host']} since {owner['since']}; waiting up to {TIMEOUT:.0f} s "
        "to see whether that process is still running"
    )
    seen, end = os.stat(path).st_mtime_ns, time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        time.sleep(min(1.0, TIMEOUT / 10))
        if not os.path.exists(path):
            return False
        if os.stat(path).st_mtime_ns != seen:
            return True
    logger.warning(f"{path}: the process has not updated the lock, which is now taken over")
    return False


def _update_time(descriptor: int, finished: threading.Event) -> None:
    while not finished.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _in_use(path: str, owner: dict[str, object]) -> str:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "the lock file does not say which"
    return f"another process writes to {os.path.dirname(path)} ({who}); wait until it ends, stop it or choose another directory"
