"""Tests run on 8 CPU devices; XLA has to be told before JAX starts. It compiles without optimizing, in half the time."""

import atexit
import contextlib
import os
import shutil
import tempfile
import types

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


@pytest.fixture(scope="session", autouse=True)
def _without_curves():
    """Runs draw no learning curves, which takes 0.3 s each time; the tests of the drawing call it directly."""
    from PIL import Image

    from pspnet_jax.train import logs

    with pytest.MonkeyPatch.context() as patch:
        drawn = types.SimpleNamespace(learning_curves=lambda lines, best_metric: Image.new("RGB", (8, 9)))
        patch.setattr(logs, "figures", drawn)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Hides all devices but one, also from processes that a test starts. On two cores, eight take twice the time."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        [first, *_] = jax.devices()
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_: [first])
        patch.setattr(jax, "device_count", lambda *_: 1)
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
        yield
