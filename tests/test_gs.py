"""Every mode works on gs:// as on local paths; the real clients run against an emulator on the loopback interface."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.weights import pytorch
from tests import fakes, gcs
from tests.test_main import SMALL, recipe

pytestmark = pytest.mark.slow

pytest.importorskip("google.cloud.storage")  # orbax's client for gs://
if not shutil.which("openssl"):
    pytest.skip("openssl is missing, which makes the emulator's certificate", allow_module_level=True)

# Runs commands one after the other; a command with a path is stopped by SIGTERM once the path exists.
CHILD = """
import json, os, signal, sys, threading, time
from etils import epath
from pspnet_jax.main import main

def stop_after(path):
    while not epath.Path(path).exists():
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)

for path, arguments in json.loads(sys.argv[1]):
    if path:
        threading.Thread(target=stop_after, args=[path], daemon=True).start()
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    print(f"status {status}: {arguments[0]}", flush=True)
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> Iterator[tuple[gcs.Bucket, dict[str, str]]]:
    with gcs.serve(tmp_path_factory.mktemp("gcs")) as served:
        yield served


def run(cloud, folder: Path, *commands: list[str], stopped_after: str = "") -> str:
    """Runs commands in a new process in an empty folder, which has to stay empty; returns their output."""
    bucket, environment = cloud
    (cwd := folder / "cwd").mkdir(exist_ok=True)
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    plan = json.dumps([(stopped_after, command) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, plan],
        cwd=cwd,
        env={**os.environ, **environment, **flags, "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-5000:])
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    assert list(cwd.iterdir()) == []
    assert not [path for path in bucket.objects if "://" in path or path.startswith("/")]
    return done.stdout


def statuses(output: str) -> list[str]:
    return re.findall(r"^status (\w+): --(\S+)", output, flags=re.MULTILINE)


def test_training_stopping_resuming_evaluation_and_prediction_on_gs(cloud, tmp_path):
    """The checkpoint that SIGTERM leaves is damaged by a flipped bit, so that training resumes from the one before."""
    bucket, _ = cloud
    data = fakes.write_folder(tmp_path / "data", {"train": 9, "val": 3}, size=(60, 50), num_classes=3)
    bucket.upload("bucket/data", data)
    own = recipe(tmp_path / "own.py", Path("ROOT"))
    own.write_text(own.read_text().replace("'ROOT'", "'gs://bucket/data'"))
    small = [*SMALL, "--config.every.save=1", "--config.every.eval=0"]
    train = [f"--config={own}", "--workdir=gs://bucket/run", *small, "--config.total_steps=200"]
    output = run(cloud, tmp_path, train, stopped_after="gs://bucket/run/checkpoints/2/commit_success.txt")
    assert statuses(output) == [("143", f"config={own}")]
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved", output)[1])
    assert f"bucket/run/checkpoints/{step}/commit_success.txt" in bucket.objects
    flip_bit(bucket, f"bucket/run/checkpoints/{step}")

    output = run(
        cloud,
        tmp_path,
        [*train, f"--config.total_steps={step + 1}"],
        ["--mode=check", f"--config={own}", "--workdir=gs://bucket/run", *small],
        ["--mode=evaluate", "--workdir=gs://bucket/run"],
        ["--mode=predict", "--workdir=gs://bucket/run", "--input=gs://bucket/data/images/val", "--output=gs://bucket/out"],
    )
    assert [status for status, _ in statuses(output)] == ["0"] * 4
    aside = f"gs://bucket/run/set_aside/{step}; using checkpoint {step - 1}"
    print("\n" + re.search(rf"checkpoint {step} is damaged \((.*)\); moved to {aside}\n", output)[1])
    assert f"training from step {step - 1} to {step + 1}; writing to gs://bucket/run\n" in output
    lines = [json.loads(line) for line in bucket.objects["bucket/run/metrics.jsonl"].content.splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, step + 2))
    [scored] = [name for name in bucket.names("bucket/run/evaluation/folder_") if name.endswith(".json")]
    assert json.loads(bucket.objects[scored].content)["mean_iou"] == lines[-1]["mean_iou"]
    assert len([key for key in bucket.names("bucket/run/pictures/") if key.endswith(".png")]) == 4
    assert bucket.names("bucket/run/curves.png")
    assert bucket.names("bucket/run/tensorboard/events")
    assert bucket.names("bucket/run/check/train_images")
    for name in ("000", "001", "002"):
        (tmp_path / "index.png").write_bytes(bucket.objects[f"bucket/out/index/{name}.png"].content)
        assert np.asarray(Image.open(tmp_path / "index.png")).shape == (60, 50)
    assert [key for key in bucket.objects if "/.config" in key or "/.metrics" in key] == []  # temporary files


def flip_bit(bucket, checkpoint: str) -> None:
    """Flips a bit in the middle of the largest file of a checkpoint's weights."""
    assert bucket.names(f"{checkpoint}/sha256/metadata")
    values = [key for key in bucket.names(f"{checkpoint}/weights/") if "/d/" in key]
    largest = max(values, key=lambda key: len(bucket.objects[key].content))
    content = bytearray(bucket.objects[largest].content)
    content[len(content) // 2] ^= 1
    bucket.write(largest, bytes(content))


def test_weights_are_imported_from_and_exported_to_gs(cloud, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.weights import reference_torch as reference

    bucket, _ = cloud
    state = reference.randomized(reference.SemsegPSPNet(50, 3)).state_dict()
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    bucket.write("bucket/net.pth", (tmp_path / "net.pth").read_bytes())
    pytorch.write_safetensors(tmp_path / "model.safetensors", {key: tensor.numpy() for key, tensor in state.items()})
    bucket.write("bucket/folder/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    bucket.write("bucket/folder/config.json", b"{}")
    output = run(
        cloud,
        tmp_path,
        ["--mode=import", "--input=gs://bucket/net.pth", "--workdir=gs://bucket/imported"],
        ["--mode=export", "--workdir=gs://bucket/imported", "--format=safetensors", "--output=gs://bucket/x/net.safetensors"],
        ["--mode=import", "--input=gs://bucket/net.pth", f"--workdir={tmp_path}/again"],
        ["--mode=import", "--input=gs://bucket/folder", f"--workdir={tmp_path}/folder"],
    )
    assert [status for status, _ in statuses(output)] == ["0"] * 4
    assert output.count("downloading gs://bucket/net.pth: ") == 1
    [copy] = (tmp_path / "cache").rglob("net.pth")
    assert copy.read_bytes() == (tmp_path / "net.pth").read_bytes()
    [copy] = (tmp_path / "cache").rglob("model.safetensors")
    assert copy.with_name("config.json").read_text() == "{}"
    assert [key for key in bucket.names("bucket/x/") if not key.endswith("/")] == ["bucket/x/net.safetensors"]
    (tmp_path / "net.safetensors").write_bytes(bucket.objects["bucket/x/net.safetensors"].content)
    back = pytorch.read_safetensors(tmp_path / "net.safetensors")
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[key], tensor.numpy())


def test_a_missing_or_forbidden_bucket_ends_in_one_sentence(cloud, tmp_path):
    """The errors come at once: TensorFlow would retry to write to a missing bucket for minutes."""
    own = recipe(tmp_path / "own.py", tmp_path)
    output = run(
        cloud,
        tmp_path,
        ["--mode=import", "--input=gs://no-bucket/net.pth", "--workdir=gs://bucket/imported"],
        ["--mode=import", "--input=gs://forbidden/net.pth", "--workdir=gs://bucket/imported"],
        [f"--config={own}", "--workdir=gs://no-bucket/run"],
        [f"--config={own}", "--workdir=gs://bucket/run", "--config.dataset.root=gs://forbidden/data"],
        ["--mode=check", f"--config={own}", "--workdir=gs://bucket/run", "--config.dataset.root=gs://no-bucket/data"],
        ["--mode=evaluate", "--workdir=gs://forbidden/run"],
    )
    errors = re.findall(r"^error: (?:argument --\w+: )?(.*)", output, flags=re.MULTILINE)
    assert [status for status, _ in statuses(output)] == ["1"] * 6
    assert errors[0] == "gs://no-bucket/net.pth: there is no bucket gs://no-bucket"
    assert errors[1].startswith("gs://forbidden/net.pth: gs://forbidden cannot be read (Error executing an HTTP request: ")
    assert errors[2] == "gs://no-bucket/run: there is no bucket gs://no-bucket"
    assert errors[3].startswith("gs://forbidden/data: gs://forbidden cannot be read (")
    assert errors[4] == "gs://no-bucket/data: there is no bucket gs://no-bucket"
    assert errors[5].startswith("gs://forbidden/run: gs://forbidden cannot be read (")
