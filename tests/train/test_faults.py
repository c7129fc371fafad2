"""Failures around training (storage, evaluation, signals, user code) lose no training steps."""

import itertools
import json
import logging
import re
import resource
import shutil
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest

from pspnet_jax import config as configs
from pspnet_jax import parallel
from pspnet_jax.errors import UserError
from pspnet_jax.optimizers import Optimizer
from pspnet_jax.train import checkpoint, layout, stop
from pspnet_jax.train.checkpoint import Checkpoints
from tests.train import OneLayer, fit, make_batch, make_batches, score, tiny_config

pytestmark = pytest.mark.slow


def train(config, workdir, evaluate=score, **more):
    return fit(config, make_batches, evaluate, workdir, model=OneLayer(), **more)


def small(**every):
    """Returns a config of six steps that saves every second step and evaluates every third."""
    config = tiny_config()
    config.total_steps = 6
    config.every.update({"log": 1, "save": 2, "eval": 3} | every)
    return config


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("pspnet_jax")]


def saved_steps(workdir):
    return Checkpoints(workdir, read_only=True).steps


def assert_equal(state, other):
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state after six undisturbed steps."""
    return train(small(), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "error",
    [
        UserError("munich_7.png: is damaged"),
        OSError(5, "Input/output error"),
        MemoryError("out of memory"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_evaluation_loses_no_step(tmp_path, caplog, whole, error):
    def evaluate(variables):
        raise error

    with pytest.raises(
        UserError, match=r"step 6 could not be evaluated .*, but it is saved; run the same command to evaluate it again"
    ):
        train(small(), tmp_path, evaluate)
    (message,) = [line for line in warnings(caplog) if "could not be evaluated" in line]
    assert message.startswith("step 3 could")
    assert str(error).partition("] ")[2] in message
    assert saved_steps(tmp_path) == [4, 6]
    assert_equal(train(small(), tmp_path), whole)


def test_the_state_is_saved_before_it_is_evaluated(tmp_path):
    seen = []

    def evaluate(variables):
        seen.append(max(int(path.name.split(".")[0]) for path in (tmp_path / "checkpoints").iterdir()))
        return score(variables)

    train(small(), tmp_path, evaluate)
    assert seen == [3, 6]


@pytest.mark.parametrize(
    "pictures",
    [{"x" * 300: np.zeros((2, 2, 3), np.uint8)}, {"a": np.zeros((2, 2, 7))}, {"a/b/\0": np.zeros((2, 2, 3), np.uint8)}],
    ids=["name too long", "wrong shape", "invalid name"],
)
def test_a_picture_that_cannot_be_written_is_a_warning_and_the_score_is_kept(tmp_path, caplog, pictures):
    train(small(), tmp_path, lambda variables: ({"mean_iou": 0.5}, pictures))
    assert len([line for line in warnings(caplog) if line.startswith("the picture ")]) == 2
    assert Checkpoints(tmp_path).find("best") == 3  # of equal scores, the first


@pytest.mark.parametrize("at", [3, 6])
def test_a_stop_signal_ends_an_evaluation_which_is_repeated_on_resume(tmp_path, caplog, whole, at):
    calls = itertools.count(1)

    def slow(variables):
        if 3 * next(calls) == at:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(600)
        return score(variables)

    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train(small(), tmp_path, slow)
    assert stopped.value.code == 143
    assert time.monotonic() - began < 60
    assert saved_steps(tmp_path)[-1] == at
    assert f"stopped by SIGTERM; step {at} is saved; run the same command to resume" in warnings(caplog)
    assert_equal(train(small(), tmp_path), whole)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(Checkpoints(tmp_path).scores.of(step) for step in {3, 6} & set(saved_steps(tmp_path)))


def test_scores_with_different_settings_are_not_compared(tmp_path, caplog):
    scores = iter([0.75, 0.25, 0.5, 0.125])

    def evaluate(variables):
        return {"mean_iou": next(scores)}, {}

    config = small(save=3)
    config.total_steps = 6
    train(config, tmp_path, evaluate)
    assert Checkpoints(tmp_path).find("best") == 3
    config.total_steps, config.eval.split = 12, "test"
    train(config, tmp_path, evaluate)
    (message,) = [line for line in warnings(caplog) if "cannot be compared" in line]
    assert "eval.split: 'val' -> 'test'" in message
    assert Checkpoints(tmp_path).find("best") == 9


def test_a_finished_run_keeps_its_config_and_logs_differences(tmp_path, caplog):
    train(small(), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = small()
    config.optimizer.learning_rate = 0.25
    train(config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert "resuming with a changed config: optimizer.learning_rate: 0.5 -> 0.25" in warnings(caplog)


def test_the_config_is_written_only_after_a_successful_step(tmp_path):
    config = small()
    config.total_steps = 2
    train(config, tmp_path)
    config.total_steps, config.batch_size = 4, 3
    with pytest.raises(ValueError, match="axis 0 is partitioned 8 times"):  # eight devices cannot share three images
        fit(config, lambda start: itertools.repeat(make_batch(0, 3)), None, tmp_path, model=OneLayer())
    assert configs.read(tmp_path / "config.json").batch_size == 8


def test_resuming_needs_neither_init_from_nor_config_json(tmp_path, whole):
    config = small()
    config.total_steps = 4
    train(config, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    config.total_steps, config.init_from = 6, str(tmp_path / "gone")
    train(config, tmp_path / "run")
    assert configs.read(tmp_path / "run" / "config.json").total_steps == 6


def test_changed_training_data_is_a_warning(tmp_path, caplog):
    config = small()
    config.total_steps = 2
    train(config, tmp_path, fingerprint="120 files, a1")
    config.total_steps = 4
    train(config, tmp_path, fingerprint="120 files, a1")
    assert not [line for line in warnings(caplog) if "training data" in line]
    config.total_steps = 6
    train(config, tmp_path, fingerprint="119 files, b2")
    (message,) = [line for line in warnings(caplog) if "training data" in line]
    assert message.startswith("training data has changed since step 4: ")
    assert "(fingerprint 120 files, a1 -> 119 files, b2)" in message


@pytest.fixture
def full_disk():
    """Yields a function that says whether the disk is full: files cannot grow beyond 64 bytes, in any library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]) if full else before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pytest replaces our hook
def test_a_full_disk_is_a_user_error_and_the_previous_checkpoint_is_kept(tmp_path, full_disk, caplog, capfd, whole):
    with pytest.raises(UserError) as error:
        train(small(), tmp_path, hooks=[lambda step: full_disk(step >= 3)])
    full_disk(False)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints: cannot be written (File too large); the newest complete checkpoint is step 3; "
        "free some space or fix the cause, then run the same command to resume"
    )
    assert "Traceback" not in caplog.text + capfd.readouterr().err  # from orbax
    assert saved_steps(tmp_path) == [2, 3]
    assert_equal(train(small(), tmp_path), whole)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 3, 4, 5, 6, 6]


def test_metrics_that_cannot_be_written_are_written_later(tmp_path, caplog, whole):
    """For two steps, a directory has the name of the file."""
    path = tmp_path / "metrics.jsonl"

    def hook(step):
        if step == 1:
            path.rename(tmp_path / "lines")
            path.mkdir()
        if step == 3:
            path.rmdir()
            (tmp_path / "lines").rename(path)

    assert_equal(train(small(), tmp_path, hooks=[hook]), whole)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 4, 5, 6, 6]
    (message,) = [line for line in warnings(caplog) if "metrics.jsonl: cannot be written" in line]
    assert "Is a directory" in message


def test_a_deleted_workdir_is_created_again(tmp_path, whole):
    workdir = tmp_path / "run"
    state = train(small(), workdir, hooks=[lambda step: shutil.rmtree(workdir) if step == 1 else None])
    assert_equal(state, whole)
    assert saved_steps(workdir)[-1] == 6


def test_a_workdir_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(UserError, match=r"run: cannot be written \(File exists\); choose another place"):
        train(small(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "notes"


def test_training_continues_without_a_failing_writer(tmp_path, caplog, whole):
    class Writer:
        def write_scalars(self, step, scalars):
            raise OSError(28, "No space left on device")

        def write_images(self, step, images): ...

        def close(self): ...

    assert_equal(train(small(), tmp_path, writer=lambda logdir: Writer()), whole)
    assert len([line for line in warnings(caplog) if line.startswith("TensorBoard files cannot be written")]) == 1


def test_a_failing_hook_loses_no_step(tmp_path):
    def hook(step):
        if step == 5:
            raise RuntimeError("no profile today")

    with pytest.raises(RuntimeError, match="no profile today"):
        train(small(), tmp_path, hooks=[hook])
    assert saved_steps(tmp_path)[-1] == 5


def test_batches_without_an_image_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"the batches have picture, label; expected an array named image"):
        fit(small(), lambda start: iter([{"picture": 1, "label": 2}]), None, tmp_path, model=OneLayer())


def test_training_in_a_thread_works_without_signals(tmp_path, caplog, whole):
    states = []
    with caplog.at_level(logging.INFO, "pspnet_jax"):
        thread = threading.Thread(target=lambda: states.append(train(small(), tmp_path)))
        thread.start()
        thread.join()
    assert_equal(states[0], whole)
    assert len([r for r in caplog.records if "cannot catch signals" in r.message]) == 1


def test_enabling_x64_changes_nothing(tmp_path, whole):
    config = small()
    with jax.enable_x64(True):
        for config.total_steps in (4, 6):
            state = train(config, tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    once = small()
    once.total_steps = 4
    train(once, tmp_path / "once")
    once.total_steps = 6
    assert_equal(train(once, tmp_path / "once"), state)


@pytest.mark.parametrize("seed", [-(2**31) - 1, 2**32, 2**63, 2**70])
def test_a_seed_that_jax_would_truncate_is_refused(tmp_path, seed):
    config = small()
    config.seed = seed
    with pytest.raises(UserError, match=rf"^seed={seed}: expected a whole number from -2147483648 to 4294967295$"):
        train(config, tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_in_the_background_is_repeated_after_the_next_step(tmp_path, full_disk, caplog, whole):
    hooks = [lambda step: time.sleep(2 * (step == 3)), lambda step: full_disk(step == 2)]
    assert_equal(train(small(save=3, eval=0, log=6), tmp_path, None, hooks=hooks), whole)
    messages = [line for line in warnings(caplog) if line.startswith("checkpoint ")]
    assert messages == ["checkpoint 3 could not be written (File too large); saving again"]
    assert saved_steps(tmp_path) == [4, 6]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_failed_saves_in_a_row_end_the_run(tmp_path, full_disk, whole):
    steps = []
    hooks = [steps.append, lambda step: time.sleep(step in (2, 4, 5)), lambda step: full_disk(step >= 3)]
    message = r"cannot be written \(File too large\); the newest complete checkpoint is step 2; free some space"
    with pytest.raises(UserError, match=message):
        train(small(save=2, eval=0), tmp_path, None, hooks=hooks)
    full_disk(False)
    assert steps == [1, 2, 3, 4, 5]
    assert_equal(train(small(), tmp_path), whole)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    train(small(), tmp_path)
    (tmp_path / "checkpoints/6").rename(tmp_path / "checkpoints/5")
    with pytest.raises(UserError, match=r"checkpoints/5: was saved as step 6; rename it to 6"):
        train(small(), tmp_path)
    with pytest.raises(UserError, match="was saved as step 6"):
        checkpoint.load(tmp_path, "latest", parallel.make_mesh())


def test_an_evaluation_repeated_for_a_missing_score_has_one_line_in_the_metrics(tmp_path, whole):
    """As after a kill between writing the line and the score."""
    train(small(), tmp_path)
    (tmp_path / "checkpoints/6/score.json").unlink()
    assert_equal(train(small(), tmp_path), whole)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6]
    assert (tmp_path / "checkpoints/6/score.json").exists()


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_lost_manifest_and_an_invalid_score_are_warnings(tmp_path, caplog, whole, content):
    train(small(eval=6), tmp_path)
    (tmp_path / "checkpoints/6/sha256/metadata").write_text(content)
    (tmp_path / "checkpoints/6/score.json").write_text('{"score": 1, "settings": []}')
    assert_equal(train(small(eval=6), tmp_path), whole)
    messages = " ".join(warnings(caplog))
    assert "checkpoint 6 has lost its manifest: damage to its values would not be detected" in messages
    assert "the score of checkpoint 6 cannot be read" in messages


def test_a_directory_in_place_of_a_file_is_a_user_error(tmp_path):
    (tmp_path / "parameters.txt").mkdir()
    with pytest.raises(UserError, match="directory"):
        train(small(), tmp_path)


@pytest.mark.parametrize("name", ["run[1]", "run\\1"])
def test_workdir_names_with_glob_characters_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="orbax cannot write to a path that contains"):
        train(small(), tmp_path / name)


def test_further_signals_do_not_disturb_the_save(tmp_path, monkeypatch, whole):
    """Launchers may signal both the process and its group, and repeat signals."""
    save = Checkpoints.save

    def save_and_signal(*arguments):
        save(*arguments)
        signal.raise_signal(signal.SIGTERM)

    def twice(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(stop, "SAME_SIGNAL_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "save", save_and_signal)
    with pytest.raises(SystemExit) as stopped:
        train(small(save=6, eval=0), tmp_path, None, hooks=[twice])
    monkeypatch.undo()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert saved_steps(tmp_path) == [4]
    assert_equal(train(small(save=6, eval=0), tmp_path, None), whole)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_second_interrupt_stops_at_once_but_not_if_it_is_that_of_the_group(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(stop, "SAME_SIGNAL_SECONDS", seconds)

    def twice(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    try:
        with pytest.raises(SystemExit if seconds else KeyboardInterrupt):
            train(small(save=2, eval=0), tmp_path, None, hooks=[twice])
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved_steps(tmp_path) == ([2, 4] if seconds else [2])


def test_a_checkpoint_that_training_replaces_during_reading(tmp_path, monkeypatch):
    train(small(), tmp_path)
    read = layout.read_variables

    def replace_and_read(directory, mesh):
        if directory.name == "6":
            shutil.copytree(tmp_path / "checkpoints/6", tmp_path / "checkpoints/8")
            data = tmp_path / "checkpoints/8/data/metadata"
            data.write_text(data.read_text().replace('"step": 6', '"step": 8'))
            (tmp_path / "checkpoints/8/sha256/metadata").unlink()
            shutil.rmtree(directory)
        return read(directory, mesh)

    monkeypatch.setattr(layout, "read_variables", replace_and_read)
    assert checkpoint.load(tmp_path, "latest", parallel.make_mesh())[1] == 8


def test_an_import_that_was_interrupted_can_be_repeated(tmp_path):
    state = train(small(), tmp_path / "run")
    (tmp_path / "imported/checkpoints/0.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoint.create_run(tmp_path / "imported", small(), state)
    with pytest.raises(UserError, match="already holds a run"):
        checkpoint.create_run(tmp_path / "imported", small(), state)


def test_scores_on_different_data_are_not_compared(tmp_path, caplog):
    def scored(value, data):
        return lambda variables: ({"mean_iou": value, "data": data}, {})

    config = small(eval=2)
    config.total_steps = 4
    train(config, tmp_path, scored(0.9, "before"))
    config.total_steps = 6
    train(config, tmp_path, scored(0.1, "after"))
    assert Checkpoints(tmp_path, read_only=True).best() == 6
    assert "the evaluation data has changed: the best checkpoint is chosen among those scored from step 6 on" in warnings(
        caplog
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_before_its_evaluation_is_repeated(tmp_path, full_disk, caplog, whole):
    def evaluate(variables):
        time.sleep(1)
        full_disk(False)
        return score(variables)

    assert_equal(train(small(save=6), tmp_path, evaluate, hooks=[lambda step: full_disk(step == 2)]), whole)
    assert saved_steps(tmp_path) == [3, 6]
    assert "checkpoint 3 could not be written (File too large); saving again" in warnings(caplog)


@pytest.mark.parametrize("name", ["config.json", "parameters.txt"])
@pytest.mark.parametrize("content", ['{"architectures": ["Bert"]}', "[]", "not JSON"])
def test_foreign_files_are_not_overwritten(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: already exists and was not written by this program; choose another"):
        train(small(), tmp_path)
    assert (tmp_path / name).read_text() == content


def test_names_from_an_evaluation_cannot_overwrite_fields_or_escape_the_workdir(tmp_path, caplog):
    def evaluate(variables):
        return {"mean_iou": np.float32(0.5), "step": 99, "kind": 7}, {"../../escaped": np.zeros((4, 5, 3), np.uint8)}

    train(small(), tmp_path / "a/b", evaluate)
    assert not list(tmp_path.rglob("escaped*"))
    assert "the picture '../../escaped' cannot be written (its name contains a directory); training goes on" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "a/b/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6]


def test_an_optimizer_without_a_state_is_saved_and_resumed(tmp_path):
    optimizer = Optimizer(optax.scale(-0.01), {})
    state = fit(small(), make_batches, None, tmp_path, model=OneLayer(), optimizer=optimizer)
    shutil.rmtree(tmp_path / "checkpoints/6")
    assert_equal(fit(small(), make_batches, None, tmp_path, model=OneLayer(), optimizer=optimizer), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch | {"image": batch["image"] / np.float32(255)}, "'image': 'float32[8, ...]'"),
        (lambda batch: {name: array[:4] for name, array in batch.items()}, "'image': 'uint8[4, ...]'"),
        (lambda batch: {"image": batch["image"]}, "{'image': 'uint8[8, ...]'}, but"),
    ],
)
def test_a_later_batch_of_another_format_is_refused_and_the_steps_before_it_are_saved(tmp_path, change, message):
    def batches(start):
        for step, batch in enumerate(make_batches(start), start + 1):
            yield change(batch) if step == 5 else batch

    with pytest.raises(UserError, match=re.escape(message)):
        fit(small(save=6, eval=0), batches, None, tmp_path, model=OneLayer())
    assert saved_steps(tmp_path) == [4]


def test_a_batch_without_labels_is_a_warning_once(tmp_path, caplog):
    def batches(start):
        return ({**batch, "label": np.full_like(batch["label"], 255)} for batch in make_batches(start))

    fit(small(eval=0), batches, None, tmp_path, model=OneLayer())
    assert [line for line in warnings(caplog) if "the gradient of step 1 is 0, so nothing is learned" in line] != []
    assert sum("nothing is learned" in line for line in warnings(caplog)) == 1


def test_random_numbers_do_not_depend_on_the_environment(tmp_path, whole):
    with jax.default_prng_impl("rbg"):
        assert_equal(train(small(), tmp_path), whole)
