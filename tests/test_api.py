"""The package as a library: loading a network, and training in scripts, notebooks and threads."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import pspnet_jax
from pspnet_jax import config as configs
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.main import main
from tests import fakes
from tests.base_install import write_run
from tests.infer.test_predict import picture, read

ROOT = Path(__file__).parents[1]
slow = pytest.mark.slow


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_importing_the_package_takes_less_than_half_a_second_and_loads_nothing_heavy():
    code = """
import sys, time
began = time.perf_counter()
import pspnet_jax
print(time.perf_counter() - began, *{"jax", "numpy", "flax", "tensorflow", "torch"} & {*sys.modules})
"""
    done = python("-c", code)
    seconds, *loaded = done.stdout.split()
    assert float(seconds) < 0.5
    assert loaded == []


def test_a_script_may_end_before_its_iterator():
    """Without a traceback of threads that Python has already ended."""
    code = """
import itertools
import numpy as np
from tests.infer.test_segmenter import segmenter
results = segmenter()(np.zeros((30, 30, 3), np.uint8) for _ in itertools.count())
print(next(results).labels.shape)
"""
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("(30, 30)\n", "")


def test_names_of_the_package():
    assert {*pspnet_jax.__all__} == {"load", "train"}
    assert all(map(callable, (pspnet_jax.load, pspnet_jax.train)))
    assert (ROOT / "pspnet_jax/py.typed").exists()
    with pytest.raises(AttributeError, match="module 'pspnet_jax' has no attribute 'segment'"):
        pspnet_jax.segment  # noqa: B018


@slow
@pytest.mark.usefixtures("one_device")
def test_prediction_imports_neither_tensorflow_nor_torch(tmp_path):
    done = python("-W", "ignore", "tests/base_install.py", str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("api") / "run"
    write_run(workdir)
    return workdir


@slow
@pytest.mark.usefixtures("one_device")
def test_settings_are_those_of_the_command_line(run, tmp_path):
    image = picture(50, 60)
    fakes.write_image(tmp_path / "a.png", image)
    options = ["--config.eval.scales=0.5,1.0", "--config.eval.flip=false", "--config.eval.protocol=mmseg", "--checkpoint=0"]
    assert main(["--mode=predict", f"--workdir={run}", f"--input={tmp_path}/a.png", f"--output={tmp_path}/out", *options]) == 0
    segmenter = pspnet_jax.load(str(run), scales=[0.5, 1.0], flip=False, protocol="mmseg", checkpoint=0)
    np.testing.assert_array_equal(segmenter(image).labels, read(tmp_path / "out/index/a.png")[1])
    assert segmenter.classes == ("class 0", "class 1", "class 2")


@slow
def test_devices_and_batch_size(run):
    devices = jax.local_devices()[0].client.local_devices()
    segmenter = pspnet_jax.load(run, devices=devices[1:3], batch_size=6)
    assert [*segmenter.predictor.mesh.devices.flat] == devices[1:3]
    image = picture(50, 60)
    np.testing.assert_array_equal(segmenter(image).labels, pspnet_jax.load(run, devices=devices[:1])(image).labels)


@slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 2}, "scale: unknown setting; expected checkpoint, devices, base_size, batch_size, crop, flip, inference, "),
        ({"split": "test"}, "split: unknown setting"),
        ({"scales": 1.0}, r"scales=1\.0: expected a value like \(1\.0,\)"),
        ({"scales": (0.0,)}, r"eval\.scales=\(0\.0,\): expected one or more scales"),
        ({"flip": 1}, "flip=1: expected a value like True"),
        ({"flip": None}, "flip=None: expected a value like True"),
        ({"devices": []}, "expected a path or a name, and a list of devices or None"),
        ({"devices": ["cpu"]}, "expected a path or a name, and a list of devices or None"),
        ({"devices": jax.devices()[0]}, "expected a path or a name, and a list of devices or None"),
        ({"protocol": "semsge"}, "eval.protocol='semsge': expected one of 'semseg', 'caffe', 'mmseg'"),
        ({"checkpoint": 7}, r"checkpoint '7': .* has checkpoints \[0\]; expected latest, best or one of these"),
    ],
)
def test_settings_that_are_refused(run, settings, message):
    with pytest.raises(UserError, match=message):
        pspnet_jax.load(run, **settings)


@slow
def test_places_that_hold_no_network(tmp_path):
    (tmp_path / "empty").mkdir()
    fakes.write_image(tmp_path / "image.png", picture(9, 9))
    with pytest.raises(MissingFileError, match="nowhere: no such file or directory; expected a run or a weights file"):
        pspnet_jax.load("nowhere")
    with pytest.raises(MissingFileError, match="empty: is not a run with checkpoints"):
        pspnet_jax.load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"image\.png: is not a supported weights file"):
        pspnet_jax.load(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"checkpoint='best': .*image\.png is a file, and only runs have checkpoints"):
        pspnet_jax.load(tmp_path / "image.png", checkpoint="best")


@pytest.fixture
def config(tmp_path):
    """A config of two steps on the built-in scenes."""
    config = configs.load_recipe("quickstart")
    config.model.update(width=8, output_stride=32, bins=(1, 2))
    config.total_steps, config.batch_size = 2, 8
    config.every.log = 1
    return config


@slow
@pytest.mark.usefixtures("one_device")
def test_training_in_a_thread_and_an_event_loop(config, tmp_path):
    """A thread cannot catch signals; notebooks run their cells in an event loop."""
    given, found = config.to_json(), []

    async def cell():
        found.append(pspnet_jax.train(config, workdir=tmp_path / "run"))

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    [trained] = found
    assert (trained.workdir, trained.step) == (tmp_path / "run", 2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert trained.metrics["mean_iou"] == next(line["mean_iou"] for line in lines if line["kind"] == "eval")
    assert config.to_json() == given
    assert pspnet_jax.train(config, workdir=str(tmp_path / "run")) == trained  # it is finished
    assert pspnet_jax.load(trained.workdir)(picture(80, 192)).labels.shape == (80, 192)


@slow
def test_training_takes_the_name_of_a_recipe_and_refuses_others(config, tmp_path):
    with pytest.raises(MissingFileError, match="quickstrat: no such file or recipe; the recipes are ade20k, camvid, "):
        pspnet_jax.train("quickstrat")
    with pytest.raises(UserError, match=r"dataset\.root"):
        pspnet_jax.train("camvid", workdir=tmp_path)
    for wrong in (None, {"name": "quickstart"}):
        with pytest.raises(UserError, match="expected a config, or the name or path of a recipe"):
            pspnet_jax.train(wrong)
    config.total_steps = 0
    with pytest.raises(UserError, match="total_steps=0: expected"):
        pspnet_jax.train(configs.FrozenConfigDict(config), workdir=tmp_path)
    with pytest.raises(UserError, match="total_steps=0: expected more than 0"):
        pspnet_jax.train(config, workdir=tmp_path)
    with pytest.raises(UserError, match="config: the config lacks augment"):
        pspnet_jax.train(configs.ConfigDict({"name": "x"}))
    with config.unlocked():
        config.batchsize = 8
    with pytest.raises(UserError, match="config: unknown field batchsize"):
        pspnet_jax.train(config)
