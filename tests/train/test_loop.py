import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average

from pspnet_jax import config as configs
from pspnet_jax import parallel
from pspnet_jax.errors import UserError
from pspnet_jax.train import loop
from pspnet_jax.train.checkpoint import Checkpoints, load
from pspnet_jax.train.loop import NonFiniteGuard, due
from tests.train import OneLayer, fit, make_batch, make_batches, score, tiny_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]

# Trains the tiny run in a subprocess. At the given batch, which is loaded up to three steps in advance, it either waits to be
# killed or sends itself SIGTERM.
SCRIPT = """
import os, signal, sys, time
from tests.train import fit, make_batches, score, tiny_config

workdir, event, at = sys.argv[1], sys.argv[2], int(sys.argv[3])

def batches(start):
    for step, batch in enumerate(make_batches(start), start):
        if step == at:
            time.sleep(600) if event == "wait" else os.kill(os.getpid(), signal.SIGTERM)
        yield batch

fit(tiny_config(), batches, score, workdir)
"""


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_steps(workdir):
    return [line["step"] for line in read_metrics(workdir) if line["kind"] == "train"]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_equal(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of all 12 steps without interruption."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return SimpleNamespace(workdir=workdir, state=fit(tiny_config(), make_batches, score, workdir))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, uninterrupted):
    """The same run, killed after step 5 (saved: 4), resumed, stopped by SIGTERM in step 6 or 7, resumed and finished."""
    workdir = tmp_path_factory.mktemp("interrupted")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(workdir)]
    history = SimpleNamespace(workdir=workdir)

    with subprocess.Popen([*command, "wait", "7"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not ((workdir / "checkpoints" / "4").exists() and 5 in train_steps(workdir)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    history.saved_when_killed, history.steps_when_killed = saved_steps(workdir), train_steps(workdir)

    stopped = subprocess.run([*command, "terminate", "8"], env=environment, capture_output=True, text=True, timeout=300)
    history.exit_code, history.stderr = stopped.returncode, stopped.stderr
    history.saved_when_stopped, history.steps_when_stopped = saved_steps(workdir), train_steps(workdir)

    history.state = fit(tiny_config(), make_batches, score, workdir)
    return history


def test_due():
    assert [step for step in range(1, 11) if due(step, 4, total=10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 5, total=10)] == [5, 10]
    assert [step for step in range(1, 11) if due(step, 0, total=10)] == [10]


def test_an_interrupted_run_ends_in_exactly_the_state_of_an_uninterrupted_one(interrupted, uninterrupted):
    """Bit for bit, including BatchNorm statistics, momentum and moving average."""
    assert interrupted.saved_when_killed == [4]
    assert interrupted.steps_when_killed[:5] == [1, 2, 3, 4, 5]
    assert_equal(interrupted.state, uninterrupted.state)


def test_sigterm_saves_the_step_and_exits(interrupted):
    assert interrupted.exit_code == 143, interrupted.stderr
    saved = interrupted.saved_when_stopped[-1]
    assert saved == interrupted.steps_when_stopped[-1]
    assert saved in (6, 7)  # when no save was due
    assert f"stopped by SIGTERM; step {saved} is saved; run the same command to resume" in interrupted.stderr


def test_metrics_have_each_step_once_after_interruptions(interrupted, uninterrupted):
    def values(workdir):
        times = {"images_per_second", "data_wait"}
        return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(workdir)]

    assert values(interrupted.workdir) == values(uninterrupted.workdir)


def test_the_files_of_a_run(uninterrupted):
    workdir = uninterrupted.workdir
    expected = [
        ("train", step) if kind else ("eval", step) for step in range(1, 13) for kind in (1, 0) if kind or step in (8, 12)
    ]
    lines = read_metrics(workdir)
    assert [(line["kind"], line["step"]) for line in lines] == expected
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "parameters.txt",
        "pictures",
    }
    assert configs.read(workdir / "config.json").to_dict() == tiny_config().to_dict()
    assert "backbone/stem_conv1/conv/kernel" in (workdir / "parameters.txt").read_text()


def test_evaluation_uses_the_moving_average_and_selects_the_best_checkpoint(uninterrupted):
    scores = {line["step"]: line["mean_iou"] for line in read_metrics(uninterrupted.workdir) if line["kind"] == "eval"}
    assert scores[12] == score(uninterrupted.state.ema)[0]["mean_iou"]
    best = max(scores, key=lambda step: scores[step])
    assert Checkpoints(uninterrupted.workdir).find("best") == best
    assert saved_steps(uninterrupted.workdir) == [8, 12]


def test_a_finished_run_is_not_changed(uninterrupted, tmp_path, caplog):
    shutil.copytree(uninterrupted.workdir, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "metrics.jsonl").read_text()
    config = tiny_config()
    config.batch_size = 16
    with caplog.at_level(logging.INFO, "pspnet_jax"):
        assert_equal(fit(config, lambda start: [make_batch(start, 16)], score, tmp_path), uninterrupted.state)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert configs.read(tmp_path / "config.json").batch_size == 8  # as it ran
    assert "resuming with a changed config: batch_size: 8 -> 16" in caplog.messages
    assert f"{tmp_path} holds a finished run, step 12 of 12; delete it to start over" in caplog.messages


@pytest.mark.parametrize(("images", "level"), [(16, logging.INFO), (8, logging.WARNING)])
def test_the_batchnorm_batch_size_is_logged(uninterrupted, tmp_path, caplog, images, level):
    config = tiny_config()
    config.batch_size = images
    with caplog.at_level(logging.INFO, "pspnet_jax"):
        loop._log_summary(config, uninterrupted.state, parallel.make_mesh(), tmp_path, 0)
    (logged,) = [record for record in caplog.records if "BatchNorm sees" in record.message]
    assert logged.levelno == level
    assert logged.message.startswith(f"BatchNorm sees {images} images")
    assert ("fewer than 16 give worse results" in logged.message) == (images < 16)


def test_a_workdir_with_another_network_is_refused_and_not_changed(uninterrupted):
    config = tiny_config()
    config.model.stem = "conv7"
    with pytest.raises(ValueError, match=r"model\.stem: 'deep' -> 'conv7'"):
        fit(config, make_batches, score, uninterrupted.workdir)
    assert configs.read(uninterrupted.workdir / "config.json").model.stem == "deep"
    assert saved_steps(uninterrupted.workdir)[-1] == 12


def test_nan_stops_the_run_and_is_never_saved(tmp_path):
    """The loss is NaN at step 4, which has invalid labels and at which a checkpoint is due."""
    config = tiny_config()
    config.every.save = 2

    def batches(start):
        for step, batch in enumerate(make_batches(start), start + 1):
            yield batch if step != 4 else batch | {"label": np.full_like(batch["label"], 200)}

    message = (
        "the loss is nan and .* at step 4; the newest checkpoint is step 2; .*; try a lower optimizer.learning_rate, .*; "
        r"if you supply the batches, check that all labels are 0 to K-1 \(for K classes\) or 255"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(config, batches, None, tmp_path)
    assert saved_steps(tmp_path) == [2]
    _, _, variables = load(tmp_path, "latest", parallel.make_mesh(jax.devices()[:1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


IMAGE, LABEL = (make_batch(0)[name] for name in ("image", "label"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.float32(IMAGE) / 255}, r"image is float32\[8, 33, 33, 3\]; expected uint8\[N, H, W, 3\], not normalized"),
        ({"image": np.int32(IMAGE)}, r"image is int32\[8, 33, 33, 3\]; expected uint8"),
        ({"image": IMAGE.transpose(0, 3, 1, 2)}, r"image is uint8\[8, 3, 33, 33\]; expected uint8"),
        ({"image": IMAGE[0]}, r"image is uint8\[33, 33, 3\]; expected uint8"),
        (
            {"image": IMAGE[:4], "label": LABEL[:4]},
            r"image is .*; expected 8 examples along the first axis, this process's share of batch_size=8",
        ),
        ({"label": LABEL[:1]}, r"label is .*; expected 8 examples"),
        ({"depth": np.float32(3)}, r"depth is float32\[\]; expected 8 examples"),
        ({"label": np.float32(LABEL)}, r"label is float32\[8, 33, 33\]; expected integers"),
        ({"label": LABEL[:, :32]}, r"label is uint8\[8, 32, 33\]; expected \[N, 33, 33\], the size of the images"),
        ({"label": LABEL.tolist()}, r"label is a list; expected a NumPy array"),
    ],
)
def test_a_wrong_batch_is_refused_before_compilation(tmp_path, change, message):
    with pytest.raises(UserError, match=f"the first batch's {message}"):
        fit(tiny_config(), lambda start: [make_batch(0) | change], None, tmp_path, model=OneLayer())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_bad_example_loses_no_step_before_it(tmp_path, uninterrupted):
    def batches(start):
        yield from itertools.islice(make_batches(start), 7)
        raise UserError("x.png: label value 9")

    config = tiny_config()
    config.every.eval = config.every.save = 100
    with pytest.raises(ValueError, match="label value 9"):
        fit(config, batches, None, tmp_path)
    (saved,) = saved_steps(tmp_path)
    assert saved == 7  # the seven batches before it are yielded first
    assert_equal(fit(config, make_batches, None, tmp_path), uninterrupted.state)


@pytest.mark.parametrize(("loss", "norm", "message"), [(np.inf, 1.0, "loss is inf.*"), (1.0, np.nan, "loss is 1.0.* norm nan")])
def test_the_guard_checks_loss_and_gradient_one_step_late(loss, norm, message):
    def metrics(loss, norm):
        return {"loss": Average(jnp.float32(loss), jnp.int32(1)), "gradient_norm": Average(jnp.float32(norm), jnp.int32(1))}

    guard = NonFiniteGuard(SimpleNamespace(steps=[]))
    for step in (1, 2):
        guard.record(step, metrics(1.0, 1.0))
    guard.record(3, metrics(loss, norm))
    with pytest.raises(FloatingPointError, match=f"{message} at step 3; no checkpoint was saved before"):
        guard.finish()
    guard.finish()  # raises only once


def test_the_sigterm_handler_is_restored_after_training(uninterrupted):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_importing_model_and_loop_does_not_import_tensorflow():
    code = "import sys, pspnet_jax.train.loop, pspnet_jax.models; print([m for m in sys.modules if m.startswith('tensorflow')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "[]\n"


def test_hooks_and_writer_are_called_and_an_unknown_best_metric_is_an_error(tmp_path):
    class Writer:
        def __init__(self):
            self.scalars, self.images, self.closed = {}, {}, False

        def write_scalars(self, step, scalars):
            self.scalars.setdefault(step, {}).update(scalars)

        def write_images(self, step, images):
            self.images[step] = images

        def close(self):
            self.closed = True

    config, writer, steps = tiny_config(), Writer(), []
    config.total_steps = 2
    config.every.update(log=2, save=2, eval=2)
    fit(config, make_batches, score, tmp_path / "a", writer=lambda logdir: writer, hooks=[steps.append])
    assert steps == [1, 2]
    assert list(writer.scalars) == [2]
    assert {"train/loss", "train/cross_entropy", "train/learning_rate", "eval/mean_iou"} <= set(writer.scalars[2])
    assert writer.images[2]["street"].shape == (1, 2, 4, 3)
    assert writer.closed
    config.eval.best_metric = "f1"
    with pytest.raises(UserError, match=r"eval.best_metric='f1': the evaluation has mean_iou, .*, iou/car; choose"):
        fit(config, make_batches, score, tmp_path / "b")


def test_batches_that_end_too_early_are_an_error(tmp_path):
    with pytest.raises(UserError, match="the batches ended after step 3, before total_steps=12"):
        fit(tiny_config(), lambda start: itertools.islice(make_batches(start), 3), None, tmp_path)
    assert saved_steps(tmp_path) == [3]
    with pytest.raises(UserError, match="there is no batch to train on"):
        fit(tiny_config(), lambda start: iter(()), None, tmp_path / "other")


def test_progress_lines_average_all_steps_since_the_last_one(uninterrupted, tmp_path):
    """With a line every four steps, its loss is the mean of four lines of a run that logs every step."""
    config = tiny_config()
    config.every.update(log=4, eval=0)
    fit(config, make_batches, None, tmp_path)
    each = [line["loss"] for line in read_metrics(uninterrupted.workdir) if line["kind"] == "train"]
    means = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    np.testing.assert_allclose(means, np.reshape(each, (3, 4)).mean(1), rtol=1e-6)
