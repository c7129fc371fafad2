"""PyTorch and safetensors files: all forms are read, no code in them is run, and damaged files end in one sentence."""

import argparse
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from pspnet_jax import weights
from pspnet_jax.errors import UserError
from pspnet_jax.weights import container, pytorch

torch = pytest.importorskip("torch")
ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.num_batches_tracked": np.array(7)}


def tensors(prefix: str = "") -> dict[str, "torch.Tensor"]:
    return {f"{prefix}{key}": torch.from_numpy(array) for key, array in ARRAYS.items()}


def same(arrays: dict[str, np.ndarray]) -> bool:
    return arrays.keys() == ARRAYS.keys() and all(
        np.array_equal(arrays[key], array) and arrays[key].dtype == array.dtype for key, array in ARRAYS.items()
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        tensors(),
        tensors("module."),
        {"a.weight": torch.nn.Parameter(tensors()["a.weight"]), "a.num_batches_tracked": torch.tensor(7)},
        {"model": tensors(), "args": argparse.Namespace(rate=0.1)},
        {"epoch": 3, "state_dict": tensors("module."), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
    ],
)
def test_a_state_dict_is_found_in_every_form(content, zipped, tmp_path):
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    content = container.read(tmp_path / "net.pth")
    assert same(content.arrays)
    assert content.metadata == {}


def history_buffer() -> type:
    """Returns a stand-in for mmengine's class, which pickles its name, NumPy arrays and methods found by getattr."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"min": HistoryBuffer.min}

        def min(self):
            return self._log_history.min()

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = HistoryBuffer.__module__, "HistoryBuffer.min"
    return HistoryBuffer


def test_a_checkpoint_of_an_mmengine_run_is_read_without_mmengine(tmp_path, monkeypatch):
    buffer, path = history_buffer(), tmp_path / "iter_80000.pth"
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[buffer.__module__].HistoryBuffer = buffer
        hub = {"log_scalars": {"train/loss": buffer()}, "runtime_info": {"lr": np.float64(0.01)}}
        torch.save({"meta": {"cfg": "a=1"}, "state_dict": tensors(), "message_hub": hub, "param_schedulers": [{}]}, path)
    types_in_file = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert {"builtins.getattr", "mmengine.logging.history_buffer.HistoryBuffer", "numpy.ndarray"} <= types_in_file
    content = container.read(path)
    assert same(content.arrays)
    assert content.metadata == {"cfg": "a=1"}
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):  # the permission was only temporary
        torch.load(path, weights_only=True)


class Hostile:
    """Creates a file named `ran` when it is unpickled."""

    def __init__(self, function: object, arguments: tuple):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self) -> None:
        """Makes the object callable, as pickle requires of a function."""


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("function", ["os.system", "builtins.exec", "builtins.getattr"])
def test_a_hostile_pickle_is_refused_without_running_it(function, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = {
        "os.system": Hostile(os.system, ("touch ran",)),
        "builtins.exec": Hostile(exec, ("open('ran', 'w').close()",)),
        "builtins.getattr": Hostile(Hostile(getattr, (np.ndarray, "tofile")), (np.ones(1), "ran")),  # allowed names
    }[function]
    content = {"state_dict": {} if save == "pickle" else tensors(), "extra": hostile}
    if save == "pickle":
        Path("net.pth").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, "net.pth", _use_new_zipfile_serialization=save == "zip")
    with pytest.raises(ValueError, match=r"net\.pth: (contains Python objects as well as tensors|cannot be read)") as refusal:
        weights.inspect("net.pth")
    print(refusal.value)
    assert sorted(os.listdir()) == ["net.pth"]
    torch.load("net.pth", weights_only=False) if save != "pickle" else pickle.loads(Path("net.pth").read_bytes())
    assert sorted(os.listdir()) == ["net.pth", "ran"]  # the attack works with unsafe loading


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".tar", ".safetensors", ".caffemodel"])
@pytest.mark.parametrize("damage", ["empty", "text", "zeros", "truncated", "other"])
def test_a_damaged_file_ends_in_one_sentence(ending, damage, tmp_path):
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"net{ending}"
    other = ".pth" if ending == ".safetensors" else ".safetensors"
    for file, kind in ((whole, ending), (tmp_path / "other", other)):
        pytorch.write_safetensors(file, ARRAYS) if kind == ".safetensors" else torch.save(tensors(), file)
    content = whole.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"<!DOCTYPE html>\n<html>404</html>\n",
            "zeros": bytes(1000),
            "truncated": content[: len(content) // 2],
            "other": (tmp_path / "other").read_bytes(),
        }[damage]
    )
    with pytest.raises(ValueError) as refusal:
        weights.inspect(path)
    message = str(refusal.value)
    print(message)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message.replace(str(tmp_path), "")) < 300


MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains a list; expected a state_dict, or a checkpoint with one"),
        (torch.eye(3), "contains a Tensor; expected a state_dict"),
        ({}, "has no weights"),
        ({"state_dict": {}}, "has no weights"),
        ({"state_dict": {"a.weight": torch.eye(3).to_sparse()}}, "'a.weight' is not a dense tensor"),
        ({"state_dict": {"a.weight": np.float64(1)}}, "has no weights, only a.weight; expected a state_dict"),
        ({"epoch": 1, "optimizer": MOMENTUM}, "has no weights, only epoch, optimizer; expected a state_dict"),
        (MOMENTUM, "has no weights, only state, param_groups; expected a state_dict"),
        (
            {"epoch": 1, "net1": tensors(), "optimizer": MOMENTUM},
            "expected a state_dict, or a checkpoint with one; name net.pth:net1",
        ),
    ],
)
def test_content_without_a_state_dict_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError) as refusal:
        weights.inspect(tmp_path / "net.pth")
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(f"{tmp_path}/net.pth: ")


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"float8_e4m3fn.*; convert them to float32"):
        weights.inspect(tmp_path / "net.safetensors")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"net\.pth: no such file; expected a weights file: PyTorch's \.pth"):
        weights.inspect(tmp_path / "net.pth")


def test_without_torch_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    torch.save(tensors(), tmp_path / "net.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r'needs PyTorch: pip install "pspnet_jax\[torch\]", or use \.safetensors'):
        weights.inspect(tmp_path / "net.pth")


def test_importing_the_package_loads_neither_torch_nor_tensorflow():
    code = "import sys, pspnet_jax.weights; print([m for m in ('torch', 'tensorflow', 'google.protobuf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("write", [pytorch.write_torch, pytorch.write_safetensors])
def test_a_failed_write_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = tmp_path / "net"
    path.write_text("old")

    def fail(file: Path, content: bytes) -> None:
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, ARRAYS)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["net"]
