"""A lock file that lets only one job at a time, on any machine, write to a run or prediction directory.

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
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError, listed

logger = logging.getLogger(__name__)
HEARTBEAT = 10.0  # seconds between two updates of the lock file's time
APPEARS_WITHIN = 10  # seconds until all processes of a job have to see a new file
TIMEOUT = 45.0  # seconds without an update after which an owner on another machine is considered dead


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Creates the directory and holds its lock, DIRECTORY/lock, for all processes of this job. Buckets are not locked.

    Raises:
      UserError: another job holds the lock, the directory cannot be written, or the processes do not share it.
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
        _require_shared(directory)
        yield
        return
    finished = threading.Event()
    heartbeat = threading.Thread(target=_update_time, args=(descriptor, finished), daemon=True)
    heartbeat.start()
    try:
        _require_shared(directory)
        yield
    finally:
        finished.set()
        heartbeat.join()
        with contextlib.suppress(OSError):
            os.unlink(directory / "lock")  # before the lock is released: see `_acquire`
        os.close(descriptor)


def _require_shared(directory: epath.Path) -> None:
    """Raises UserError unless all processes of this job see the same directory.

    Each host could have a directory of this name, with the same files or none. So the first process writes a file with a random
    name, which the others have to find.
    """
    if jax.process_count() == 1:
        return
    token = directory / f".shared-{next(iter(parallel.exchange(secrets.token_hex(8)).values()))}"
    try:
        with parallel.fail_together("writing"):
            if jax.process_index() == 0:
                with files.writing(directory, "choose another place, or make it writable"):
                    token.write_text("all processes of a job have to see this file\n")
        found = parallel.exchange(_appears(token))
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                token.unlink(missing_ok=True)
    if lacking := [name for name, sees in found.items() if not sees]:
        raise UserError(
            f"{directory}: {listed(lacking, 1)} cannot see a file that {next(iter(found))} has written there; all hosts have "
            "to share this directory, so choose one in a bucket (gs://...) or on a shared file system"
        )


def _appears(path: epath.Path) -> bool:
    """Returns whether a file exists, after waiting for it, since network file systems may be slow to show it."""
    for _ in range(APPEARS_WITHIN):
        with contextlib.suppress(OSError):
            if files.is_there(path):
                return True
        time.sleep(1)
    return False


def _acquire(path: str) -> int:
    """Locks the file, writes this process's host and id into it, and returns its file descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            locked_here = _try_flock(descriptor)
            owner = _read_owner(descriptor, path)
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


def _read_owner(descriptor: int, path: str) -> dict[str, object]:
    """Returns the owner's host, process id and start time; empty if the file is new or lost its content.

    Raises UserError if the file is something else, which a lock would overwrite.
    """
    content = os.pread(descriptor, 10_000, 0)
    if not content.strip(b"\0"):  # zeros: after a power failure
        return {}
    try:
        owner = json.loads(content)
        return {name: owner[name] for name in ("host", "pid", "since")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is not a lock file of this program, which needs the name; rename it, delete it or choose another place"
        ) from error


def _is_alive(path: str, owner: dict[str, object]) -> bool:
    """Returns whether a process on another machine updates its lock file within `TIMEOUT` seconds."""
    logger.warning(
        f"{path}: locked by process {owner['pid']} on {owner['host']} since {owner['since']}; waiting up to {TIMEOUT:.0f} s "
        "to see whether that process is still running"
    )
    with contextlib.suppress(FileNotFoundError):  # the process has ended
        seen, end = os.stat(path).st_mtime_ns, time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            time.sleep(min(1.0, TIMEOUT / 10))
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
