"""Weights by name: from a server that plays the hub, cached, resumed, verified, and offline; each problem in one sentence."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath

import pspnet_jax
from pspnet_jax import config as configs
from pspnet_jax import models, parallel, runs, weights
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.train import resume
from pspnet_jax.weights import download, pytorch, remote
from tests import hub as hubs
from tests.weights import refusal

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402

CONTENT = np.random.default_rng(0).bytes(3_000_000)
OTHER = np.random.default_rng(1).bytes(3_000_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
REPO = "timm/resnet50.tv_in1k"


@pytest.fixture
def hub(tmp_path):
    with hubs.used(tmp_path) as served:
        served.repos[REPO] = {"README.md": b"# ResNet", "config.json": b"{}", "model.safetensors": CONTENT}
        served.repos[REPO]["pytorch_model.bin"] = OTHER
        yield served


def read(path: str) -> bytes:
    return pathlib.Path(path).read_bytes()


def test_paths_are_returned_unchanged(tmp_path):
    for path in ("a/b.pth", "a.pth:ema", "~/x.h5", str(tmp_path), "C:weights"):
        assert weights.fetch(path) == path
    assert weights.fetch(tmp_path) == str(tmp_path)


def test_a_repository_is_downloaded_once_with_its_config(hub):
    path = pathlib.Path(weights.fetch(f"hf://{REPO}"))
    assert (path.name, path.read_bytes()) == ("model.safetensors", CONTENT)  # preferred over a pickle
    assert {other.name for other in path.parent.iterdir()} == {"model.safetensors", "config.json"}
    assert hub.downloads() == [""]
    for name in (f"hf://{REPO}", f"hf://{REPO}@main", f"hf://{REPO}@{hubs.COMMIT}/model.safetensors"):
        assert weights.fetch(name) == str(path)
    assert hub.downloads() == []
    assert read(weights.fetch(f"hf://{REPO}/pytorch_model.bin")) == OTHER
    assert weights.fetch(f"hf://{REPO}/pytorch_model.bin:ema").endswith("/pytorch_model.bin:ema")
    # The hub's own client finds the file, too.
    assert huggingface_hub.try_to_load_from_cache(REPO, "model.safetensors") == str(path)


def test_the_token_is_sent_to_the_hub_alone(hub):
    weights.fetch(f"hf://{REPO}")
    lines = [line for line in hub.requests if line.startswith("GET")]
    assert any("/resolve/" in line and line.endswith("Bearer hf_secret") for line in lines)
    [elsewhere] = [line for line in lines if "/cdn/" in line]
    assert "secret" not in elsewhere


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_is_continued_by_the_next_command(hub, resumes, monkeypatch):
    hub.cut, hub.resumes = 1_200_000, resumes
    monkeypatch.setattr(download, "PAUSES", ())
    message = refusal(weights.fetch, f"hf://{REPO}/model.safetensors")
    assert message.startswith("the download stopped after 1 of 3 MB (")
    assert message.endswith("run the command again to continue it")
    assert hub.downloads() == [""]
    assert read(weights.fetch(f"hf://{REPO}")) == CONTENT
    assert hub.downloads() == ["bytes=1200000-"]


def test_a_lost_connection_is_opened_again(hub, caplog):
    hub.cut = 2_000_000
    assert read(weights.fetch(f"hf://{REPO}")) == CONTENT
    assert hub.downloads() == ["", "bytes=2000000-"]
    assert "the connection was lost (the server closed the connection); continuing in 0 s" in caplog.text


def test_offline_the_cached_copy_is_used(hub, monkeypatch, caplog):
    missing = refusal(weights.fetch, "hf://timm/other")
    assert missing.startswith("there is no such repository, or it is private: check the name, or log in with")
    path, tagged = weights.fetch(f"hf://{REPO}"), weights.fetch(f"hf://{REPO}@v1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert weights.fetch(f"hf://{REPO}") == path == tagged == weights.fetch(f"hf://{REPO}@{hubs.COMMIT}")
    assert "the hub cannot be reached (" in caplog.text
    assert weights.fetch(f"hf://{REPO}/model.safetensors:ema") == f"{path}:ema"
    assert "has no copy; check the network" in refusal(weights.fetch, "hf://timm/other")
    assert "has no copy; check the network" in refusal(weights.fetch, f"hf://{REPO}@v2")
    message = refusal(weights.fetch, f"hf://{REPO}/pytorch_model.bin")
    assert message.startswith("the repository has no file pytorch_model.bin; it has config.json, model.safetensors in ")
    assert "; the hub cannot be reached (" in message


def test_offline_a_file_is_found_under_every_revision_it_was_fetched_by(hub, monkeypatch):
    path = weights.fetch(f"hf://{REPO}@{hubs.COMMIT}")
    assert weights.fetch(f"hf://{REPO}") == path
    assert hub.downloads() == [""]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert weights.fetch(f"hf://{REPO}@main") == path
    assert "has no copy" in refusal(weights.fetch, f"hf://{REPO}@v1")


def test_a_file_in_a_cache_that_cannot_be_written_is_used(hub):
    path = weights.fetch(f"hf://{REPO}@{hubs.COMMIT}")
    refs = pathlib.Path(path).parents[2] / "refs"
    assert not refs.exists()
    refs.write_text("not a directory")
    assert weights.fetch(f"hf://{REPO}") == path


def test_a_bug_is_not_taken_for_an_unreachable_hub(hub, monkeypatch):
    monkeypatch.setattr(remote, "_choose", lambda *ignored: {}["x"])
    with pytest.raises(KeyError):
        weights.fetch(f"hf://{REPO}")


def test_files_that_the_hub_lists_but_lacks_are_named(hub):
    hub.repos["me/net"] = {"model.safetensors": None}
    message = refusal(weights.fetch, "hf://me/net")
    assert message.startswith(f"the hub lists {hub.url}/me/net/resolve/{hubs.COMMIT}/model.safetensors, but does not have it;")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    hub.repos["me/net"] = {"model.safetensors.index.json": index, shards[0]: CONTENT}
    expected = f"lacks 1 of the 2 shards in model.safetensors.index.json: {shards[1]}; ask its authors"
    assert refusal(weights.fetch, "hf://me/net") == expected
    assert hub.downloads() == []


def test_a_server_in_trouble_does_not_stop_a_cached_copy(hub):
    path = weights.fetch(f"hf://{REPO}")
    hub.status = (500, "")
    assert weights.fetch(f"hf://{REPO}") == path


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            (401, "RepoNotFound"),
            "there is no such repository, or it is private: check the name, or log in with `hf auth login`",
        ),
        ((404, "RepoNotFound"), "there is no such repository, or it is private"),
        ((403, "GatedRepo"), "its authors have to grant access: ask for it at http://127.0.0.1"),
        ((401, "GatedRepo"), "its authors have to grant access"),
        ((404, "RevisionNotFound"), "the repository has no revision 'main'"),
        ((403, ""), "the hub denies access (status 403)"),
    ],
)
def test_a_repository_that_cannot_be_read(hub, status, words):
    hub.status = status
    assert words in refusal(weights.fetch, f"hf://{REPO}")


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://resnet50",
        "hf://timm/",
        "hf://timm/a@",
        "hf://timm/a@v1@v2",
        "hf://timm/a b",
        "hf://timm/..",
        "hf://a:b/c",
    ],
)
def test_wrong_names(hub, name):
    message = refusal(weights.fetch, name)
    assert message.startswith(("expected hf://USER/REPO, hf://USER/REPO@REVISION", "is not the name of a repository ("))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("listing", "chosen"),
    [
        (("a.pth", "README.md"), "a.pth"),
        (("a.pth", "b.safetensors"), "b.safetensors"),
        (("x/model.safetensors", "model.safetensors"), "model.safetensors"),
        (("training_args.bin", "pytorch_model.bin"), "pytorch_model.bin"),
        (("pspnet50_ade20k.h5", "pspnet50_ade20k.json"), "pspnet50_ade20k.h5"),
    ],
)
def test_the_file_with_weights_is_chosen(hub, listing, chosen):
    hub.repos["me/net"] = dict.fromkeys(listing, b"1")
    assert weights.fetch("hf://me/net").endswith(f"/{chosen}")


def test_the_files_are_listed_if_none_or_several_have_weights(hub):
    hub.repos["me/net"] = {"a.txt": b"", "b.onnx": b""}
    assert "has no weights that can be read (.safetensors, .pth, " in refusal(weights.fetch, "hf://me/net")
    assert refusal(weights.fetch, "hf://me/net").endswith("it has a.txt, b.onnx")
    hub.repos["me/net"] = {"a.pth": b"", "b.pth": b"", "c.txt": b""}
    expected = "has several files with weights; name one, such as hf://me/net/a.pth: a.pth, b.pth"
    assert refusal(weights.fetch, "hf://me/net") == expected
    assert refusal(weights.fetch, "hf://me/net/d.pth") == "the repository has no file d.pth; it has a.pth, b.pth, c.txt"
    hub.repos["me/net"] = {}
    assert refusal(weights.fetch, "hf://me/net").endswith("it has no files")


def test_all_shards_of_an_index_are_downloaded(hub):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    hub.repos["me/net"] = {"model.safetensors.index.json": index, shards[0]: CONTENT, shards[1]: b"b"}
    path = pathlib.Path(weights.fetch("hf://me/net"))
    assert path.name == "model.safetensors.index.json"
    assert [(path.parent / shard).read_bytes() for shard in shards] == [CONTENT, b"b"]
    hub.repos["me/tf"] = {"n/model.ckpt-0.index": b"i", "n/model.ckpt-0.data-00000-of-00001": b"d", "n/model.ckpt-0.meta": b"m"}
    path = pathlib.Path(weights.fetch("hf://me/tf"))
    assert path.name == "model.ckpt-0.index"
    assert (path.parent / "model.ckpt-0.data-00000-of-00001").read_bytes() == b"d"


def test_a_file_on_a_server_needs_a_checksum(hub):
    hub.files["/net.pth"] = CONTENT
    url = f"{hub.url}/files/net.pth"
    assert "has no checksum, so it was not downloaded; expected https://HOST/FILE#sha256=DIGITS with the 64" in refusal(
        weights.fetch, url
    )
    for wrong in ("#sha256=12", "#md5=0123", f"#sha256={SUM}0", "#"):
        assert refusal(weights.fetch, url + wrong).startswith("expected https://HOST/FILE#sha256=DIGITS")
    assert "name files on the hub as hf://USER/REPO/FILE" in refusal(
        weights.fetch, "https://huggingface.co/a/b/resolve/main/net.pth"
    )
    assert "is only the index of several files" in refusal(weights.fetch, f"{url}.index.json#sha256={SUM}")
    assert hub.downloads() == []
    path = weights.fetch(f"{url}#sha256={SUM.upper()}")
    assert (os.path.basename(path), read(path)) == ("net.pth", CONTENT)
    assert weights.fetch(f"{url}#sha256={SUM}:ema") == f"{path}:ema"
    assert hub.downloads() == [""]  # once


def test_the_checksum_in_a_name_of_torch_counts(hub):
    hub.files[f"/resnet50-{SUM[:8]}.pth"] = hub.files["/resnet18-01234567.pth"] = CONTENT
    assert read(weights.fetch(f"{hub.url}/files/resnet50-{SUM[:8]}.pth?download=1")) == CONTENT
    message = refusal(weights.fetch, f"{hub.url}/files/resnet18-01234567.pth")
    assert message == f"has the SHA-256 {SUM}, not 01234567, so it was deleted; check the name and the checksum"
    assert not list(pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("resnet18*.*th*plete"))
    for file in ("net-20240115.pth", "net-01234567.v2.pth", "01234567.pth"):
        assert "has no checksum, so it was not downloaded" in refusal(weights.fetch, f"https://host/{file}")
    assert "http:// needs the whole checksum" in refusal(weights.fetch, "http://host.invalid/resnet18-01234567.pth")


def test_a_file_replaced_between_two_attempts_is_downloaded_anew(hub, monkeypatch):
    hub.files["/net.pth"], hub.cut = OTHER, 1_000_000
    name = f"{hub.url}/files/net.pth#sha256={SUM}"
    with monkeypatch.context() as patch:
        patch.setattr(download, "PAUSES", ())
        assert "the download stopped after 1 of 3 MB" in refusal(weights.fetch, name)
    hub.files["/net.pth"] = CONTENT
    assert read(weights.fetch(name)) == CONTENT
    assert hub.downloads() == ["", "bytes=1000000-", ""]


def test_a_download_that_was_killed_at_its_very_end(hub):
    hub.files["/net.pth"] = CONTENT
    name = f"{hub.url}/files/net.pth#sha256={SUM}"
    path = pathlib.Path(weights.fetch(name))
    part = path.rename(f"{path}.incomplete")
    hub.downloads()
    assert weights.fetch(name) == str(path)
    assert hub.downloads() == ["bytes=3000000-"]
    path.rename(part)
    part.write_bytes(CONTENT + b"more")
    assert read(weights.fetch(name)) == CONTENT


def test_a_file_system_without_locks_serves_too(hub, monkeypatch):
    def acquire(self: object, **ignored: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(download.filelock.FileLock, "acquire", acquire)
    hub.files["/net.pth"] = CONTENT
    assert read(weights.fetch(f"{hub.url}/files/net.pth#sha256={SUM}")) == CONTENT


def test_a_server_that_cannot_be_reached_or_lacks_the_file(hub):
    assert refusal(weights.fetch, f"{hub.url}/files/net.pth#sha256={SUM}") == "the server answers 404 Not Found; check the name"
    message = refusal(weights.fetch, f"http://127.0.0.1:1/net.pth#sha256={SUM}")
    assert message == "cannot be reached ([Errno 111] Connection refused); check the network and the name"
    assert refusal(weights.fetch, f"https://no host/net.pth#sha256={SUM}").startswith("cannot be reached (")
    for wrong in ("https://host", "https://[bad/x-01234567.pth", "https://host/a/..", f"https://host/.#sha256={SUM}"):
        assert refusal(weights.fetch, wrong).startswith("expected https://HOST/FILE")


def test_a_full_or_closed_disk_is_named(hub, monkeypatch):
    usage = types.SimpleNamespace(free=2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage)
        assert refusal(weights.fetch, f"hf://{REPO}/model.safetensors").startswith("needs 3 MB, but only 2 MB are free in ")
    pathlib.Path(os.environ["XDG_CACHE_HOME"]).write_text("a file")
    hub.files["/net.pth"] = CONTENT
    with pytest.raises(UserError, match=r"cannot be written \(.*\); free some space, or set XDG_CACHE_HOME and HF_HOME"):
        weights.fetch(f"{hub.url}/files/net.pth#sha256={SUM}")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")
    with pytest.raises(UserError, match="no home directory is known to keep downloads in; set XDG_CACHE_HOME"):
        remote._cache("x")


def test_progress_shows_rate_and_time_left(hub, monkeypatch, caplog):
    monkeypatch.setattr("pspnet_jax.progress.SECONDS_PER_LINE", 0)
    caplog.set_level("INFO")
    hub.cut = 1_000_000
    weights.fetch(f"hf://{REPO}")
    assert f"downloading hf://{REPO}/model.safetensors: 3.0 MB" in caplog.messages
    assert f"downloading hf://{REPO}/model.safetensors: 3.0 MB, of which 1.0 MB are here" in caplog.messages
    [last] = [line for line in caplog.messages if line.startswith("downloading: 2/2 MB, ")]
    assert last.endswith(" MB/s, 0:00:00 left")


@pytest.fixture
def backbone(hub, tmp_path):
    """A ResNet-18 on the hub, and one of its kernels."""
    reference = pytest.importorskip("tests.weights.reference_torch")
    state = reference.randomized(reference.ResNet(18)).state_dict()
    pytorch.write_safetensors(tmp_path / "net.safetensors", {key: tensor.numpy() for key, tensor in state.items()})
    hub.repos["timm/resnet18"] = {"model.safetensors": (tmp_path / "net.safetensors").read_bytes()}
    return state["layer3.1.conv2.weight"].numpy()


@pytest.mark.slow
def test_a_run_starts_from_a_name(backbone, hub, tmp_path, caplog):
    config = base_config()
    config.model.update(depth=18, stem="conv7")
    config.init_from = "hf://timm/resnet18"
    with caplog.at_level("INFO", "pspnet_jax"):
        runs.check_init_from(config, epath.Path(tmp_path / "run"))
        assert hub.downloads() == [""]  # before the data is read
        variables, _ = resume.initial_weights(config, models.build(config.model, 3), parallel.make_mesh())
    assert hub.downloads() == []
    assert config.init_from == "hf://timm/resnet18"
    assert "starting from hf://timm/resnet18: an ImageNet ResNet, depth 18, backbone only" in caplog.text
    kernel = variables["params"]["backbone"]["layer3_block1"]["conv2"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), backbone)


@pytest.mark.slow
def test_load_and_import_take_a_name(hub, tmp_path, capsys):
    reference = pytest.importorskip("tests.weights.reference_torch")
    state = reference.randomized(reference.MmsegPSPNet(18, 3, "deep32", False)).state_dict()
    file = "pspnet_r18-d8_769x769_80k_cityscapes.safetensors"  # for whose name align_corners is True
    pytorch.write_safetensors(tmp_path / file, {key: tensor.numpy() for key, tensor in state.items()})
    hub.repos["me/zoo"] = {file: (tmp_path / file).read_bytes()}
    segmenter = pspnet_jax.load("hf://me/zoo")
    assert segmenter.classes == ("class 0", "class 1", "class 2")
    kernel = np.asarray(segmenter.variables["params"]["head_conv"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kernel, state["decode_head.bottleneck.conv.weight"].numpy())
    assert main(["--mode=import", f"--input=hf://me/zoo/{file}", f"--workdir={tmp_path}/run"]) == 0
    assert f"hf://me/zoo/{file}: a PSPNet of mmseg, depth 18, 3 classes" in capsys.readouterr().out
    config = configs.read(epath.Path(tmp_path / "run/config.json"))
    assert (config.name, config.model.align_corners) == (pathlib.Path(file).stem, True)
    assert hub.downloads() == [""]


@pytest.mark.slow
def test_the_environment_variables_of_the_hub_apply(backbone, hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-m",
        "pspnet_jax.main",
        "--mode=import",
        "--input=hf://timm/resnet18",
        f"--workdir={tmp_path}/run",
    ]
    for offline in ("0", "1"):
        done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: hf://timm/resnet18: an ImageNet ResNet, depth 18, backbone only; there is nothing"
        )
        assert ("using the copy" in done.stdout) == (offline == "1")
    assert hub.downloads() == [""]
