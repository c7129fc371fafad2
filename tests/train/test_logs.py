import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from pspnet_jax.train import clock as clocks
from pspnet_jax.train.clock import DataWait
from pspnet_jax.train.logs import Recorder, duration
from tests.train import score, tiny_config

# rows truth, columns prediction: IoU 3/5, 1/3 and none
SCALARS = {
    "loss": jnp.float32(1.5),
    "auxiliary_loss": jnp.float32(0.5),
    "gradient_norm": jnp.float32(0.25),
    "learning_rate": jnp.float32(0.125),
    "confusion": jnp.array([[3, 1, 0], [1, 1, 0], [0, 0, 0]]),
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    return now


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (75, "1:15"), (3599, "59:59"), (3700, "1:01:40"), (360000, "100:00:00")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_line_and_its_values(tmp_path, clock, caplog):
    recorder = Recorder(tmp_path, tiny_config(), 0, DataWait())
    clock[0] += 4.0  # for 2 steps of 8 images
    with caplog.at_level(logging.INFO, "pspnet_jax"):
        recorder.train(2, SCALARS)
    recorder.close()
    assert caplog.messages == ["step 2/12  loss 1.500  batch mIoU 46.7%  lr 0.12500  4.0 images/s  data wait 0%  0:20 left"]
    assert lines(tmp_path) == [
        {
            "step": 2,
            "kind": "train",
            "loss": 1.5,
            "auxiliary_loss": 0.5,
            "gradient_norm": 0.25,
            "learning_rate": 0.125,
            "mean_iou": pytest.approx((3 / 5 + 1 / 3) / 2),
            "images_per_second": 4.0,
            "data_wait": 0.0,
        }
    ]


def test_rates_at_the_end_of_each_epoch(tmp_path, clock):
    """20 examples, 8 a step: epochs end in the steps 3, 5, 8 and 10."""
    wait = DataWait()
    recorder = Recorder(tmp_path, tiny_config(), 0, wait, epoch=20)
    for step in range(1, 11):
        clock[0] += 2.0
        wait.seconds += 0.5 if step < 4 else 1.5
        if step == 2:
            clock[0] += 50.0
            recorder.evaluation(step, score({"params": {"classifier": {"kernel": np.ones(3)}}}), seconds=50.0)
        recorder.end_of_epoch(step)
    recorder.close()
    assert [line for line in lines(tmp_path) if line["kind"] == "epoch"] == [
        {"step": step, "kind": "epoch", "epoch": epoch, "data_wait": share, "images_per_second": 4.0}
        for step, epoch, share in ((3, 1, 0.25), (5, 2, 0.75), (8, 3, 0.75), (10, 4, 0.75))
    ]


def test_time_of_an_evaluation_is_not_the_steps(tmp_path, clock):
    recorder = Recorder(tmp_path, tiny_config(), 4, DataWait())
    clock[0] += 1.0
    recorder.train(5, SCALARS)
    clock[0] += 31.0  # 30 of them for the evaluation
    recorder.evaluation(5, score({"params": {"classifier": {"kernel": np.ones(3)}}}), seconds=30.0)
    recorder.train(6, SCALARS)
    recorder.close()
    assert [line.get("images_per_second") for line in lines(tmp_path) if line["kind"] == "train"] == [8.0, 8.0]


def test_the_compiling_step_does_not_count_in_the_rate(tmp_path, clock):
    recorder = Recorder(tmp_path, tiny_config(), 4, DataWait())
    clock[0] += 60.0
    recorder.restart_clock(5)
    clock[0] += 6.0  # for 3 steps of 8 images
    recorder.train(8, SCALARS)
    recorder.close()
    assert lines(tmp_path)[0]["images_per_second"] == 4.0


def test_evaluation_is_recorded_with_its_pictures(tmp_path):
    report = score({"params": {"classifier": {"kernel": np.array([0.25, 0.75])}}})
    recorder = Recorder(tmp_path, tiny_config(), 0, DataWait())
    recorder.evaluation(4, report, seconds=1.0)
    recorder.close()
    (line,) = lines(tmp_path)
    assert line == {"step": 4, "kind": "eval", **report.to_json()}
    assert (line["mean_iou"], line["classes"][2]["iou"]) == (0.5, None)
    with Image.open(tmp_path / "pictures" / "street.png") as picture:
        assert picture.size == (4, 2)
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_forgets_the_lines_after_its_checkpoint(tmp_path):
    """Also where it starts anew, with no checkpoint at all."""
    for start, expected in ((0, [1, 2, 3]), (2, [1, 2, 3, 4]), (0, [1])):
        recorder = Recorder(tmp_path, tiny_config(), start, DataWait())
        for step in range(start + 1, expected[-1] + 1):
            recorder.train(step, SCALARS)
        recorder.close()
        assert [line["step"] for line in lines(tmp_path)] == expected


def test_the_file_of_metrics_is_whole_at_any_time(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, tiny_config(), 0, DataWait())
    recorder.train(1, SCALARS)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        recorder.train(2, SCALARS)
    recorder.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
