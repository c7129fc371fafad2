import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pspnet_jax import parallel
from pspnet_jax.errors import UserError
from pspnet_jax.train import checkpoint, layout
from tests.train import OneLayer, fit, make_batches, tiny_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def test_mesh_has_all_devices_along_data():
    mesh = parallel.make_mesh()
    assert dict(mesh.shape) == {"data": 8, "spatial": 1}
    assert mesh.axis_names == ("data", "spatial")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(parallel.make_mesh(jax.devices()[:3]).shape) == {"data": 3, "spatial": 1}


def test_each_device_has_its_share_of_the_batch():
    mesh = parallel.make_mesh(jax.devices()[:4])
    batch = {"image": np.arange(8 * 3, dtype=np.uint8).reshape(8, 3), "label": np.arange(8, dtype=np.uint8)}
    (placed,) = parallel.to_devices([batch], mesh)
    for name, array in batch.items():
        assert placed[name].sharding.is_equivalent_to(parallel.batch_sharding(mesh), array.ndim)
        assert placed[name].dtype == np.uint8
        np.testing.assert_array_equal(placed[name], array)
        for device, rows in zip(mesh.devices.flat, np.split(array, 4), strict=True):
            (shard,) = [s.data for s in placed[name].addressable_shards if s.device == device]
            np.testing.assert_array_equal(shard, rows)
    everywhere = jax.device_put(batch["label"], parallel.replicated(mesh))
    assert [shard.data.shape for shard in everywhere.addressable_shards] == [(8,)] * 4


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_keep_their_order_and_are_loaded_at_most_ahead_batches_in_advance(ahead, count):
    taken = []

    def batches():
        for i in range(count):
            taken.append(i)
            yield {"label": np.full(8, i, np.uint8)}

    for i, batch in enumerate(parallel.to_devices(batches(), parallel.make_mesh(), ahead)):
        np.testing.assert_array_equal(batch["label"], np.full(8, i))
        assert len(taken) <= i + 2 + ahead
    assert taken == list(range(count))


def test_a_batch_that_is_ready_is_yielded_even_if_the_next_one_is_late():
    late = threading.Event()

    def batches():
        yield {"label": np.zeros(8, np.uint8)}
        yield {"label": np.ones(8, np.uint8)}
        late.wait(60)
        yield {"label": np.full(8, 2, np.uint8)}

    placed = parallel.to_devices(batches(), parallel.make_mesh(), ahead=2)
    began = time.monotonic()
    assert [int(next(placed)["label"][0]) for _ in range(2)] == [0, 1]
    assert time.monotonic() - began < 30
    late.set()
    assert int(next(placed)["label"][0]) == 2
    placed.close()


def test_an_exception_of_the_batches_is_raised_in_its_position_and_the_thread_ends():
    def batches():
        yield {"label": np.zeros(8, np.uint8)}
        raise ValueError("x.png is damaged")

    before = threading.active_count()
    placed = parallel.to_devices(batches(), parallel.make_mesh())
    next(placed)
    with pytest.raises(ValueError, match=r"x\.png is damaged"):
        next(placed)
    assert threading.active_count() == before


def test_connecting_after_jax_is_initialized_is_a_user_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    jax.devices()
    with pytest.raises(
        ValueError, match=r"^--distributed: the processes of this job could not connect .*same command on every"
    ):
        parallel.start_processes()


@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_an_environment_variable_that_is_not_a_number_is_a_user_error(monkeypatch, variable):
    monkeypatch.setenv(variable, "two")
    with pytest.raises(ValueError, match=r"--distributed: .*'two'"):
        parallel.start_processes()


# Runs as one of two processes with a device each. At the given batch, the second sends itself SIGTERM, and both are slow from
# there on: they have to stop at the same step.
SCRIPT = """
import os, signal, sys, time
import jax
from pspnet_jax import parallel

parallel.start_processes()
from tests.train import OneLayer, fit, make_batches, tiny_config

workdir, at = sys.argv[1], int(sys.argv[2])
host = jax.process_index()
assert jax.process_count() == 2 and jax.local_device_count() == 1

def batches(start):
    for step, batch in enumerate(make_batches(start), start):
        if step == at and host == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if at and step >= at:
            time.sleep(1)
        yield {name: array[4 * host : 4 * host + 4] for name, array in batch.items()}

def evaluate(variables):
    with parallel.fail_together("evaluating"):
        if host == 1:
            raise ValueError("x.png is damaged")
    return {"mean_iou": 0.5}, {}

fit(tiny_config(), batches, evaluate, workdir, model=OneLayer())
"""


def run_two_processes(workdir, at):
    """Returns the exit codes and the stderr of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, "-c", SCRIPT, str(workdir), str(at)]
    processes = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        stderr = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], stderr


def test_two_processes_stop_and_resume_together_and_equal_one(tmp_path, monkeypatch):
    """Compares twelve steps by two processes, interrupted by a SIGTERM to one of them, with one process with two devices."""
    codes, stderr = run_two_processes(tmp_path / "two", at=3)
    assert codes == [143, 143], "\n".join(stderr)
    stopped = checkpoint.Checkpoints(tmp_path / "two", read_only=True).steps[-1]
    assert 1 <= stopped < 12
    assert f"stopped by SIGTERM; step {stopped} is saved" in stderr[0]
    codes, stderr = run_two_processes(tmp_path / "two", at=0)
    assert codes == [1, 1], "\n".join(stderr)
    assert "UserError: step 12 could not be evaluated (evaluating failed in another process of this job" in stderr[0]

    mesh = parallel.make_mesh(jax.devices()[:2])
    monkeypatch.setattr(parallel, "make_mesh", lambda: mesh)
    alone = fit(tiny_config(), make_batches, None, tmp_path / "one", model=OneLayer())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), alone)
    together = layout.read_state(checkpoint.Checkpoints(tmp_path / "two", read_only=True).path(12), target)
    differences = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0)), together, alone)
    largest = max(jax.tree.leaves(differences))
    print(f"\nlargest difference between two processes and one, after 12 steps: {largest}")
    assert largest < 1e-5
    lines = [(tmp_path / run / "metrics.jsonl").read_text().count("\n") for run in ("one", "two")]
    assert lines == [12, 12]


def test_processes_with_different_configs_are_refused(monkeypatch):
    parallel.require_same("their configs", {"seed": 0})
    extremes = iter([7, -3])  # the largest value of any process, and the negative of the smallest
    monkeypatch.setattr(parallel, "max_over_processes", lambda _: next(extremes))
    with pytest.raises(UserError, match="the processes of this job differ in their configs; start all of them with the same"):
        parallel.require_same("their configs", {"seed": 0})
