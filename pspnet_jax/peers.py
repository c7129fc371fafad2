"""Ends this process, with one sentence, if another process of its job is gone; then all can be started again and resume.

JAX's coordination service watches the processes by heartbeats of threads in C++, which Python code cannot delay, and aborts the
others if one stops sending them; `peer_report` translates what JAX then writes. A collective operation whose other side is gone
fails at once, or waits forever; in either case, this process ends once the coordination service has noticed.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from pspnet_jax import peer_report
from pspnet_jax.errors import causes

HEARTBEAT_TIMEOUT = 20  # seconds without a heartbeat after which a process counts as gone; JAX's default is 100
SHUTDOWN_TIMEOUT = 24 * 3600  # seconds that a process waits for the others at its end, unless they are gone
GRACE = 5.0  # seconds that a process waits for the others after an error, which may have happened in all of them
_translators: list[subprocess.Popen[bytes]] = []


def watch() -> None:
    """Starts to translate JAX's reports. Called once the processes are connected."""
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", peer_report.__file__]
    _translators.append(subprocess.Popen(command, stdin=reader, stdout=2, start_new_session=True))
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    advise("start the same command on all hosts again")


def advise(what: str) -> None:
    """Sets the end of the sentence."""
    if _translators:
        with contextlib.suppress(OSError):  # the translator was killed
            os.write(2, peer_report.ADVICE + what.encode() + b"\n")


def run(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and exits with the status that it returns.

    After an error in one of several processes, this process ends without waiting for its threads and for the other processes,
    which may wait for it.
    """
    try:
        status = main()
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # Errors of JAX and of collective operations have a status code.
        if any(re.match(r"[A-Z_]{6,}: ", str(cause)) for cause in causes(error)):
            time.sleep(HEARTBEAT_TIMEOUT + GRACE)  # JAX ends this process first if another one is gone
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(GRACE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
