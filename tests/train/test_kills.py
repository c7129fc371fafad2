"""A training that is killed again and again ends with the parameters of one that is not, in one process and in two."""

import collections
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
KILLS, STEPS = 20, 240
HEARTBEAT_TIMEOUT = 4  # seconds; the default would make the test wait 20 for each killed process

# Starts the processes of a job by forking, so that packages are imported once. For each job, it reads a line, and writes the
# process ids, and at the end the exit codes.
SERVER = """
import json, os, pathlib, sys, time
import numpy as np
from pspnet_jax import parallel, peers
from tests.train import OneLayer, fit, make_batch, score, tiny_config

batches_ = [make_batch(step) for step in range(8)]

def train(workdir, steps, index, count):
    workdir = pathlib.Path(workdir)
    config = tiny_config()
    config.total_steps = steps
    config.every.update(log=1, save=4, eval=6)
    share = slice(8 // count * index, 8 // count * (index + 1))

    def batches(start):
        for step in range(start, steps):
            time.sleep(0.01)
            yield {name: array[share] for name, array in batches_[step % 8].items()}

    def evaluate(variables):
        (workdir / "evaluating").touch()
        time.sleep(0.1)
        (workdir / "evaluating").unlink(missing_ok=True)
        return score(variables)

    if count > 1:
        parallel.start_processes()
    fit(config, batches, evaluate, workdir, model=OneLayer())
    return 0

peers.HEARTBEAT_TIMEOUT = int(sys.argv[1])
for line in sys.stdin:
    workdir, steps, count, port = json.loads(line)
    ids = []
    for index in range(count):
        if not (child := os.fork()):
            output = os.open(f"{workdir}.{index}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            names = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
            os.environ.update({f"JAX_{name}": value for name, value in names.items()})
            peers.run(lambda: train(workdir, steps, index, count))
        ids.append(child)
    print(json.dumps(ids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ids]), flush=True)
"""


class Jobs:
    """Runs jobs of several processes, one job at a time."""

    def __init__(self, programs: pathlib.Path):
        environment = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "OPENBLAS_NUM_THREADS": "1",  # a process with threads should not fork
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, str(HEARTBEAT_TIMEOUT)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ids: list[int] = []

    def start(self, workdir: pathlib.Path, count: int) -> list[int]:
        """Starts a training and returns the ids of its processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._server.stdin.write(json.dumps([str(workdir), STEPS, count, port]) + "\n")
        self._server.stdin.flush()
        self._ids = json.loads(self._server.stdout.readline())
        return self._ids

    @property
    def ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def exit_codes(self, seconds: float) -> list[int]:
        """Waits for the end of all processes."""
        assert select.select([self._server.stdout], [], [], seconds)[0], f"the job has not ended after {seconds} s"
        codes = json.loads(self._server.stdout.readline())
        self._ids = []
        return codes

    def close(self) -> None:
        for child in self._ids if not self.ended else ():
            os.kill(child, signal.SIGKILL)
        self._server.communicate()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("programs"))
    yield jobs
    jobs.close()


def begun(workdir: pathlib.Path, phase: str, since: float) -> bool:
    """Returns whether a phase of training has begun since a time, by a file that was written."""
    patterns = {"step": "metrics.jsonl", "save": "checkpoints/*-tmp*", "evaluation": "evaluating"}
    with contextlib.suppress(FileNotFoundError):
        return phase == "start" or any(path.stat().st_ctime > since for path in workdir.glob(patterns[phase]))
    return False


def results(workdir: pathlib.Path) -> tuple[dict, list]:
    """Returns the digests of all arrays at the end, and the step and loss or score of each line in metrics.jsonl."""
    digests = json.loads((workdir / f"checkpoints/{STEPS}/sha256.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return digests, [(line["kind"], line["step"], line.get("loss", line.get("mean_iou"))) for line in lines]


@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_change_nothing(jobs, tmp_path, count):
    """Kills one of the processes at a random moment of its start, of a step, of a save or of an evaluation."""
    began, random, kills = time.monotonic(), np.random.default_rng(count), collections.Counter()
    jobs.start(tmp_path / "whole", count)
    assert jobs.exit_codes(120) == [0] * count, (tmp_path / "whole.0.txt").read_text()
    workdir, longest = tmp_path / "run", 0.0
    workdir.mkdir()
    for phase in random.permutation(["start", "step", "save", "evaluation"] * (KILLS // 4)).tolist():
        delay = random.uniform(0, 0.5 if phase == "start" else 0.05)
        victim, since = int(random.integers(count)), time.time()
        ids = jobs.start(workdir, count)
        while not begun(workdir, phase, since):
            assert not jobs.ended, (tmp_path / "run.0.txt").read_text()
            time.sleep(0.001)
        time.sleep(delay)
        for child in ids if phase == "start" else [ids[victim]]:  # while they connect, processes wait for minutes
            os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        codes = jobs.exit_codes(30)
        kills[phase] += 1
        assert codes[victim] == -signal.SIGKILL, (tmp_path / f"run.{victim}.txt").read_text()
        if count == 2 and phase != "start":
            longest = max(longest, time.monotonic() - killed)
            assert codes[1 - victim] not in (0, -signal.SIGKILL)
            output = (tmp_path / f"run.{1 - victim}.txt").read_text()
            assert f"error: process {victim} of this job is gone (" in output
            assert "Traceback" not in output
            assert "stack trace" not in output
    print(f"\n{dict(kills)} in {count} process(es); the other one ended after {longest:.1f} s at most")
    jobs.start(workdir, count)
    assert jobs.exit_codes(120) == [0] * count, (tmp_path / "run.0.txt").read_text()
    assert results(workdir) == results(tmp_path / "whole")
    assert not (workdir / "set_aside").exists()
    print(f"{time.monotonic() - began:.0f} s")
