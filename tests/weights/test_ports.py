"""Files of the ports to Keras and TensorFlow: imported networks compute the same, and nothing in a file is run."""

import functools
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from pspnet_jax.weights import container, ports
from tests.weights import refusal

reference = pytest.importorskip("tests.weights.reference_ports")  # needs torch
K = 7
SIZE = 89  # the features are 12x12, which the ports' fixed pooling kernels divide


@pytest.fixture(scope="module")
def small() -> dict:
    """A few layers, with the shapes of Caffe's blobs."""
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    batch_norm = {key: array(1, 4, 1, 1) for key in ("scale", "offset", "mean", "variance")}
    return {"conv5_4": {"weights": array(3, 3, 2, 4)}, "conv5_4_bn": batch_norm, "conv6": {"weights": array(1, 1, 4, 5)}} | {
        "conv6_1": {"weights": array(1, 1, 4, 5), "biases": array(5)}
    }


def expected(layers: dict) -> dict[str, np.ndarray]:
    names = reference.KERAS | reference.BATCH_NORM
    return {
        f"{layer}/{names[key]}": array.transpose(3, 2, 0, 1) if key == "weights" else array.ravel()
        for layer, arrays in layers.items()
        for key, array in arrays.items()
    }


def assert_same(found: dict, layers: dict) -> None:
    wanted = expected(layers)
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], array)


def header() -> bytes:
    """The header of a .npy with one object."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue()


def python2(layers: dict) -> bytes:
    """A .npy as Python 2 pickles it, where text and the bytes of arrays are both its str."""

    def text(value: str | bytes) -> bytes:
        value = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def items(*values: bytes, kind: bytes = b"t") -> bytes:
        return b"(" + b"".join(values) + kind

    def array(shape: tuple[int, ...], dtype: bytes, order: str, content: bytes) -> bytes:
        name = b"cnumpy.core.multiarray\n_reconstruct\n" + items(b"cnumpy\nndarray\n", items(number(0)), text("b")) + b"R"
        kind = b"cnumpy\ndtype\n" + items(text(dtype), number(0), number(1)) + b"R"
        kind += items(number(3), text(order), b"NNN", number(-1), number(-1), number(0)) + b"b"
        return name + items(number(1), items(*map(number, shape)), kind, b"\x89", content) + b"b"

    def layer(arrays: dict) -> bytes:
        each = [text(k) + array(v.shape, b"f4", "<", text(v.tobytes())) for k, v in arrays.items()]
        return items(*each, kind=b"d")

    content = items(*(text(name) + layer(arrays) for name, arrays in layers.items()), kind=b"d")
    return header() + b"\x80\x02" + array((), b"O8", "|", items(content, kind=b"l")) + b"."


FORMS: dict[str, Callable[[Path, dict], object]] = {
    "weights.h5": reference.write_h5,
    "model.h5": functools.partial(reference.write_h5, whole=True),
    "net.npy": reference.write_npy,
    "python2.npy": lambda path, layers: path.write_bytes(python2(layers)),
    "flat.npy": lambda path, layers: np.save(path, np.asarray({k: dict(v) for k, v in layers.items()}), allow_pickle=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_files_are_read_in_every_form(name, small, tmp_path):
    FORMS[name](tmp_path / name, small)
    arrays = container.read(tmp_path / name).arrays
    assert_same({key: array for key, array in arrays.items() if "optimizer" not in key}, small)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("one_file", [False, True])
def test_checkpoints_are_read_by_any_of_their_names(old, one_file, small, tmp_path):
    path = tmp_path / "model.ckpt-40000"
    reference.write_checkpoint(path, reference.variables(small, old), one_file)
    assert path.exists() == one_file
    for name in (path,) if one_file else (path, Path(f"{path}.index")):
        arrays = container.read(name).arrays
        assert arrays.pop("global_step") == 7
        np.testing.assert_array_equal(arrays.pop("conv6/weights/Momentum"), small["conv6"]["weights"].transpose(3, 2, 0, 1))
        assert_same(arrays, small)
    if not one_file:
        data = f"{path}.data-00000-of-00001"
        assert refusal(weights.inspect, Path(data)).endswith(
            f"is a part of a TensorFlow checkpoint; give its index instead: {path}.index"
        )
        os.truncate(data, 20)
        assert "cannot be read as a checkpoint; copy or download it again (" in refusal(weights.inspect, Path(f"{path}.index"))
        os.remove(data)
        assert "cannot be read as a checkpoint; copy or download it again (" in refusal(weights.inspect, Path(f"{path}.index"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras' own
def test_keras_itself_writes_files_that_are_read(tmp_path):
    keras = pytest.importorskip("keras")
    layers = [keras.layers.Conv2D(4, 3, use_bias=False, name="conv5_4"), keras.layers.BatchNormalization(name="conv5_4_bn")]
    model = keras.Sequential([keras.Input((5, 5, 2)), *layers, keras.layers.Conv2D(3, 1, name="conv6")])
    model.save(tmp_path / "net.h5")
    arrays = container.read(tmp_path / "net.h5").arrays
    kernel, gamma, beta, mean, variance, last, bias = model.get_weights()
    np.testing.assert_array_equal(arrays["conv5_4/kernel"], kernel.transpose(3, 2, 0, 1))
    for name, array in {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance}.items():
        np.testing.assert_array_equal(arrays[f"conv5_4_bn/{name}"], array)
    np.testing.assert_array_equal(arrays["conv6/kernel"][:, :, 0, 0], last[0, 0].T)
    np.testing.assert_array_equal(arrays["conv6/bias"], bias)


class Evil:
    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        function, *arguments = self.call
        return function, tuple(arguments)


def hostile(tmp_path: Path) -> dict[str, object]:
    structured = np.zeros(2, [("a", "f4")])
    return {
        "os.system": {"conv6": {"weights": Evil(os.system, f"touch {tmp_path}/run")}},
        "builtins.getattr": {"conv6": Evil(getattr, "x", "upper")},
        "builtins.eval": {Evil(eval, "1"): {}},
        "pathlib": {"conv6": {"weights": tmp_path}},
        "arrays of dtype 'V4'": {"conv6": {"weights": structured}},
        "arrays of dtype 'M8'": {"conv6": {"weights": np.zeros(2, "M8[s]")}},
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_but_dicts_and_arrays_is_constructed(protocol, tmp_path):
    for what, content in hostile(tmp_path).items():
        (tmp_path / "net.npy").write_bytes(header() + pickle.dumps(np.asarray(content), protocol))
        message = refusal(weights.inspect, tmp_path / "net.npy")
        name = {"os.system": "posix.system" if os.name == "posix" else "nt.system"}.get(what, what)
        if protocol == 0 or protocol == 2:
            name = name.replace("builtins", "__builtin__")
        assert f"has {name}" in message
        assert ", which could run code, so nothing was read; expected the dict of layers" in message
    assert not (tmp_path / "run").exists()


def test_an_array_of_pointers_is_refused(tmp_path):
    """A pickle can declare that the bytes of an array are Python objects, which NumPy would follow."""
    pickled = pickle.dumps(np.asarray({"conv6": {"weights": np.arange(2.0, dtype=np.float64)}}), 2)
    evil = pickled.replace(b"X\x02\x00\x00\x00f8", b"X\x02\x00\x00\x00O8")
    assert evil != pickled
    (tmp_path / "net.npy").write_bytes(header() + evil)
    assert "has an array of pointers, which could run code, so nothing was read" in refusal(
        weights.inspect, tmp_path / "net.npy"
    )


def test_other_and_damaged_files_are_refused(small, tmp_path):
    np.save(tmp_path / "array.npy", np.ones((2, 3), np.float32))
    assert "has an array float32[2, 3]; expected the dict of layers" in refusal(weights.inspect, tmp_path / "array.npy")
    for content in ([["conv6"]], {"conv6": [1.0]}):
        np.save(tmp_path / "other.npy", np.asarray(content, object), allow_pickle=True)
        assert "; expected the dict of layers that caffe-tensorflow writes" in refusal(weights.inspect, tmp_path / "other.npy")
    for name in ("net.npy", "weights.h5"):
        FORMS["net.npy" if name == "net.npy" else "weights.h5"](tmp_path / name, small)
        content = (tmp_path / name).read_bytes()
        for length in (20, 100, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:length])
            assert "cannot be read" in refusal(weights.inspect, tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.ones((3, 3, 2, 4), np.float32)  # of Keras 3
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/")
    assert "has no network that can be imported" in refusal(weights.inspect, tmp_path / "other.h5")


def test_an_h5_reads_no_other_file(small, tmp_path):
    secret, kernel = tmp_path / "secret.h5", small["conv6"]["weights"]
    reference.write_h5(secret, small)
    for link in (h5py.ExternalLink("secret.h5", "/"), h5py.SoftLink("/elsewhere")):
        with h5py.File(tmp_path / "link.h5", "w") as file:
            file["elsewhere"] = h5py.ExternalLink("secret.h5", "/")
            file["model_weights"] = link
        assert "has no weights" in refusal(weights.inspect, tmp_path / "link.h5")
    kernel.tofile(tmp_path / "raw")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("conv6/conv6/kernel:0", kernel.shape, "f4", external=[(str(tmp_path / "raw"), 0, kernel.nbytes)])
    layout = h5py.VirtualLayout(kernel.shape, "f4")
    with h5py.File(secret) as file:
        layout[...] = h5py.VirtualSource(next(file[name] for name in names(file) if name.endswith("conv6/kernel:0")))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("conv6/conv6/kernel:0", layout)
    for name in ("external.h5", "virtual.h5"):
        assert "keeps conv6/conv6/kernel:0 in another file, so nothing was read" in refusal(weights.inspect, tmp_path / name)


def names(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visit(found.append)
    return found


def test_what_is_no_array_of_a_layer_in_an_h5_is_skipped(small, tmp_path):
    FORMS["weights.h5"](tmp_path / "net.h5", small)
    with h5py.File(tmp_path / "net.h5", "a") as file:
        file["step"], file["conv6/note"], file["conv6/nothing"] = 3, "trained twice", h5py.Empty("f4")
    assert_same(container.read(tmp_path / "net.h5").arrays, small)


def test_a_pickle_with_deeply_nested_tuples_is_refused(tmp_path):
    """A dict hashes its keys, and a tuple hashes what it contains, without any limit."""
    for depth in (ports.MAX_TUPLES, 3_000_000):
        nested = b"\x80\x02}N" + b"\x85" * depth + b"K\x00s."
        (tmp_path / "net.npy").write_bytes(header() + nested)
        message = refusal(weights.inspect, tmp_path / "net.npy")
    assert "has more than 20000 tuples" in message


@pytest.fixture(scope="module")
def published() -> tuple[dict, np.ndarray, np.ndarray]:
    """The layers of a network like the ports' R50, an image, and its logits."""
    run = reference.Interpreter()
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    return run.layers, image, reference.pspnet(run, image, K)


def write(path: Path, layers: dict) -> Path:
    if path.suffix == ".index":
        reference.write_checkpoint(path.with_suffix(""), reference.variables(layers))
    else:
        FORMS[f"{'weights' if path.suffix == '.h5' else 'net'}{path.suffix}"](path, layers)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pspnet50.h5", "pspnet50.npy", "pspnet50.index"])
def test_logits_equal_those_of_the_ports(name, published, tmp_path):
    layers, image, expected = published
    path = write(tmp_path / name, layers)
    config, source = base_config(), weights.inspect(path)
    weights.configure(config, source)
    assert str(source) == f"{path}: a PSPNet of Caffe, ported to Keras or TensorFlow, depth 50, 7 classes"
    model = config.model
    assert (model.depth, model.stem, model.stride_in, model.first_block_dilation) == (50, "deep", "conv1x1", "full")
    assert (model.bins, model.align_corners, model.auxiliary) == ((6, 3, 2, 1), True, False)
    assert config.normalize.to_dict() == {"mean": (123.68, 116.779, 103.939), "std": (1.0, 1.0, 1.0), "order": "BGR"}
    assert config.eval.protocol == "caffe"
    network = models.build(config.model, K)
    inputs = models.normalize(image, config.normalize)
    logits = jax.jit(network.apply, static_argnames="train")(weights.load(path, network), inputs, train=False)
    error = float(np.abs(logits - expected).max() / expected.std())
    print(f"{name}: max |difference| / std = {error:.1e}")
    assert error <= 1e-4


@pytest.mark.slow
def test_depth_101_has_the_stride_of_caffe_which_is_not_that_of_the_ports(tmp_path):
    run = reference.Interpreter()
    reference.pspnet(run, np.zeros((1, 41, 41, 3), np.uint8), 21, (3, 4, 23, 3))
    reference.write_h5(tmp_path / "pspnet101_voc2012.h5", run.layers)
    source = weights.inspect(tmp_path / "pspnet101_voc2012.h5")
    config = base_config()
    weights.configure(config, source)
    assert (config.dataset.name, config.model.depth, config.model.stride_in) == ("voc2012", 101, "conv3x3")
    assert "--config.model.stride_in=conv3x3" in weights.assumptions(config, source)
