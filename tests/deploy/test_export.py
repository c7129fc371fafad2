"""Exported programs agree with ours in their own runtimes, and need nothing of this package there."""

import errno
import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from pspnet_jax.deploy import export, savedmodel
from pspnet_jax.errors import UserError
from tests.deploy import networks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning"),
]

SIZE = (49, 57)
NETWORKS = {
    "semseg": {},
    "mmseg": {"stem": "deep32", "align_corners": False, "first_block_dilation": "half"},
    "conv7": {"stem": "conv7", "bins": (1, 2, 4, 8), "output_stride": 16, "head_kernel": 1, "factored_head": False},
    "maximum": {"pool": "max", "bins": (1, 3), "reduce_channels": False, "align_corners": False},
    "fcn": {"bins": (), "dtype": "bfloat16"},  # TFLite and ONNX compute in float32
    "recomputed": {"bins": (), "remat": "norm"},
    "bottlenecks": {"depth": 50, "stride_in": "conv1x1"},
}
PACKAGES = {"savedmodel": "tensorflow", "tflite": "tensorflow", "onnx": "onnxruntime"}


def run_stablehlo(path: epath.Path, images: np.ndarray, output: str) -> np.ndarray:
    """Runs a program in a process that cannot import this package."""
    code = (
        "import sys; sys.modules['pspnet_jax'] = None\n"
        "import jax.export, numpy as np\n"
        "program = jax.export.deserialize(open(sys.argv[1], 'rb').read())\n"
        "assert program.platforms == ('cpu', 'cuda', 'tpu')\n"
        "np.save(sys.argv[3], program.call(np.load(sys.argv[2])))\n"
        "assert not [m for m in sys.modules if m.startswith(('pspnet_jax.', 'flax'))]\n"
    )
    given, found = path.with_suffix(".in.npy"), path.with_suffix(".out.npy")
    np.save(given, images)
    done = subprocess.run([sys.executable, "-c", code, path, given, found], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return np.load(found)


def run_savedmodel(path: epath.Path, images: np.ndarray, output: str) -> np.ndarray:
    tf = pytest.importorskip("tensorflow")
    saved = tf.saved_model.load(str(path))
    return saved.signatures["serving_default"](image=tf.constant(images))[output].numpy()


def run_onnx(path: epath.Path, images: np.ndarray, output: str) -> np.ndarray:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(str(path), full_check=True)
    [found] = onnxruntime.InferenceSession(str(path)).run([output], {"image": images})
    return found


def run_tflite(path: epath.Path, images: np.ndarray, output: str) -> np.ndarray:
    tf = pytest.importorskip("tensorflow")
    return tf.lite.Interpreter(str(path)).get_signature_runner()(image=images)[output]


RUN: dict[str, Callable[..., np.ndarray]] = {
    "stablehlo": run_stablehlo,
    "savedmodel": run_savedmodel,
    "onnx": run_onnx,
    "tflite": run_tflite,
}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return networks.random_images(2, *SIZE)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, images) -> tuple[Any, Any, np.ndarray]:
    """The config and variables of a network, and the probabilities that it computes."""
    config = networks.make_config(5, **{"depth": 18, "width": 8} | NETWORKS[request.param])
    variables = networks.random_variables(config, images)
    program = export.Program(config, variables, "probabilities")
    return config, variables, np.asarray(jax.jit(program.__call__)(images))


@pytest.mark.parametrize("fmt", export.FORMATS)
def test_probabilities_agree_with_ours(fmt, network, images, tmp_path):
    """For as many images as the file allows, of any size if it allows that. In bfloat16, rounding differs."""
    pytest.importorskip(PACKAGES.get(fmt, "jax"), reason="needs the extra dev")
    config, variables, expected = network
    kind = export.FORMATS[fmt]
    path = epath.Path(tmp_path) / f"network{kind.ending}"
    batch, size = 0 if kind.any_batch else 2, export.ANY_SIZE if kind.any_size else SIZE
    export.export(export.Program(config, variables, "probabilities", batch, size), fmt, path)
    found = RUN[fmt](path, images, "probabilities")
    print(f"{fmt}: probabilities differ by at most {np.abs(found - expected).max():.1e}")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 if config.model.dtype == "float32" else 0.05)


@pytest.mark.parametrize("fmt", export.FORMATS)
@pytest.mark.parametrize("network", ["semseg"], indirect=True)
def test_labels_agree_with_ours_but_for_ties(fmt, network, images, tmp_path):
    pytest.importorskip(PACKAGES.get(fmt, "jax"), reason="needs the extra dev")
    config, variables, probabilities = network
    path = epath.Path(tmp_path) / f"network{export.FORMATS[fmt].ending}"
    export.export(export.Program(config, variables, "labels", 2, SIZE), fmt, path)
    found = RUN[fmt](path, images, "labels")
    assert found.dtype == np.uint8
    chosen = np.take_along_axis(probabilities, found[..., None].astype(int), -1)[..., 0]
    assert (probabilities.max(-1) - chosen).max() < 1e-5
    assert len(np.unique(found)) > 1
    described = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert described["input"] == {"name": "image", "dtype": "uint8", "shape": [2, *SIZE, 3], "channels": "RGB"}
    assert described["output"] == {"name": "labels", "dtype": "uint8", "shape": [2, *SIZE]}
    assert described["classes"] == list(config.dataset.class_names)


@pytest.mark.parametrize("network", ["semseg", "mmseg"], indirect=True)
def test_stablehlo_takes_any_size(network, tmp_path):
    """Also sizes that no stride divides."""
    config, variables, _ = network
    program = export.Program(config, variables, "probabilities", 0, export.ANY_SIZE)
    export.export(program, "stablehlo", epath.Path(tmp_path) / "network.stablehlo")
    loaded = jax.export.deserialize((tmp_path / "network.stablehlo").read_bytes())
    for size in ((33, 41), (64, 78)):
        images = networks.random_images(1, *size)
        expected = jax.jit(program.__call__)(images)
        np.testing.assert_allclose(loaded.call(images), expected, atol=1e-4)
    with pytest.raises(ValueError):  # from JAX, which does not say more
        loaded.call(networks.random_images(1, 32, 41))


def test_platforms_have_their_own_code():
    """Only for CPUs, a large convolution is computed by Winograd's method, whose products are not in the code for GPUs."""
    config = networks.make_config(2, depth=18, width=64, bins=(), stem="conv7")
    model_shapes = jax.eval_shape(lambda: export.Program(config, {}).model.init(jax.random.key(0), IMAGE, train=False))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model_shapes)

    def convolutions(platform: str) -> int:
        program = export.Program(config, variables, "labels", 1, (713, 713))
        exported = jax.export.export(jax.jit(program.__call__), platforms=[platform])(program.images)
        return exported.mlir_module().count("stablehlo.convolution")

    print({platform: convolutions(platform) for platform in export.PLATFORMS})
    assert convolutions("cuda") == convolutions("tpu") > convolutions("cpu")


IMAGE = np.zeros((1, 64, 64, 3), np.float32)


def program(outputs: str = "labels", batch: int = 1, size: tuple[int, int] = (64, 64), value: float = 0.0) -> export.Program:
    return export.Program(networks.make_config(3), {"params": np.full(2, value)}, outputs, batch, size)


@pytest.mark.parametrize(
    ("given", "fmt", "name", "message"),
    [
        (program(), "onnx", "x.pb", "expected a name that ends in .onnx"),
        (program(batch=0), "tflite", "x.tflite", "--batch 0: tflite files hold a fixed number of images"),
        (program(size=(0, 0)), "onnx", "x.onnx", "--size any: onnx files have a fixed image size"),
        (program(size=(32, 473)), "stablehlo", "x.stablehlo", "--size 32x473: expected at least 33 pixels"),
        (program(value=np.nan), "savedmodel", "x", "not finite"),
    ],
)
def test_programs_that_a_format_cannot_hold_are_refused(given, fmt, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export.export(given, fmt, epath.Path(tmp_path) / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fmt", "package", "extra"),
    [("onnx", "onnx", "export"), ("savedmodel", "tensorflow", "train"), ("tflite", "tensorflow", "train")],
)
def test_a_missing_package_is_named_with_its_extra(fmt, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    path = epath.Path(tmp_path) / f"network{export.FORMATS[fmt].ending}"
    with pytest.raises(UserError, match=rf"{fmt}.* need.*pip install 'pspnet_jax\[{extra}\]'"):
        export.export(program(), fmt, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.onnx", "x.onnx.json"])
def test_existing_files_are_kept(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: already exists"):
        export.export(program(), "onnx", epath.Path(tmp_path) / "x.onnx")
    assert [path.read_text() for path in pathlib.Path(tmp_path).iterdir()] == ["mine"]


def test_without_its_description_no_program_is_written(tmp_path, monkeypatch):
    def fail(self: export.Program) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.Program, "describe", fail)
    monkeypatch.setitem(sys.modules, "pspnet_jax.deploy.onnx", types.SimpleNamespace(write=lambda _, path: path.write_text("")))
    with pytest.raises(UserError, match=r"No space left on device.*nothing was exported"):
        export.export(program(), "onnx", epath.Path(tmp_path) / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_for_the_description_is_refused_first(tmp_path):
    with pytest.raises(UserError, match=r"File name too long.*nothing was exported"):
        export.check("onnx", epath.Path(tmp_path) / f"{'x' * 248}.onnx", 1, (64, 64))


def test_a_savedmodel_in_a_bucket_is_refused_first():
    with pytest.raises(UserError, match="gs://bucket/x: directories are only written locally"):
        export.check("savedmodel", epath.Path("gs://bucket/x"), 0, None)


def test_a_refusal_of_the_converter_to_tflite_without_a_text_is_named(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow", reason="needs the extra train")

    def refuse(folder: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(savedmodel, "save", lambda program, folder: None)
    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_saved_model", refuse)
    with pytest.raises(UserError, match="refuses this network: RuntimeError"):
        export.export(program(), "tflite", epath.Path(tmp_path) / "x.tflite")
    assert list(tmp_path.iterdir()) == []
