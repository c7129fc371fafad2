"""What a run's time went into: steps, evaluations, and waiting for data."""

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np


class DataWait:
    """Adds up the time in which the devices had ended a step and the next batch was not there yet.

    Attributes:
      seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ended: Future[float] | None = None
        self._thread = ThreadPoolExecutor(1, "end of step")

    def timed(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields the batches, and counts what each was waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            came = time.perf_counter()
            if batch is None:
                return
            if self._ended and self._ended.done():
                self.seconds += max(0.0, came - max(asked, self._ended.result()))
            yield batch

    def started(self, result: jax.Array) -> None:
        """Takes note of a step that the devices have begun, by one of its results."""

        def end() -> float:
            jax.block_until_ready(result)
            return time.perf_counter()

        self._ended = self._thread.submit(end)

    def close(self) -> None:
        self._thread.shutdown()


class Clock:
    """Time since a step, without evaluations."""

    def __init__(self, step: int, wait: DataWait):
        self._wait = wait
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts anew after `step` steps."""
        self._began, self._step, self._paused, self._waited = time.perf_counter(), step, 0.0, self._wait.seconds

    def pause(self, seconds: float) -> None:
        """Leaves out the last `seconds`."""
        self._paused += seconds

    def read(self, step: int) -> tuple[float, float]:
        """Returns the seconds a step took, and the share of them in which it waited for data."""
        seconds = time.perf_counter() - self._began - self._paused
        return seconds / (step - self._step), (self._wait.seconds - self._waited) / seconds
