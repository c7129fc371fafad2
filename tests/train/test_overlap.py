"""Host, copies and devices work at the same time, and the profile of a training run shows it."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.metrics import Average

from pspnet_jax import losses, parallel
from pspnet_jax.train import loop, profile
from tests.train import OneLayer, fit, make_batches, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def slow_loss(config):
    """Returns the config's loss, with a metric that takes the device 0.2 s: products of matrices, one after the other."""
    loss = losses.build(config)

    def slow(outputs, batch, step):
        terms, metrics = loss(outputs, batch, step)
        matrix = jnp.full((256, 256), 1e-3) * (step + 1)
        product = jax.lax.fori_loop(0, 400, lambda _, x: x @ matrix, matrix)
        return terms, metrics | {"product": Average(product.sum(), jnp.int32(1))}

    return slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six slow steps, of which only the last logs and saves; steps 3 and 4 are profiled.

    Returns the folder of the profile; for each step, whether it and the one before had ended when its hooks were called; and
    the same for the calls of the profiler. From step 3 to step 5, implicit transfers are errors in all threads.
    """
    config, folder, dispatched, at_hooks, at_profiler = tiny_config(), tmp_path_factory.mktemp("run"), [], [], []
    config.total_steps = 6
    config.every.update(log=100, save=100, eval=0)

    def make_train_step(*arguments):
        train_step = make(*arguments)

        def step(state, batch):
            state, metrics = train_step(state, batch)
            dispatched.append(metrics["loss"].total)
            return state, metrics

        return step

    def ended():
        return [array.is_ready() for array in dispatched[-2:]]

    def hook(step):
        at_hooks.append(ended())
        jax.config.update("jax_transfer_guard", "disallow" if 2 <= step < 5 else "allow")

    make = loop.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        for name in ("start_trace", "stop_trace"):
            call = getattr(jax.profiler, name)
            patch.setattr(jax.profiler, name, lambda *given, call=call: (at_profiler.append(ended()), call(*given)))
        hooks = [hook, profile.hook(folder / "profile", 3, 2)]
        try:
            fit(config, make_batches, None, folder, model=OneLayer(), loss=slow_loss(config), hooks=hooks)
        finally:
            jax.config.update("jax_transfer_guard", "allow")
    return folder / "profile", at_hooks, at_profiler


def test_between_steps_the_host_transfers_nothing_and_waits_only_for_the_step_before(run):
    _, at_hooks, _ = run
    assert at_hooks[2:5] == [[True, False]] * 3


def test_the_profile_has_all_work_of_the_steps_asked_for_and_no_other(run):
    """It begins when step 2 has ended on the device, and ends when step 4 has."""
    folder, _, at_profiler = run
    assert at_profiler == [[True, True]] * 2
    assert [event["args"]["step_num"] for event in events(folder, "train")] == ["3", "4"]


def events(folder, name):
    (file,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if event.get("name") == name]


def test_the_profile_shows_copies_to_the_device_during_steps(run):
    """Within the time of step 4, in which the host waits for the device to end step 3."""
    step, copies = events(run[0], "train")[1], events(run[0], "copy to devices")
    assert any(step["ts"] < copy["ts"] and copy["ts"] + copy["dur"] < step["ts"] + step["dur"] for copy in copies)
    assert step["tid"] not in {copy["tid"] for copy in copies}


def test_a_run_resumed_too_late_for_its_profile_says_so(tmp_path, caplog):
    for first in (12, 11):
        profile.hook(tmp_path, first, 1)(11)
    jax.profiler.stop_trace()
    assert caplog.messages == ["--profile: nothing is traced, because training began at step 11; choose a step after it"]


@pytest.mark.parametrize("slow", ["loading", "copying"])
def test_loading_and_copying_take_no_time_while_the_device_computes(slow, monkeypatch):
    """Five batches, each of which takes 0.1 s to make and 0.1 s to use, take 0.6 s and not 1 s."""
    copy = jax.make_array_from_process_local_data
    if slow == "copying":
        monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda *given: (time.sleep(0.1), copy(*given))[1])

    def batches():
        for index in range(5):
            time.sleep(0.1 if slow == "loading" else 0)
            yield {"label": np.full(8, index, np.uint8)}

    began = time.perf_counter()
    for _ in parallel.to_devices(batches(), parallel.make_mesh()):
        time.sleep(0.1)
    assert 0.6 <= time.perf_counter() - began < 0.9
