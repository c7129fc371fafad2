"""Every job on gs:// as on local paths, with the clients' own code against an emulator on the loopback."""

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

pytest.importorskip("google.cloud.storage")  # orbax's client of gs://
if not shutil.which("openssl"):
    pytest.skip("no openssl, which makes the emulator's certificate", allow_module_level=True)

# Runs commands of the program, one after the other, and one that SIGTERM stops when its first step is saved.
CHILD = """
import json, os, signal, sys, threading, time
from etils import epath
from pspnet_jax.main import main

def stop(first):
    while not epath.Path(first).exists():
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)

for first, arguments in json.loads(sys.argv[1]):
    if first:
        threading.Thread(target=stop, args=[first], daemon=True).start()
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
    """Runs the commands in a new process and an empty folder, in which none may leave anything; returns what they print."""
    bucket, environment = cloud
    (cwd := folder / "cwd").mkdir(exist_ok=True)
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    plan = json.dumps([(stopped_after, command) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, plan],
        cwd=cwd,
        env={**os.environ, **environment, **flags},
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


def statuses(said: str) -> list[str]:
    return re.findall(r"^status (\w+): --(\S+)", said, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_run_is_trained_stopped_resumed_scored_and_used_on_gs(cloud, tmp_path):
    bucket, _ = cloud
    data = fakes.write_folder(tmp_path / "data", {"train": 9, "val": 3}, size=(60, 50), num_classes=3)
    bucket.upload("bucket/data", data)
    own = recipe(tmp_path / "own.py", Path("ROOT"))
    own.write_text(own.read_text().replace("'ROOT'", "'gs://bucket/data'"))
    small = [*SMALL, "--config.every.save=1", "--config.every.eval=0"]
    train = [f"--config={own}", "--workdir=gs://bucket/run", *small, "--config.total_steps=200"]
    said = run(cloud, tmp_path, train, stopped_after="gs://bucket/run/checkpoints/1/commit_success.txt")
    assert statuses(said) == [("143", f"config={own}")]
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved", said)[1])
    assert f"bucket/run/checkpoints/{step}/commit_success.txt" in bucket.objects

    said = run(
        cloud,
        tmp_path,
        [*train, f"--config.total_steps={step + 1}"],
        ["--mode=check", f"--config={own}", "--workdir=gs://bucket/run", *small],
        ["--mode=evaluate", "--workdir=gs://bucket/run"],
        ["--mode=predict", "--workdir=gs://bucket/run", "--input=gs://bucket/data/images/val", "--output=gs://bucket/out"],
    )
    assert [status for status, _ in statuses(said)] == ["0"] * 4
    assert f"training from step {step} to {step + 1}; writing to gs://bucket/run\n" in said
    lines = [json.loads(line) for line in bucket.objects["bucket/run/metrics.jsonl"].content.splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, step + 2))
    [scored] = bucket.names("bucket/run/evaluation/folder_")
    assert json.loads(bucket.objects[scored].content)["mean_iou"] == lines[-1]["mean_iou"]
    assert len([key for key in bucket.names("bucket/run/pictures/") if key.endswith(".png")]) == 3
    assert bucket.names("bucket/run/tensorboard/events")
    assert bucket.names("bucket/run/check/train_images")
    for name in ("000", "001", "002"):
        (tmp_path / "index.png").write_bytes(bucket.objects[f"bucket/out/index/{name}.png"].content)
        assert np.asarray(Image.open(tmp_path / "index.png")).shape == (60, 50)
    assert [key for key in bucket.objects if "/.config" in key or "/.metrics" in key] == []  # temporary files


@pytest.mark.slow
def test_weights_are_imported_from_gs_and_exported_to_it(cloud, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.weights import reference_torch as reference

    bucket, _ = cloud
    state = reference.randomized(reference.SemsegPSPNet(50, 3)).state_dict()
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    bucket.write("bucket/net.pth", (tmp_path / "net.pth").read_bytes())
    said = run(
        cloud,
        tmp_path,
        ["--mode=import", "--input=gs://bucket/net.pth", "--workdir=gs://bucket/imported"],
        ["--mode=export", "--workdir=gs://bucket/imported", "--format=safetensors", "--output=gs://bucket/x/net.safetensors"],
    )
    assert [status for status, _ in statuses(said)] == ["0", "0"]
    assert [key for key in bucket.names("bucket/x/") if not key.endswith("/")] == ["bucket/x/net.safetensors"]
    (tmp_path / "net.safetensors").write_bytes(bucket.objects["bucket/x/net.safetensors"].content)
    back = pytorch.read_safetensors(tmp_path / "net.safetensors")
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[key], tensor.numpy())


def test_a_bucket_that_is_not_there_or_not_the_users_ends_in_one_sentence(cloud, tmp_path):
    """At once: TensorFlow would try to write to a bucket that is not there for minutes."""
    own = recipe(tmp_path / "own.py", tmp_path)
    said = run(
        cloud,
        tmp_path,
        ["--mode=import", "--input=gs://no-bucket/net.pth", "--workdir=gs://bucket/imported"],
        ["--mode=import", "--input=gs://forbidden/net.pth", "--workdir=gs://bucket/imported"],
        [f"--config={own}", "--workdir=gs://no-bucket/run"],
        [f"--config={own}", "--workdir=gs://bucket/run", "--config.dataset.root=gs://forbidden/data"],
        ["--mode=check", f"--config={own}", "--workdir=gs://bucket/run", "--config.dataset.root=gs://no-bucket/data"],
        ["--mode=evaluate", "--workdir=gs://forbidden/run"],
    )
    errors = re.findall(r"^error: (?:argument --\w+: )?(.*)", said, flags=re.MULTILINE)
    assert [status for status, _ in statuses(said)] == ["1"] * 6
    assert errors[0] == "gs://no-bucket/net.pth: there is no bucket gs://no-bucket"
    assert errors[1].startswith("gs://forbidden/net.pth: gs://forbidden cannot be read (Error executing an HTTP request: ")
    assert errors[2] == "gs://no-bucket/run: there is no bucket gs://no-bucket"
    assert errors[3].startswith("gs://forbidden/data: gs://forbidden cannot be read (")
    assert errors[4] == "gs://no-bucket/data: there is no bucket gs://no-bucket"
    assert errors[5].startswith("gs://forbidden/run: gs://forbidden cannot be read (")
