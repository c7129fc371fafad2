"""Results are computed by one caller, and cached until a file changes."""

import concurrent.futures
import logging
import os
import subprocess
import sys
import time

import pytest

from pspnet_jax.data import stamps
from pspnet_jax.errors import UserError


class Work:
    """Counts how often it is called."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        time.sleep(0.1)
        return b"result"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    return path


def ask(tmp_path, file, work, key="", cache_dir="cache"):
    assert stamps.compute_once(str(tmp_path / cache_dir), "work", [str(file)], key, work) == b"result"
    return work.times


def test_concurrent_callers_compute_once(tmp_path, file):
    work = Work()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(tmp_path, file, work), range(8)))
    assert work.times == 1


def test_the_result_depends_on_the_arguments_and_the_paths(tmp_path, file):
    work = Work()
    assert [ask(tmp_path, file, work, key) for key in (("a", 1), ("a", 2), ("a", 1))] == [1, 2, 2]
    os.rename(file, tmp_path / "other")
    assert ask(tmp_path, tmp_path / "other", work, ("a", 1)) == 3
    assert ask(tmp_path, file, work, ("a", 1)) == 4  # the file is missing now


def test_a_changed_file_of_the_same_size_and_mtime_is_noticed(tmp_path, file):
    work, before = Work(), file.stat()
    assert ask(tmp_path, file, work) == 1
    file.write_bytes(b"CONTENTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert ask(tmp_path, file, work) == 2
    other = tmp_path / "replacement"
    other.write_bytes(b"contents")
    other.replace(file)
    assert ask(tmp_path, file, work) == 3


def test_results_of_a_file_that_was_just_written_are_not_cached(tmp_path, file, monkeypatch):
    monkeypatch.setattr(stamps, "MIN_AGE", 60)
    work = Work()
    assert [ask(tmp_path, file, work) for _ in range(2)] == [1, 2]
    monkeypatch.setattr(stamps.time, "time_ns", lambda: file.stat().st_ctime_ns + 61 * 10**9)
    assert [ask(tmp_path, file, work) for _ in range(2)] == [3, 3]


@pytest.mark.parametrize("contents", [b"", b"x", None])
def test_a_damaged_result_is_computed_again(tmp_path, file, contents):
    work = Work()
    ask(tmp_path, file, work)
    (cached,) = (tmp_path / "cache").glob("work_*[!k]")
    cached.write_bytes(cached.read_bytes()[:-1] if contents is None else contents)
    assert [ask(tmp_path, file, work) for _ in range(2)] == [2, 2]


def test_without_a_writable_directory_results_are_computed_each_time(tmp_path, file, caplog):
    (tmp_path / "taken").write_text("")
    work = Work()
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        assert [ask(tmp_path, file, work, cache_dir="taken/below") for _ in range(2)] == [1, 2]
    assert "cannot write to" in caplog.text


def test_a_full_disk_and_a_file_system_without_locks_are_no_errors(tmp_path, file, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stamps.fcntl, "flock", fail)
    assert [ask(tmp_path, file, work) for work in [Work()] for _ in range(2)] == [1, 1]
    monkeypatch.setattr(stamps.files_, "atomic", fail)
    assert [ask(tmp_path, file, work, "full") for work in [Work()] for _ in range(2)] == [1, 2]


def test_a_result_that_depends_on_no_file_is_not_cached(tmp_path):
    work = Work()
    for _ in range(2):
        stamps.compute_once(str(tmp_path), "work", [], "", work)
    assert work.times == 2


def test_a_lock_ends_with_its_process(tmp_path, file):
    """Even if the process is killed while it computes."""
    code = f"""
import os
from pspnet_jax.data import stamps
stamps.MIN_AGE = 0
stamps.compute_once({str(tmp_path / "cache")!r}, "work", [{str(file)!r}], "", lambda: os.kill(os.getpid(), 9))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert ask(tmp_path, file, Work()) == 1


def test_another_users_default_directory_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps.tempfile, "tempdir", str(tmp_path))
    assert stamps.directory("") == tmp_path / "pspnet_jax"
    monkeypatch.setattr(stamps.os, "getuid", lambda: 4711)
    assert stamps.directory("") == tmp_path / "pspnet_jax_4711"
    assert stamps.directory(str(tmp_path / "pspnet_jax")) == tmp_path / "pspnet_jax"  # an explicit path is used as it is


def test_without_any_temporary_directory(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(stamps.tempfile, "gettempdir", nowhere)
    with pytest.raises(UserError, match=r"dataset.cache_dir='': cannot write to the directory for temporary files \(TMPDIR\)"):
        stamps.directory("")


def test_a_cache_dir_has_to_be_local():
    with pytest.raises(UserError, match=r"dataset.cache_dir='gs://bucket': expected a local directory"):
        stamps.directory("gs://bucket")
