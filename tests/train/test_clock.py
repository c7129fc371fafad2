"""Waiting for data counts where the devices had nothing left to do, and only there."""

import time
from concurrent.futures import Future

import pytest

from pspnet_jax.train import clock as clocks
from pspnet_jax.train.clock import DataWait


def ended(at: float) -> Future:
    future: Future = Future()
    future.set_result(at)
    return future


@pytest.mark.parametrize(
    ("end", "counted"),
    [(ended(95.0), 10.0), (ended(107.0), 3.0), (Future(), 0.0), (None, 0.0)],
    ids=["idle before", "idle on the way", "still busy", "no step yet"],
)
def test_a_batch_asked_for_at_100_that_comes_at_110(monkeypatch, end, counted):
    wait = DataWait()
    now = iter([100.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    wait._ended = end
    assert list(wait.timed([{"a": 1}])) == [{"a": 1}]
    assert wait.seconds == counted
    wait.close()


def test_a_slow_source_is_waited_for_and_a_quick_one_is_not():
    import jax.numpy as jnp

    def slow():
        for _ in range(3):
            time.sleep(0.05)
            yield {}

    for source, least, most in ((slow(), 0.08, 0.2), ([{}] * 3, 0.0, 0.02)):
        wait = DataWait()
        for _ in wait.timed(source):
            wait.started(jnp.ones(()))
        wait.close()
        print(f"waited {wait.seconds:.3f} s")
        assert least <= wait.seconds <= most
