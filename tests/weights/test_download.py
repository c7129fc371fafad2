"""Downloads that go wrong on the way: busy servers, other processes, read-only caches, renamed repositories, buckets."""

import contextlib
import functools
import hashlib
import io
import pathlib
import threading
import time
import urllib.request

import filelock
import numpy as np
import pytest

from pspnet_jax import weights
from pspnet_jax.errors import UserError
from pspnet_jax.weights import download
from tests import hub as hubs

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    with hubs.used(tmp_path) as served:
        served.repos["me/net"] = {"model.safetensors": CONTENT}
        served.files["/net.pth"] = CONTENT
        yield served


def test_a_server_that_is_busy_when_a_download_is_continued_is_asked_again(hub, caplog):
    hub.cut, hub.busy = 1_200_000, 1
    assert pathlib.Path(weights.fetch("hf://me/net")).read_bytes() == CONTENT
    assert hub.downloads() == ["", "bytes=1200000-", "bytes=1200000-"]
    assert "the connection was lost (the server answers 503 Service Unavailable); continuing in 0 s" in caplog.text


def test_what_has_arrived_is_kept_if_the_server_stays_away(hub, monkeypatch):
    hub.cut, hub.busy = 1_200_000, 9
    name = f"{hub.url}/files/net.pth#sha256={SUM}"
    with pytest.raises(UserError) as error:
        weights.fetch(name)
    kept = "what has arrived is kept: run the command again to continue it"
    assert str(error.value) == (
        f"{name}: the download stopped after 1 of 3 MB (the server answers 503 Service Unavailable); {kept}"
    )
    with pytest.raises(UserError, match=r"the download stopped after 1 MB \(the server answers 503"):
        weights.fetch(name)
    hub.busy = 0
    hub.downloads()
    assert pathlib.Path(weights.fetch(name)).read_bytes() == CONTENT
    assert hub.downloads() == ["bytes=1200000-"]


def test_the_token_follows_a_renamed_repository_but_not_to_other_servers(hub):
    hub.moved["me/old"] = "me/net"
    assert pathlib.Path(weights.fetch("hf://me/old")).read_bytes() == CONTENT
    asked = [line for line in hub.requests if line.startswith("GET") and "/api/" not in line]
    assert len(asked) == 3
    for line, repo in zip(asked, ("me/old", "me/net"), strict=False):
        assert line.startswith(f"GET /{repo}/resolve/")
        assert line.endswith(" Bearer hf_secret")
    assert asked[2].startswith("GET /cdn/")
    assert "secret" not in asked[2]


def test_a_download_neither_starts_jax_nor_touches_a_file_that_is_there(hub, monkeypatch):
    def process_index() -> int:
        raise AssertionError("JAX would take hold of the devices")

    monkeypatch.setattr("jax.process_index", process_index)
    name = f"{hub.url}/files/net.pth#sha256={SUM}"
    path = pathlib.Path(weights.fetch(name))
    path.with_name("net.pth.lock").unlink()
    assert weights.fetch(name) == str(path)
    assert [other.name for other in path.parent.iterdir()] == ["net.pth"]


def test_the_user_learns_that_another_process_is_downloading(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(download, "PATIENCE", 0.01)
    caplog.set_level("INFO")
    held = threading.Event()

    def hold() -> None:
        with filelock.FileLock(tmp_path / "net.pth.lock"):
            held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    opened = contextlib.nullcontext(download.Stream(io.BytesIO(b"1"), 0, 1))
    download.download("net", tmp_path / "net.pth", lambda start: opened)
    other.join()
    assert caplog.messages.count("net: another process is downloading it; waiting until it is done") == 1
    assert (tmp_path / "net.pth").read_bytes() == b"1"


def test_errors_of_a_bucket_are_retried_and_named(tmp_path, monkeypatch):
    """TensorFlow's and gcsfs' errors are no OSError."""

    class Bucket:
        failures = 1

        def __fspath__(self) -> str:
            return "gs://bucket/net.pth"

        def open(self, mode: str) -> "Bucket | io.BytesIO":
            self.failures -= 1
            return self if self.failures >= 0 else io.BytesIO(b"12345")

        def __enter__(self):
            return self

        def __exit__(self, *ignored: object) -> None:
            pass

        def seek(self, start: int) -> None:
            if self.failures > 5:
                raise RuntimeError("no credentials\nat all")

        def read(self, size: int) -> bytes:
            raise RuntimeError("the network is down")

    monkeypatch.setattr(download, "PAUSES", (0,))
    bucket = Bucket()
    download.download("net", tmp_path / "net.pth", download.from_bucket(bucket, 5))
    assert (tmp_path / "net.pth").read_bytes() == b"12345"
    bucket.failures = 5
    with pytest.raises(UserError, match=r"^net: the download stopped after 0 of 0 MB \(the network is down\); what has"):
        download.download("net", tmp_path / "other", download.from_bucket(bucket, 5))
    bucket.failures = 9
    with pytest.raises(UserError, match=r"^gs://bucket/net.pth: cannot be read \(no credentials\); try again later$"):
        download.download("net", tmp_path / "other", download.from_bucket(bucket, 5))


def test_a_server_that_sends_on_to_one_without_encryption_is_refused():
    request = urllib.request.Request("https://a.org/net-5c0e0ea4.pth")
    sent_on = functools.partial(download._Redirects().redirect_request, request, None, 302, "Found", {})
    assert sent_on("https://b.org/net.pth").full_url == "https://b.org/net.pth"
    with pytest.raises(
        UserError, match=r"^https://a.org/net-5c0e0ea4.pth: the server sends on to http://b.org/net.pth, which is"
    ):
        sent_on("http://b.org/net.pth")
