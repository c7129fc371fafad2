"""Tests run on 8 CPU devices; XLA has to be told before JAX starts."""

import contextlib
import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

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
