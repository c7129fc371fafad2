"""What is found out about files is kept at once, and in a directory of the test's own."""

import tempfile

import pytest

from pspnet_jax.data import stamps


@pytest.fixture(autouse=True)
def _keep_at_once(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(stamps, "SETTLED", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
