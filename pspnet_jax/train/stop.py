"""Stopping a run by a signal."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax

from pspnet_jax.train.checkpoint import Checkpoints

logger = logging.getLogger(__name__)
SAME_SIGNAL_SECONDS = 2.0


class Stopped(BaseException):
    """Raised in a block within `StopSignal.interrupts` when a signal is received."""


class StopSignal:
    """Requests a stop after SIGTERM, SIGHUP (unless it is ignored, as under nohup) or Ctrl-C.

    Further signals change nothing, so that the state can be saved: launchers repeat them, or send them to a process and its
    group. Only a second Ctrl-C ends the process at once, if it is not that of the group.

    The processes of a job stop at the same step.
    """

    def __init__(self) -> None:
        self.number, self.received = signal.SIGTERM, False  # `received` is only set if the job has a single process
        self._interrupts, self._ignored_until = False, 0.0
        self._alone = jax.process_count() == 1  # with several processes, JAX catches SIGTERM
        can_catch = threading.current_thread() is threading.main_thread()
        if self._alone and not can_catch:
            logger.info(
                "training does not run in the main thread, so it cannot catch signals: SIGTERM and Ctrl-C save no checkpoint"
            )
        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if self._alone and can_catch else ()
        handled = [number for number in caught if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in handled}

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() > self._ignored_until:
                self.close()
                signal.raise_signal(number)
            return
        self.number, self.received = signal.Signals(number), True
        self._ignored_until = time.monotonic() + SAME_SIGNAL_SECONDS
        if self._interrupts:
            raise Stopped

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Lets a signal interrupt the block. With several processes it does not, because the others might wait forever.

        Raises:
          Stopped: a signal was received.
        """
        self._interrupts = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def requested(self, checkpoints: Checkpoints, step: int) -> bool:
        """Returns whether the run should stop after `step`; the same for all processes of the job."""
        return self.received if self._alone else checkpoints.reached_preemption(step)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
