"""Starts the processes of one job, each with CPU devices of its own, as if they were hosts."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
MAIN = ("-m", "pspnet_jax.main")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(count: int, *command: str, devices: int = 1, timeout: float = 300) -> list[subprocess.CompletedProcess]:
    """Runs `python COMMAND` in several processes, and returns their exit codes and output.

    Scripts get their place from the environment, the command line (`MAIN`) from its options.
    """
    address, processes = f"127.0.0.1:{free_port()}", list[subprocess.Popen]()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    try:
        for i in range(count):
            place = (address, str(count), str(i))
            if command[: len(MAIN)] == MAIN:
                arguments = zip(("--coordinator", "--processes", "--process_id"), place, strict=True)
                own: Sequence[str] = [*command, *(word for pair in arguments for word in pair)]
            else:
                own = command
                variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
                environment |= dict(zip(variables, place, strict=True))
            pipe = subprocess.PIPE
            processes.append(
                subprocess.Popen([sys.executable, *own], env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
            )
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
