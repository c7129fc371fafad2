"""Training stops when the metric that selects the best checkpoint has not improved for `patience` evaluations."""

import itertools
import logging
import math
from types import SimpleNamespace

import pytest

from pspnet_jax.errors import UserError
from pspnet_jax.train import loop
from pspnet_jax.train.checkpoint import Checkpoints
from tests.train import OneLayer, fit, make_batches, tiny_config

pytestmark = pytest.mark.slow

SCORES = (None, 0.6, 0.6, 0.55, 0.7)  # at steps 2, 4, ..., 10; undefined at first, and the second 0.6 is no improvement


def patient(patience):
    """Returns a config of ten steps that evaluates every second step, and selects the best checkpoint by a class."""
    config = tiny_config()
    config.total_steps, config.patience, config.eval.best_metric = 10, patience, "iou/traffic light"
    config.every.update(log=4, save=3, eval=2)
    return config


def train(workdir, config, scores, batches=make_batches):
    """Trains with evaluations that return these scores; returns the last step and the number of evaluations."""
    remaining = iter(scores)

    def evaluate(variables):
        return {"mean_iou": 0.5, "classes": [{"name": "traffic light", "iou": next(remaining), "pixels": 3}]}, {}

    state = fit(config, batches, evaluate, workdir, model=OneLayer())
    return state.step, len(scores) - len(list(remaining))


def test_a_run_stops_early_is_saved_and_can_be_resumed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pspnet_jax")
    assert train(tmp_path, patient(2), SCORES) == (8, 4)
    undefined = [message for message in caplog.messages if "'iou/traffic light' has no value" in message]
    assert [message.count("at step 2,") for message in undefined] == [1]
    stopped = (
        "stopped early: the best iou/traffic light is that of 4 steps ago, with patience=2 and every.eval=2; step 8 is saved"
    )
    assert caplog.messages[-1].startswith(stopped)
    assert Checkpoints(tmp_path).steps == [4, 6, 8]  # the best and the latest two
    assert Checkpoints(tmp_path).find("best") == 4
    caplog.clear()
    assert train(tmp_path, patient(2), SCORES) == (8, 0)  # the same command changes nothing
    assert caplog.messages[-1].startswith(stopped)
    assert train(tmp_path, patient(3), SCORES[4:]) == (10, 1)
    assert Checkpoints(tmp_path).find("best") == 10


def test_scores_of_other_settings_do_not_stop_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pspnet_jax")
    assert train(tmp_path, patient(2), SCORES) == (8, 4)
    config = patient(1)
    config.eval.best_metric = "mean_iou"
    assert train(tmp_path, config, SCORES[4:]) == (10, 1)


def test_an_interrupted_run_stops_at_the_same_step(tmp_path):
    def batches(start):
        yield from itertools.islice(make_batches(start), 7 - start)
        raise UserError("a damaged image")

    with pytest.raises(UserError, match="a damaged image"):
        train(tmp_path, patient(2), SCORES[:3], batches)
    assert Checkpoints(tmp_path).steps[-1] == 7
    assert train(tmp_path, patient(2), SCORES[3:]) == (8, 1)
    (tmp_path / "checkpoints" / "8" / "score.json").unlink()  # as if it had been killed before the evaluation ended
    assert train(tmp_path, patient(2), SCORES[3:]) == (8, 1)


def test_the_processes_of_a_job_stop_together(monkeypatch):
    """One of them may be unable to read a score."""
    checkpoints = SimpleNamespace(scores=SimpleNamespace(steps_since_best=lambda *_: 2), steps=[8])
    for others in (0, 1):
        monkeypatch.setattr(loop.parallel, "max_over_processes", lambda own, others=others: max(own, others))
        assert loop._should_stop_early(patient(2), checkpoints) == bool(others)
    assert loop._should_stop_early(patient(1), checkpoints)


def test_fractions_of_classes_have_names_of_their_own():
    found = loop.numbers_in({"mean_iou": 0.5, "data": "x", "classes": [{"name": "a/b", "f1": None, "iou": 1.0, "pixels": 3}]})
    assert math.isnan(found.pop("f1/a/b"))
    assert found == {"mean_iou": 0.5, "iou/a/b": 1.0}
    for others in (3, "x", [1, None], [{"iou": 0.5}]):
        assert loop.numbers_in({"classes": others, "rmse": 2}) == {"rmse": 2.0} | ({"classes": 3.0} if others == 3 else {})
