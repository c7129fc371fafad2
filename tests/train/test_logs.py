import json
import logging
import time
from concurrent.futures import Future

import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average, LastValue
from etils import epath
from PIL import Image

from pspnet_jax.metrics import MeanIoU
from pspnet_jax.train import jsonlines, logs
from pspnet_jax.train.logs import InputStallTimer, TrainingLog
from tests.train import score, tiny_config

METRICS = {
    "loss": Average(jnp.float32(1.5), jnp.int32(1)),
    "gradient_norm": Average(jnp.float32(0.25), jnp.int32(1)),
    "learning_rate": LastValue(jnp.float32(0.125)),
    "mean_iou": MeanIoU(jnp.array([[3.0, 1, 0], [1, 1, 0], [0, 0, 0]])),  # rows are true classes: IoU 3/5, 1/3 and undefined
}
WEIGHTS = {"params": {"classifier": {"kernel": np.array([0.25, 0.75])}}}


def open_log(workdir, start=0, epoch=0):
    return TrainingLog(epath.Path(workdir), tiny_config(), start, None, epoch)


def log_step(log, step, metrics=METRICS):
    log.add_step(metrics)
    log.log_progress(step)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances when a test sets it."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    return now


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_progress_line_and_its_metrics(tmp_path, clock, caplog):
    log = open_log(tmp_path)
    clock[0] += 4.0  # for 2 steps of 8 images
    other = METRICS | {"loss": Average(jnp.float32(2.5), jnp.int32(1)), "learning_rate": LastValue(jnp.float32(0.0625))}
    with caplog.at_level(logging.INFO, "pspnet_jax"):
        log.add_step(METRICS)
        log_step(log, 2, other)
    log.close()
    assert caplog.messages == ["step 2/12  loss 2.000  batch mIoU 46.7%  lr 0.06250  4.0 images/s  data wait 0%  0:00:20 left"]
    assert lines(tmp_path) == [
        {
            "step": 2,
            "kind": "train",
            "loss": 2.0,
            "gradient_norm": 0.25,
            "learning_rate": 0.0625,
            "mean_iou": pytest.approx((3 / 5 + 1 / 3) / 2),
            "images_per_second": 4.0,
            "data_wait": 0.0,
        }
    ]


def test_rates_at_the_end_of_each_epoch(tmp_path, clock):
    """20 examples, 8 per step: epochs end in steps 3, 5, 8 and 10."""
    log = open_log(tmp_path, epoch=20)
    for step in range(1, 11):
        clock[0] += 2.0
        log.stalls.seconds += 0.5 if step < 4 else 1.5
        if step == 2:
            clock[0] += 50.0
            log.exclude_time(50.0)
            log.log_evaluation(step, *score(WEIGHTS))
        log.end_of_epoch(step)
    log.close()
    assert [line for line in lines(tmp_path) if line["kind"] == "epoch"] == [
        {"step": step, "kind": "epoch", "epoch": epoch, "data_wait": share, "images_per_second": 4.0}
        for step, epoch, share in ((3, 1, 0.25), (5, 2, 0.75), (8, 3, 0.75), (10, 4, 0.75))
    ]


def test_rates_exclude_the_time_of_an_evaluation(tmp_path, clock):
    log = open_log(tmp_path, start=4)
    clock[0] += 1.0
    log_step(log, 5)
    clock[0] += 31.0  # 30 of them for the evaluation
    log.exclude_time(30.0)
    log.log_evaluation(5, *score(WEIGHTS))
    log_step(log, 6)
    log.close()
    assert [line.get("images_per_second") for line in lines(tmp_path) if line["kind"] == "train"] == [8.0, 8.0]


def test_rates_exclude_the_step_that_includes_compilation(tmp_path, clock):
    log = open_log(tmp_path, start=4)
    clock[0] += 60.0
    log.restart_clocks(5)
    clock[0] += 6.0  # for 3 steps of 8 images
    log_step(log, 8)
    log.close()
    assert lines(tmp_path)[0]["images_per_second"] == 4.0


def test_an_evaluation_is_written_with_its_pictures(tmp_path):
    metrics, pictures = score(WEIGHTS)
    log = open_log(tmp_path)
    log.log_evaluation(4, metrics, pictures)
    log.close()
    (line,) = lines(tmp_path)
    assert line == {"step": 4, "kind": "eval", **metrics}
    assert (line["mean_iou"], line["classes"][0]["iou"]) == (0.5, None)
    with Image.open(tmp_path / "pictures" / "street.png") as picture:
        assert picture.size == (4, 2)
        assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    """Also if it starts over because there is no checkpoint."""
    for start, expected in ((0, [1, 2, 3]), (2, [1, 2, 3, 4]), (0, [1])):
        log = open_log(tmp_path, start)
        for step in range(start + 1, expected[-1] + 1):
            log_step(log, step)
        log.close()
        assert [line["step"] for line in lines(tmp_path)] == expected


def test_each_line_of_metrics_is_appended_at_once(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 4):
        log_step(log, step)
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    log_step(log, 4)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    log.close()


GOOD = [b'{"step": 1, "kind": "train", "loss": 2.0}', b'{"step": 2, "kind": "train", "loss": 1.5}']


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (b"%b\n%b\n" + b'{"step": 3, "kind": "tr', [b'{"step": 3, "kind": "tr']),
        (b"\x00\x89PNG\x00\x1a\n%b\n%b\n", [b"\x00\x89PNG\x00\x1a"]),
        (b"\n%b\n\n \n%b\n\n", []),
        (b"%b\n" + b'{"kind": "train"}\n' + b'{"step": "4"}\n%b\n', [b'{"kind": "train"}', b'{"step": "4"}']),
        (b"%b\n[1, 2]\n3\nnull\n%b\n", [b"[1, 2]", b"3", b"null"]),
        (
            b"%b\n" + '{"step": 2, "k": "gr\xfcn"}'.encode("latin-1") + b"\n%b\n",
            ['{"step": 2, "k": "gr\xfcn"}'.encode("latin-1")],
        ),
        (b"%b\n" + b"[" * 100_000 + b"\n%b\n", [b"[" * 100_000]),
        (b"%b\n%b", []),
    ],
    ids=[
        "partial line",
        "binary",
        "empty lines",
        "no step",
        "not an object",
        "latin-1",
        "too deep",
        "no line break at the end",
    ],
)
def test_damaged_lines_are_set_aside_and_the_good_ones_kept(tmp_path, caplog, content, damaged):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    path.write_bytes(content % tuple(GOOD))
    log = open_log(tmp_path, start=2)
    log_step(log, 3)
    log.close()
    assert path.read_bytes().splitlines()[:2] == GOOD
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert (aside.read_bytes().splitlines() if aside.exists() else []) == damaged
    expected = [f"{path}: moved {len(damaged)} damaged line(s) to metrics.damaged.jsonl and kept the others"] if damaged else []
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == expected


def test_the_lines_of_a_run_without_a_checkpoint_are_moved_to_another_file(tmp_path, caplog):
    """The run may have been killed early, or its checkpoints may be on a disk that is not mounted."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(GOOD) + b"\n")
    log = open_log(tmp_path)
    log_step(log, 1)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert (tmp_path / "metrics.earlier.jsonl").read_bytes().splitlines() == GOOD
    assert "there is no checkpoint, so training starts over; moved the earlier lines of" in caplog.text


def test_resuming_appends_to_the_file_without_rewriting_it(tmp_path):
    log = open_log(tmp_path)
    log_step(log, 1)
    log.close()
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    log = open_log(tmp_path, start=1)
    log_step(log, 2)
    log.close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_in_a_bucket_lines_are_written_when_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines.files, "is_remote", lambda path: True)
    log = open_log(tmp_path)
    log_step(log, 1)
    log_step(log, 2)
    assert not (tmp_path / "metrics.jsonl").exists()
    log.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    log_step(log, 3)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def ended(at: float) -> Future:
    future: Future = Future()
    future.set_result(at)
    return future


@pytest.mark.parametrize(
    ("end", "expected"),
    [(ended(95.0), 10.0), (ended(107.0), 3.0), (Future(), 0.0), (None, 0.0)],
    ids=["idle before", "idle during the wait", "still busy", "no step yet"],
)
def test_stall_of_a_batch_requested_at_100_s_and_received_at_110_s(monkeypatch, end, expected):
    """Only the time in which the devices are idle counts as a stall."""
    stalls = InputStallTimer()
    now = iter([100.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(now))
    stalls._ended = end
    assert list(stalls.timed([{"a": 1}])) == [{"a": 1}]
    assert stalls.seconds == expected
    stalls.close()


def test_a_slow_source_stalls_and_a_fast_one_does_not():
    def slow():
        for _ in range(3):
            time.sleep(0.05)
            yield {}

    for source, least, most in ((slow(), 0.08, 0.2), ([{}] * 3, 0.0, 0.02)):
        stalls = InputStallTimer()
        for _ in stalls.timed(source):
            stalls.step_started(METRICS)
        stalls.close()
        print(f"waited {stalls.seconds:.3f} s")
        assert least <= stalls.seconds <= most
