"""Tests run on 8 CPU devices; XLA has to be told before JAX starts. It compiles without optimizing, in half the time."""

import atexit
import contextlib
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" not in os.environ:  # programs that several tests or processes compile are compiled once
    PROGRAMS = tempfile.mkdtemp(prefix="programs_")
    atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

with contextlib.suppress(ImportError):  # part of torch's CUDA builds, and a crash where it is loaded after TensorFlow
    import triton  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _temporary_directory(tmp_path_factory):
    """What is kept about files between runs is not kept between tests of other sessions."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tmp"))
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        yield
