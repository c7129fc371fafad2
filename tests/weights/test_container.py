"""Weights files are read from any container; other files are refused with a message that says what they are."""

import bz2
import gzip
import io
import json
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pspnet_jax import weights
from pspnet_jax.errors import UserError
from pspnet_jax.weights import container, pytorch

torch = pytest.importorskip("torch")
ARRAYS = {"layer1.0.conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.ones(2, np.float32)}


def tensors(prefix: str = "", add: float = 0) -> dict[str, "torch.Tensor"]:
    return {f"{prefix}{key}": torch.from_numpy(array + np.float32(add)) for key, array in ARRAYS.items()}


def is_plain(content: pytorch.Content, add: float = 0) -> bool:
    arrays = content.arrays
    return arrays.keys() == ARRAYS.keys() and all(np.array_equal(arrays[k], ARRAYS[k] + np.float32(add)) for k in ARRAYS)


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        weights.inspect(path)
    message = str(error.value)
    print(message)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("length", [0x3C20, 0x4B50, 0x1F8B8 * 8])  # " <", "PK", and one whose bytes mean nothing
def test_a_safetensors_file_is_recognized_whatever_the_length_of_its_header(length, tmp_path):
    path = tmp_path / "net.safetensors"
    pytorch.write_safetensors(path, ARRAYS, {"filler": ""})
    header = length_of_header(path)
    pytorch.write_safetensors(path, ARRAYS, {"filler": "x" * (length - header)})
    assert length_of_header(path) == length
    assert is_plain(container.read(path))


def length_of_header(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("entry", [*pytorch.ENTRIES, ""])
def test_weights_are_found_in_every_entry(entry, tmp_path):
    torch.save({entry: tensors(), "epoch": 3, "args": {"lr": 0.1}} if entry else tensors(), tmp_path / "net.ckpt")
    content = container.read(tmp_path / "net.ckpt")
    assert is_plain(content)
    assert (content.entry, content.others) == (entry, ())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "module.module.", "_orig_mod.", "model._orig_mod.module.", "backbone.", "net.encoder.", "network.backbone."],
)
def test_prefixes_are_stripped(prefix, tmp_path):
    other_keys = {"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(9), "loss_fn.pos_weight": torch.ones(1)}
    torch.save(tensors(prefix) | other_keys, tmp_path / "net.pt")
    assert is_plain(container.read(tmp_path / "net.pt"))
    pytorch.write_safetensors(tmp_path / "x.bin", {f"{prefix}{key}": array for key, array in ARRAYS.items()})
    assert is_plain(container.read(tmp_path / "x.bin"))  # the ending does not matter


def test_a_prefix_that_not_all_keys_share_is_kept(tmp_path):
    arrays = {"backbone.conv1.weight": np.ones(1), "decode_head.conv_seg.bias": np.ones(1)}
    assert container.without_prefixes(arrays) == arrays


def test_the_user_chooses_between_raw_weights_and_their_average(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"state_dict": tensors(), "state_dict_ema": tensors("module.", add=1), "optimizer": {"state": {}}}, path)
    content = container.read(path)
    assert is_plain(content)
    assert (content.entry, content.others) == ("state_dict", ("state_dict_ema",))
    content = container.read(f"{path}:state_dict_ema")
    assert is_plain(content, add=1)
    assert (content.entry, content.others) == ("state_dict_ema", ("state_dict",))
    with pytest.raises(UserError, match=r"has no entry 'ema' with weights; the entries are state_dict, state_dict_ema, optim"):
        container.read(f"{path}:ema")


def test_an_entry_of_any_name_can_be_chosen(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"epoch": 3, "student": tensors(), "teacher": tensors(add=1)}, path)
    message = refusal(path)
    assert "'epoch' is not a dense tensor; expected a state_dict" in message
    assert "net.pth:student or net.pth:teacher" in message
    assert is_plain(container.read(f"{path}:teacher"), add=1)


def test_a_checkpoint_of_lightning_is_read_without_lightning(tmp_path, monkeypatch):
    class AttributeDict(dict):
        pass

    path, module = tmp_path / "last.ckpt", "lightning.fabric.utilities.data"
    AttributeDict.__module__, AttributeDict.__qualname__ = module, "AttributeDict"
    with monkeypatch.context() as patch:
        for i, _ in enumerate(parts := module.split("."), 1):
            patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        sys.modules[module].AttributeDict = AttributeDict
        hyper = AttributeDict(lr=0.1, root=Path("/data"))
        torch.save({"state_dict": tensors("model."), "hyper_parameters": hyper, "callbacks": {}}, path)
    assert is_plain(container.read(path))


def zipped(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("net.pth"), io.BytesIO())
    return buffer.getvalue()


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    return buffer.getvalue()


def with_a_changed_entry(offset: int, value: int) -> bytes:
    """Returns a file whose last entry in the list of its archive has another byte."""
    content = bytearray(saved())
    content[content.rfind(b"PK\x01\x02") + offset] = value
    return bytes(content)


REFUSED = {
    "empty": (b"", "is empty: download it again"),
    "zeros": (bytes(999), "has only zeros: download it again"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "is a web page, perhaps from a failed download: download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer"),
    "gzip": (gzip.compress(b"x"), "is a gzip archive: unpack it"),
    "bzip2": (bz2.compress(b"x"), "is a bzip2 archive: unpack it"),
    "tar": (tarred(), "is a tar archive: unpack it"),
    "zip": (zipped(["a/net.pth", "a/read.me"]), "is an archive of a/net.pth, a/read.me: unpack it"),
    "truncated": (saved()[:-200], "is damaged (its end is missing): download it again"),
    "a name that is no text": (with_a_changed_entry(46, 0xF9), "is damaged ('utf-8' codec can't decode byte 0xf9"),
    "another version": (with_a_changed_entry(6, 0xF0), "is damaged (zip file version 24.0): download it again"),
    "text": (b"name: 'PSPNet'\n", "is not a supported weights file: expected PyTorch's .pth"),
}


@pytest.mark.parametrize("ending", [".pth", ".caffemodel"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused(kind, ending, tmp_path):
    content, words = REFUSED[kind]
    (tmp_path / f"net{ending}").write_bytes(content)
    message = refusal(tmp_path / f"net{ending}")
    assert message.startswith(f"{tmp_path}/net{ending}: ")
    assert words in message or (kind, ending) == ("text", ".caffemodel")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_a_remedy(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(str(tmp_path / "net.pt"))
    message = refusal(tmp_path / "net.pt")
    assert "is a TorchScript archive" in message
    assert "torch.save(torch.jit.load('net.pt').state_dict(), 'weights.pth')" in message


def test_a_whole_module_is_refused_with_a_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "net.pth")
    assert "torch.nn.modules.linear.Linear" in (message := refusal(tmp_path / "net.pth"))
    assert "torch.save only its state_dict" in message


def test_an_unknown_network_is_refused_with_its_keys(tmp_path):
    keys = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.bias")
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "vit.pth")
    message = refusal(tmp_path / "vit.pth")
    assert "It has 5 arrays in cls_token, pos_embed, patch_embed, blocks, norm, such as blocks.0.attn.qkv.weight" in message


@pytest.mark.parametrize(("ending", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
def test_shards_are_joined(ending, stem, tmp_path):
    files = {f"{stem}-0000{i}-of-00002{ending}": key for i, key in enumerate(ARRAYS, 1)}
    for file, key in files.items():
        state = {f"model.{key}": ARRAYS[key]}
        if ending == ".bin":
            torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / file)
        else:
            pytorch.write_safetensors(tmp_path / file, state)
    index = tmp_path / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {f"model.{key}": file for file, key in files.items()}}))
    assert is_plain(container.read(index))
    more = {"extra.weight": min(files), **{f"model.{key}": file for file, key in files.items()}}
    (tmp_path / f"more{ending}.index.json").write_text(json.dumps({"weight_map": more}))
    assert "lists 1 array(s) that its shards lack, such as extra.weight" in refusal(tmp_path / f"more{ending}.index.json")
    (tmp_path / f"more{ending}.index.json").unlink()
    shard = tmp_path / min(files)
    assert refusal(shard) == f"{shard}: is one of 2 shards; give their index instead: {index}"
    shard.unlink()
    assert refusal(index).startswith(f"{shard}: no such file; it is one of the 2 shards in {index.name}")
    for content in ("[]", "[" * 100_000, *(json.dumps({"weight_map": {"a": name}}) for name in ("", "x/", ".", ".."))):
        index.write_text(content)
        assert "is not an index of shards" in refusal(index)


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "net.pth").write_bytes(saved())
    (tmp_path / "read.me").touch()
    assert refusal(tmp_path) == f"{tmp_path}: is a directory; name a weights file, such as net.pth"
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    for part in ("run", "run/checkpoints", "run/checkpoints/3"):
        message = refusal(tmp_path / part)
        assert message == (
            f"{tmp_path / part}: belongs to a training run; to evaluate, predict or export, use --workdir={tmp_path}/run; "
            f"to train from it, use --config.init_from={tmp_path}/run"
        )


@pytest.mark.parametrize("name", ["net.safetensors", "model.safetensors.index.json"])
def test_only_checkpoints_of_pytorch_have_entries(name, tmp_path):
    pytorch.write_safetensors(tmp_path / "net.safetensors", ARRAYS)
    index = {"weight_map": dict.fromkeys(ARRAYS, "net.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_plain(container.read(tmp_path / name))
    message = refusal(f"{tmp_path / name}:state_dict_ema")
    assert message == f"{tmp_path / name}:state_dict_ema: only PyTorch checkpoints have entries; give the file name alone"


@pytest.mark.parametrize("written", [b"\0" * 64, np.arange(16, dtype=np.float32).tobytes()], ids=["zeros", "numbers"])
def test_damage_that_torch_overlooks_is_found(written, tmp_path):
    array = np.random.default_rng(0).standard_normal(1000, np.float32)
    torch.save({"a": torch.from_numpy(array)}, tmp_path / "net.pth")
    content = bytearray((tmp_path / "net.pth").read_bytes())
    place = content.index(array.tobytes()) + 2000
    content[place : place + 64] = written
    (tmp_path / "net.pth").write_bytes(content)
    torch.load(tmp_path / "net.pth", weights_only=True)
    assert "net.pth: is damaged (net/data/0 does not match its CRC-32); download it again" in refusal(tmp_path / "net.pth")


def test_a_sparse_array_is_refused_without_suggesting_its_entry(tmp_path):
    torch.save({"state_dict": {"a": torch.eye(3).to_sparse()}}, tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth")
    assert message.endswith("'a' is not a dense tensor; expected a state_dict, or a checkpoint with one")
