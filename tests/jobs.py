"""Jobs of one or more processes with a device each, which tests stop and kill.

A server forks the processes, so that packages are imported only once: `python -m tests.jobs`. It is used through `Jobs`.
"""

import ctypes
import fcntl
import functools
import json
import os
import pathlib
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from jax.experimental import multihost_utils

from pspnet_jax import parallel, peers
from pspnet_jax.errors import UserError
from tests.train import OneLayer, fit, make_batch, score, tiny_config

ROOT = pathlib.Path(__file__).parents[1]


class Jobs:
    """Starts jobs, one at a time. Each writes its output to WORKDIR.INDEX.txt."""

    def __init__(self, programs: pathlib.Path):
        environment = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "OPENBLAS_NUM_THREADS": "1",  # a process with threads should not fork
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.jobs"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)
        self._ids: list[int] = []

    def start(self, job: str, workdir: pathlib.Path, count: int, heartbeat: int = 4, **options: object) -> list[int]:
        """Starts one of the functions below in several processes, and returns their ids.

        `heartbeat` is the number of seconds after which a process without a heartbeat counts as gone.
        """
        self._end()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._workdir = workdir
        self._server.stdin.write(json.dumps([job, str(workdir), count, port, heartbeat, options]) + "\n")
        self._server.stdin.flush()
        self._ids = json.loads(self._server.stdout.readline())
        return self._ids

    def output(self, index: int) -> str:
        return pathlib.Path(f"{self._workdir}.{index}.txt").read_text()

    def wait_for(self, text: str, index: int = 0) -> None:
        """Waits until a process has written a text."""
        while text not in self.output(index):
            assert not self.ended, self.output(index)
            time.sleep(0.05)

    @property
    def ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def exit_codes(self, seconds: float = 120) -> list[int]:
        """Waits for the end of all processes, and returns their exit codes; the negative number of a signal that ended one."""
        assert select.select([self._server.stdout], [], [], seconds)[0], f"the job has not ended after {seconds} s"
        codes = json.loads(self._server.stdout.readline())
        self._ids = []
        for index in range(len(codes)):  # what they have started may still write, as `peer_report` does
            with open(f"{self._workdir}.{index}.txt") as output:
                fcntl.flock(output, fcntl.LOCK_SH)
        return codes

    def _end(self) -> None:
        """Kills the processes of a job that a test has left."""
        if self._ids and not self.ended:
            for child in self._ids:
                os.kill(child, signal.SIGKILL)
        if self._ids:
            self.exit_codes()

    def close(self) -> None:
        self._end()
        self._server.communicate()


def train(index: int, count: int, workdir: str, steps: int, full_at: int = 0) -> int:
    """Trains the smallest network. With `full_at`, the last process cannot write more than 64 bytes from that step on."""
    config = tiny_config()
    config.total_steps = steps
    config.every.update(log=1, save=4, eval=6)
    share = slice(8 // count * index, 8 // count * (index + 1))
    evaluating = pathlib.Path(workdir) / "evaluating"

    def batches(start):
        for step in range(start, steps):
            time.sleep(0.01)
            if step == full_at > 0 and index == count - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
            yield {name: array[share] for name, array in make_batch(step % 8).items()}

    def evaluate(variables):
        evaluating.touch()
        time.sleep(0.1)
        evaluating.unlink(missing_ok=True)
        return score(variables)

    fit(config, batches, evaluate, workdir, model=OneLayer())
    return 0


def meet(index: int, count: int, workdir: str, then: str = "") -> int:
    """Lets the processes meet again and again, or does something else in one of them or in all after a few times."""
    for number in range(10 if then.startswith("be") else sys.maxsize):
        multihost_utils.process_allgather(number)
        if number == 5:
            print("met", flush=True)
            if then == "fail in all":
                print(f"error: process {index} is out of paper", file=sys.stderr)
                return 1
            if index == 1 and then == "fail in one":
                print("error: out of paper", file=sys.stderr)
                return 1
            if index == 1 and then == "raise":
                raise TypeError("a bug")
            if index == 1 and then == "be slow":
                ctypes.PyDLL(None).sleep(8)  # a PyDLL holds the interpreter's lock, so no Python code runs meanwhile
    if then == "be different":
        time.sleep(6 * index)  # the processes do not end at the same time
    return 0


def serve() -> None:
    """Reads a line for each job, and writes the ids of its processes, and their exit codes when all have ended."""
    end_with_parent()
    for line in sys.stdin:
        job, workdir, count, port, peers.HEARTBEAT_TIMEOUT, options = json.loads(line)
        ids = []
        for index in range(count):
            output = os.open(f"{workdir}.{index}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            fcntl.flock(output, fcntl.LOCK_EX)  # until it is closed everywhere
            if not (child := os.fork()):
                end_with_parent()
                os.dup2(output, 1)
                os.dup2(output, 2)
                place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
                os.environ.update({f"JAX_{name}": value for name, value in place.items()})
                peers.run(functools.partial(run, globals()[job], index, count, workdir, options))
            os.close(output)
            ids.append(child)
        print(json.dumps(ids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ids]), flush=True)


def end_with_parent() -> None:
    """Makes Linux kill this process when its parent ends, for example because the tests are interrupted."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(job: Callable[..., int], index: int, count: int, workdir: str, options: dict[str, Any]) -> int:
    if count > 1:
        parallel.start_processes()
    try:
        return job(index, count, workdir, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    serve()
