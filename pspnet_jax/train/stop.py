"""How a run is asked to stop."""

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
REPEATED = 2.0


class Stopped(BaseException):
    """Ends what runs within `StopSignal.interrupts`."""


class StopSignal:
    """Asks for a stop after SIGTERM, SIGHUP (unless nohup has it ignored) or Ctrl-C; a second one ends the process.

    Not within `REPEATED` seconds, when it may be the same again: some launchers send it to the process and to its group.

    Several processes agree on the step.

    Attributes:
      received: whether this process, being the only one of its job, was asked to stop.
    """

    def __init__(self) -> None:
        self.number, self.received = signal.SIGTERM, False
        self._interrupts, self._repeated_until = False, 0.0
        self._alone = jax.process_count() == 1  # else JAX catches SIGTERM
        can_catch = threading.current_thread() is threading.main_thread()
        if self._alone and not can_catch:
            logger.info("training runs in a thread, where Python catches no signals: SIGTERM and Ctrl-C are not waited for")
        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if self._alone and can_catch else ()
        heeded = [number for number in caught if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in heeded}

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if time.monotonic() > self._repeated_until:
                self.close()
                signal.raise_signal(number)
            return
        self.number, self.received = signal.Signals(number), True
        self._repeated_until = time.monotonic() + REPEATED
        if self._interrupts:
            raise Stopped

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within, a signal does not wait for the end of a step; several processes wait, since some may wait for others.

        Raises:
          Stopped: a signal has come.
        """
        self._interrupts = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def requested(self, checkpoints: Checkpoints, step: int) -> bool:
        return self.received if self._alone else checkpoints.reached_preemption(step)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
