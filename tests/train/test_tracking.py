"""Trackers get the config, the numbers and the pictures of a run, and a resumed run continues there."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average
from etils import epath

from pspnet_jax import validation
from pspnet_jax.errors import UserError
from pspnet_jax.train import tracking
from pspnet_jax.train.logs import TrainingLog
from tests.train import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # the packages' own
METRICS = {
    "mean_iou": np.float32(0.5),
    "classes": [{"name": "traffic light", "iou": 0.25}, {"name": "[void]", "iou": 0.75}, {"name": "never", "iou": None}],
}


def train(workdir, tracker, start):
    """Writes what a run logs that begins after step `start`, makes two steps and is evaluated."""
    config = tiny_config()
    config.name, config.track, config.seed = "mine", tracker, start
    log = TrainingLog(epath.Path(workdir), config, start, None, 0)
    for step in (start + 1, start + 2):
        log.add_step({"loss": Average(jnp.float32(step), jnp.int32(1))})
        log.log_progress(step)
    log.log_evaluation(start + 2, METRICS, {"street": np.full((2, 4, 3), (255, 0, 0), np.uint8)})
    log.close()


def test_the_trackers_are_the_choices_of_the_field():
    assert validation.CHOICES["track"] == ("", *tracking.TRACKERS)


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb writes to a folder of its name in the current directory."""
    (tmp_path / "tracker_without_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="its package is not installed"):
        tracking.require("tracker_without_package")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracking.require("")
    with pytest.raises(
        UserError, match=r"^track='mlflow': its package is not installed; run pip install 'pspnet_jax\[mlflow\]'$"
    ):
        tracking.require("mlflow")


@pytest.mark.parametrize("failing", ["__init__", "write_scalars", "write_images", "close"])
def test_training_continues_without_a_failing_tracker(tmp_path, monkeypatch, caplog, failing):
    class Tracker:
        id = "7"

        def __init__(self, *_):
            self.call("__init__")

        def call(self, method):
            if method == failing:
                raise ConnectionError("no route to host")

        def write_scalars(self, step, scalars):
            self.call("write_scalars")

        def write_images(self, step, images):
            self.call("write_images")

        def close(self):
            self.call("close")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Tracker)
    train(tmp_path, "wandb", 0)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "no route" in r.getMessage()]
    assert warned == ["logs of wandb cannot be written (no route to host); training goes on without them"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):
        train(tmp_path, "wandb", start)
    run = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}"), key=lambda folder: folder.stat().st_mtime)
    assert len(folders) == 2  # `wandb sync` joins them by the run's id
    for folder, step in zip(folders, (2, 4), strict=True):
        content = (folder / f"run-{run}.wandb").read_bytes()
        assert all(name in content for name in (b"mine", b"model.depth", b"train/loss", b"eval/iou/traffic light"))
        assert b"never" not in content
        assert len(list((folder / "files/media/images").glob(f"street_{step}_*.png"))) == 1


def test_mlflow_in_local_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for start in (0, 2):
        train(tmp_path / "run", "mlflow", start)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("pspnet_jax")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["model.depth"] == "18"
    assert run.data.params["seed"] == "0"  # as it began
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    found = {name: value for name, value in run.data.metrics.items() if name.startswith("eval/")}
    assert found == {"eval/mean_iou": 0.5, "eval/iou/traffic light": 0.25, "eval/iou/_void_": 0.75}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "images")]
