import threading
import time
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pspnet_jax import parallel
from pspnet_jax.errors import UserError
from pspnet_jax.train import checkpoint, layout
from tests.processes import run_processes
from tests.train import OneLayer, fit, make_batches, tiny_config

pytestmark = pytest.mark.slow


def test_groups_of_devices_that_cannot_be_divided_among_processes_are_refused(monkeypatch):
    class Device:
        def __init__(self, number):
            self.process_index, self.id = divmod(number, 6)

    def share(spatial, process):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        groups = np.array([Device(number) for number in range(12)]).reshape(-1, spatial)
        return parallel.data_share(types.SimpleNamespace(devices=groups, shape={"spatial": spatial}))

    assert [share(3, process) for process in (0, 1)] == [(0, 2), (1, 2)]
    assert [share(12, process) for process in (0, 1)] == [(0, 1), (0, 1)]
    with pytest.raises(
        UserError, match=r"^parallel.spatial=4: some groups .* of 6 devices each; choose a divisor or a multiple"
    ):
        share(4, 0)


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


# Runs as one of two processes with a device each. At the given batch, the second sends itself SIGTERM, and both are slow from
# there on: they have to stop at the same step.
SCRIPT = """
import os, signal, sys, time
import jax
from pspnet_jax import parallel

parallel.start_processes()
from tests.processes import run_processes
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


def test_two_processes_stop_and_resume_together_and_equal_one(tmp_path, monkeypatch):
    """Compares twelve steps by two processes, interrupted by a SIGTERM to one of them, with one process with two devices."""
    command = "-c", SCRIPT, str(tmp_path / "two")
    done = run_processes(2, *command, "3")
    assert [process.returncode for process in done] == [143, 143], done[0].stderr + done[1].stderr
    stopped = checkpoint.Checkpoints(tmp_path / "two", read_only=True).steps[-1]
    assert 1 <= stopped < 12
    assert f"stopped by SIGTERM; step {stopped} is saved" in done[0].stderr
    done = run_processes(2, *command, "0")
    assert [process.returncode for process in done] == [1, 1], done[0].stderr + done[1].stderr
    assert "UserError: step 12 could not be evaluated (evaluating failed in process 1 (" in done[0].stderr
    assert "): ValueError: x.png is damaged), but it is saved" in done[0].stderr

    mesh = parallel.make_mesh(jax.devices()[:2])
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh)
    alone = fit(tiny_config(), make_batches, None, tmp_path / "one", model=OneLayer())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), alone)
    together = layout.read_state(checkpoint.Checkpoints(tmp_path / "two", read_only=True).path(12), target)
    differences = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0)), together, alone)
    largest = max(jax.tree.leaves(differences))
    print(f"\nlargest difference between two processes and one, after 12 steps: {largest}")
    assert largest < 1e-5
    lines = [(tmp_path / run / "metrics.jsonl").read_text().count("\n") for run in ("one", "two")]
    assert lines == [12, 12]


def test_a_value_that_differs_is_named_with_its_processes_and_both_values(monkeypatch):
    parallel.require_same({"seed": 0})

    def exchange(mine):
        return {"process 0 (a)": mine | {"seed": "1"}, "process 1 (b)": mine | {"weights": "x"}, "process 2 (c)": mine}

    monkeypatch.setattr(parallel, "exchange", exchange)
    with pytest.raises(UserError) as caught:
        parallel.require_same({"seed": 0, "weights": "y", "names": list(range(99))})
    assert str(caught.value) == (
        "process 1 (b) differs from process 0 (a): seed=0 instead of 1; weights=x instead of 'y'; "
        "1 more process(es) differ, too; start the same command, with the same files, on every host"
    )


def test_a_long_value_is_compared_by_a_checksum(monkeypatch):
    names = [f"class {index}" for index in range(150)]
    monkeypatch.setattr(parallel, "exchange", lambda mine: {"process 0": mine, "process 1": {"names": "['sky']"}})
    with pytest.raises(
        UserError, match=r"names=\['sky'\] instead of \['class 0', 'class 1', .{25,40}\.\.\. \([0-9a-f]{8}\); start"
    ):
        parallel.require_same({"names": names})
