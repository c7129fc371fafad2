"""The progress of a job over many images, or of a download: a bar on stderr or, if that is not a terminal, log lines."""

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator

import jax
from rich import progress as bars
from rich.console import Console

logger = logging.getLogger(__name__)
SECONDS_PER_LINE = 30  # between log lines, when stderr is not a terminal


@contextlib.contextmanager
def progress(
    title: str, total: float | None, unit: str = "images", every_process: bool = False
) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with the number of images just processed. The job's first process shows rate and time left.

    The total is counted in the unit, as are the numbers; None if it is unknown. With `every_process`, all processes of the job
    show theirs, and JAX does not take hold of the devices to learn which process this is.
    """
    if not every_process and jax.process_index():
        yield lambda number: None
    elif sys.stderr and sys.stderr.isatty():  # stderr is None if it was closed
        name = bars.TextColumn("{task.description}", markup=False)
        columns = (name, bars.BarColumn(), bars.MofNCompleteColumn(), "{task.fields[rate]}")
        left = (bars.TimeRemainingColumn(), "left")
        with bars.Progress(*columns, *left, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, rate="")
            yield lambda number: bar.update(task, advance=number, rate=f"{bar.tasks[0].speed or 0:.3g} {unit}/s")
    else:
        yield _line_logger(title, total, unit)


def _line_logger(title: str, total: float | None, unit: str) -> Callable[[float], None]:
    done, began = 0.0, time.monotonic()
    due = began + SECONDS_PER_LINE

    def advance(number: float) -> None:
        nonlocal done, due
        done += number
        now = time.monotonic()
        if now >= due:
            due = now + SECONDS_PER_LINE
            rate = done / (now - began)
            of, left = "", ""
            if total is not None:
                of, left = f"/{total:.0f}", f", {datetime.timedelta(seconds=round((total - done) / rate))} left"
            logger.info(f"{title}: {done:.0f}{of} {unit}, {rate:.3g} {unit}/s{left}")

    return advance
