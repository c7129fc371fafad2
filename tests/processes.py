"""Starts the processes of one job, each with CPU devices of its own, as if they were hosts."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(
    count: int,
    *command: str,
    options: bool = False,
    timeout: float = 300,
    meanwhile: Callable[[list[subprocess.Popen]], object] = lambda _: None,
) -> list[subprocess.CompletedProcess]:
    """Runs `python COMMAND` in several processes with a device each, and returns their exit codes and output.

    Each gets its place from environment variables or, with `options`, as options of the command line. `meanwhile` is called
    with the processes once they are started.
    """
    place = {"--coordinator": f"127.0.0.1:{free_port()}", "--processes": str(count)}
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = list[subprocess.Popen]()
    try:
        for i in range(count):
            place["--process_id"], own, variables = str(i), [sys.executable, *command], {}
            if options:
                own += [word for pair in place.items() for word in pair]
            else:
                names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
                variables = dict(zip(names, place.values(), strict=True))
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(own, env=environment | variables, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        meanwhile(processes)
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
