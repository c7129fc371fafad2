import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from pspnet_jax import lock
from pspnet_jax.errors import UserError
from pspnet_jax.train import checkpoint
from tests.train import filled_state, tiny_config

HOLD = """
import fcntl, json, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, json.dumps({"host": sys.argv[2], "pid": os.getpid(), "since": "2026-01-02 03:04:05"}).encode())
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path):
    return epath.Path(tmp_path / "run")


@pytest.fixture
def holder(run):
    """Another process on this machine that holds the lock."""
    run.mkdir()
    command = [sys.executable, "-c", HOLD, str(run / "lock"), socket.gethostname()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_lock_names_its_owner_and_is_deleted_at_the_end(run):
    with lock.locked(run):
        owner = json.loads((run / "lock").read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        with (
            pytest.raises(UserError, match=rf"another process writes to .*run \(process {os.getpid()} on ") as error,
            lock.locked(run),
        ):
            pass
        assert "\n" not in str(error.value)
    assert not (run / "lock").exists()
    with lock.locked(run):
        pass


def test_a_running_process_keeps_the_lock_and_a_killed_one_loses_it(run, holder):
    with (
        pytest.raises(UserError, match=rf"process {holder.pid} on .*, since 2026-01-02 03:04:05\); wait until it ends"),
        lock.locked(run),
    ):
        pass
    holder.kill()
    holder.wait()
    assert (run / "lock").exists()
    with lock.locked(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


def test_create_run_respects_the_lock(run, holder):
    with pytest.raises(UserError, match="another process writes to"):
        checkpoint.create_run(run, tiny_config(), filled_state(tiny_config(), 1))
    assert not (run / "checkpoints").exists()


@pytest.fixture
def foreign(run):
    """The lock of a process on another machine."""
    run.mkdir()
    (run / "lock").write_text(json.dumps({"host": "node7", "pid": 12, "since": "yesterday"}))
    os.utime(run / "lock", (1, 1))


def test_a_lock_of_another_machine_is_respected_if_it_is_updated(run, foreign, monkeypatch):
    monkeypatch.setattr(lock, "TIMEOUT", 10.0)
    alive = threading.Timer(0.3, os.utime, [run / "lock"])
    alive.start()
    with pytest.raises(UserError, match=r"another process writes to .*run \(process 12 on node7, since yesterday\)"):
        lock.locked(run).__enter__()
    alive.join()


def test_a_lock_of_another_machine_is_taken_over_if_it_is_not_updated(run, foreign, monkeypatch, caplog):
    monkeypatch.setattr(lock, "TIMEOUT", 0.3)
    with lock.locked(run):
        assert json.loads((run / "lock").read_text())["host"] == socket.gethostname()
    assert "has not updated the lock, which is now taken over" in caplog.text


def test_the_owner_keeps_updating_the_lock(run, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with lock.locked(run):
        os.utime(run / "lock", (1, 1))
        time.sleep(0.3)
        assert os.stat(run / "lock").st_mtime > 1000


@pytest.mark.parametrize("content", [b"", b"\0\0\0"])
def test_a_lock_that_lost_its_content_is_taken_over(run, content):
    run.mkdir()
    (run / "lock").write_bytes(content)
    with lock.locked(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\x00", b'{"host": 3}', b"three doors of the lock\n"])
def test_a_file_of_the_user_that_is_called_lock_is_kept(run, content):
    run.mkdir()
    (run / "lock").write_bytes(content)
    with pytest.raises(UserError, match="lock: is not a lock file of this program"), lock.locked(run):
        pass
    assert (run / "lock").read_bytes() == content
