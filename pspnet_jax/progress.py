"""The progress of a job over many images: a bar on stderr or, if that is not a terminal, log lines."""

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
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of images just processed. The job's first process shows rate and time left."""
    if jax.process_index():
        yield lambda images: None
    elif sys.stderr and sys.stderr.isatty():  # stderr is None if it was closed
        name = bars.TextColumn("{task.description}", markup=False)
        columns = (name, bars.BarColumn(), bars.MofNCompleteColumn(), "{task.fields[rate]}")
        left = (bars.TimeRemainingColumn(), "left")
        with bars.Progress(*columns, *left, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, rate="")
            yield lambda images: bar.update(task, advance=images, rate=f"{bar.tasks[0].speed or 0:.3g} images/s")
    else:
        yield _line_logger(title, total)


def _line_logger(title: str, total: int) -> Callable[[int], None]:
    done, began = 0, time.monotonic()
    due = began + SECONDS_PER_LINE

    def advance(images: int) -> None:
        nonlocal done, due
        done += images
        now = time.monotonic()
        if now >= due:
            due = now + SECONDS_PER_LINE
            rate = done / (now - began)
            left = datetime.timedelta(seconds=round((total - done) / rate))
            logger.info(f"{title}: {done}/{total} images, {rate:.3g} images/s, {left} left")

    return advance
