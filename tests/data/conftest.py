"""Results about files are cached immediately, in a temporary directory of the test."""

import tempfile

import pytest

from pspnet_jax.data import stamps


@pytest.fixture(autouse=True)
def _cache_immediately(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(stamps, "MIN_AGE", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
