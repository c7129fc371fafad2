"""A training that is killed again and again ends with the parameters of one that is not, in one process and in two."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from tests.jobs import Jobs

pytestmark = pytest.mark.slow

KILLS, STEPS = 20, 160
PHASES = {"start": "", "step": "metrics.jsonl", "save": "checkpoints/*-tmp*", "evaluation": "evaluating"}  # files they write


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("programs"))
    yield jobs
    jobs.close()


def saved_step(workdir: pathlib.Path) -> int:
    """Returns the step of the newest complete checkpoint."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def in_phase(workdir: pathlib.Path, phase: str, since: float, step: int) -> bool:
    """Returns whether a phase of training has begun since a time, after a step."""
    with contextlib.suppress(FileNotFoundError, IndexError):
        if phase == "start" or any(path.stat().st_ctime > since for path in workdir.glob(PHASES[phase])):
            return phase == "start" or json.loads((workdir / "metrics.jsonl").read_text().split("\n")[-2])["step"] >= step
    return False


def results(workdir: pathlib.Path) -> tuple[dict, list]:
    """Returns the digests of all arrays at the end, and the step and loss or score of each line in metrics.jsonl."""
    digests = json.loads((workdir / f"checkpoints/{STEPS}/sha256/metadata").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return digests, [(line["kind"], line["step"], line.get("loss", line.get("mean_iou"))) for line in lines]


@pytest.mark.parametrize("count", [1, 2])
def test_twenty_kills_change_nothing(jobs, tmp_path, count):
    """Kills one of the processes at a random moment of its start, of a step, of a save or of an evaluation."""
    began, random, kills = time.monotonic(), np.random.default_rng(count), collections.Counter()
    jobs.start("train", tmp_path / "whole", count, steps=STEPS)
    assert jobs.exit_codes() == [0] * count, jobs.output(0)
    workdir, longest = tmp_path / "run", 0.0
    workdir.mkdir()
    for phase in random.permutation(list(PHASES) * (KILLS // len(PHASES))).tolist():
        step, delay = saved_step(workdir) + random.integers(2, 12), random.uniform(0, 0.5 if phase == "start" else 0.05)
        victim, since = int(random.integers(count)), time.time()
        ids = jobs.start("train", workdir, count, heartbeat=3, steps=STEPS)
        while not in_phase(workdir, phase, since, step):
            assert not jobs.ended, jobs.output(0)
            time.sleep(0.001)
        time.sleep(delay)
        for child in ids if phase == "start" else [ids[victim]]:  # while they connect, processes wait for minutes
            os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        codes = jobs.exit_codes(30)
        kills[phase] += 1
        assert codes[victim] == -signal.SIGKILL, jobs.output(victim)
        if count == 2 and phase != "start":
            longest = max(longest, time.monotonic() - killed)
            assert codes[1 - victim] not in (0, -signal.SIGKILL)
            output = jobs.output(1 - victim)
            assert f"error: process {victim} of this job is gone (" in output
            assert "Traceback" not in output
            assert "stack trace" not in output
    print(f"\n{dict(kills)} in {count} process(es) up to step {saved_step(workdir)} of {STEPS}", end="")
    print(f"; the other one ended after {longest:.1f} s at most" if count == 2 else "")
    jobs.start("train", workdir, count, steps=STEPS)
    assert jobs.exit_codes() == [0] * count, jobs.output(0)
    assert results(workdir) == results(tmp_path / "whole")
    assert not (workdir / "set_aside").exists()
    print(f"{time.monotonic() - began:.0f} s")
