"""A process whose peer is gone ends soon, with one sentence; processes that are slow are not taken for gone."""

import contextlib
import os
import signal
import time

import pytest

from tests.jobs import Jobs

pytestmark = pytest.mark.slow

GONE = "error: process {} of this job is gone (killed, preempted or not reachable; see its own messages); "
GONE += "start the same command on all hosts again"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("programs"))
    yield jobs
    jobs.close()


def errors(jobs, index):
    """Returns what a process has written, without the lines of gloo and of the functions in `jobs`."""
    return [line for line in jobs.output(index).splitlines() if not line.startswith(("[Gloo]", "met"))]


def last_error(jobs, index):
    """Returns the last line of `errors`; waits for it, since it is passed on by another process than the one that ended."""
    deadline = time.monotonic() + 10
    while not (found := errors(jobs, index)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found[-1]


@pytest.mark.parametrize(
    ("victim", "how", "heartbeat"),
    [(0, signal.SIGKILL, 20), (1, signal.SIGKILL, 20), (0, signal.SIGSTOP, 4), (1, signal.SIGSTOP, 4)],
    ids=["first killed", "second killed", "first frozen", "second frozen"],
)
def test_a_process_ends_within_30_s_after_another(jobs, tmp_path, victim, how, heartbeat):
    """A killed process closes its connections; a frozen one is like a host that is not reachable any more."""
    ids = jobs.start("meet", tmp_path / "run", 2, heartbeat)
    jobs.wait_for("met", 1 - victim)
    os.kill(ids[victim], how)
    began = time.monotonic()
    while not (found := errors(jobs, 1 - victim)) and time.monotonic() < began + 30:
        time.sleep(0.1)
    print(f"\nthe other process ended after {time.monotonic() - began:.1f} s")
    if how == signal.SIGSTOP:
        os.kill(ids[victim], signal.SIGKILL)
    assert jobs.exit_codes(5)[1 - victim] == -signal.SIGABRT
    assert found == errors(jobs, 1 - victim) == [GONE.format(victim)]


@pytest.mark.parametrize("then", ["be slow", "be different"])
def test_slow_processes_are_not_taken_for_gone(jobs, tmp_path, then):
    """One holds the interpreter's lock for twice the timeout, or ends later than the other by more than the timeout."""
    jobs.start("meet", tmp_path / "run", 2, then=then)
    assert jobs.exit_codes() == [0, 0]
    assert [errors(jobs, index) for index in range(2)] == [[], []]


@pytest.mark.parametrize(("then", "message"), [("fail in one", "error: out of paper"), ("raise", "TypeError: a bug")])
def test_an_error_in_one_process_ends_the_other(jobs, tmp_path, then, message):
    """A mistake of the user's has one sentence, a bug a traceback; the other process has one sentence in either case."""
    jobs.start("meet", tmp_path / "run", 2, then=then)
    assert jobs.exit_codes(30) == [-signal.SIGABRT, 1]
    assert last_error(jobs, 1) == message
    assert (len(errors(jobs, 1)) == 1) == (then == "fail in one")
    assert last_error(jobs, 0) == GONE.format(1)
    assert len(errors(jobs, 0)) == 1


def test_an_error_in_all_processes_is_the_only_message_of_each(jobs, tmp_path):
    jobs.start("meet", tmp_path / "run", 2, then="fail in all")
    assert jobs.exit_codes() == [1, 1]
    assert [errors(jobs, index) for index in range(2)] == [[f"error: process {index} is out of paper"] for index in range(2)]


@pytest.mark.parametrize("signalled", [0, 1])
def test_repeated_sigterm_to_one_process_saves_once_on_all(jobs, tmp_path, signalled):
    ids = jobs.start("train", tmp_path / "run", 2, steps=1000)
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
    while not jobs.ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ids[signalled], signal.SIGTERM)
        time.sleep(0.05)
    assert jobs.exit_codes() == [143, 143]
    step = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert f"stopped by SIGTERM; step {step} is saved; run the same command to resume" in jobs.output(0)
    assert not any("gone" in jobs.output(index) for index in range(2))


def test_a_save_that_fails_in_one_process_ends_all(jobs, tmp_path):
    """The second process cannot write from step 20 on. The first one, which waits for it in the background, ends too."""
    jobs.start("train", tmp_path / "run", 2, steps=1000, full_at=20)
    assert jobs.exit_codes(60) == [-signal.SIGABRT, 1]
    steps = [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()]
    last_error(jobs, 0)
    assert f"cannot be written (File too large); the newest complete checkpoint is step {max(steps)}; " in jobs.output(1)
    assert f"{GONE.format(1)}, and training resumes from step {max(steps)}\n" in jobs.output(0)
    assert not any("Traceback" in jobs.output(index) for index in range(2))
    jobs.start("train", tmp_path / "run", 2, steps=24)
    assert jobs.exit_codes() == [0, 0]
