"""Training logs: progress lines, metrics.jsonl, TensorBoard, pictures, and timing."""

import contextlib
import datetime
import logging
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from pspnet_jax import figures, files
from pspnet_jax.errors import first_line
from pspnet_jax.train import jsonlines, tracking
from pspnet_jax.train.step import Metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Writer(Protocol):
    """Additional destination of scalars and images, such as a clu.metric_writers.MetricWriter."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TrainingLog:
    """Writes the logs of one run, in the job's first process only.

    Files: WORKDIR/metrics.jsonl (one JSON object per line, in the order of steps), WORKDIR/curves.png and WORKDIR/pictures.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: ConfigDict,
        start: int,
        writer: Callable[[str], Writer] | None,
        examples_per_epoch: int,
        unscored: bool = False,
    ):
        """Continues the logs after `start` steps. Lines of later steps are dropped, because these steps are repeated.

        If step `start` is `unscored`, the line of its evaluation is also dropped, because the evaluation is repeated.
        """
        self._active = jax.process_index() == 0
        self._writers: dict[str, Writer] = {}
        if writer and self._active:
            with self._without_on_error("TensorBoard files"):
                self._writers["TensorBoard files"] = writer(str(workdir / "tensorboard"))
        if config.track and self._active:
            with self._without_on_error(f"logs of {config.track}"):
                self._writers[f"logs of {config.track}"] = tracking.begin(workdir, config, resumed=start > 0)
        self._workdir, self._pictures, self._config = workdir, workdir / "pictures", config
        self._examples_per_epoch = examples_per_epoch
        self._interval: Metrics | None = None
        self.stalls, self._excluded = InputStallTimer(), 0.0
        self.restart_clocks(start)
        if self._active:
            self._lines = jsonlines.JsonLines(workdir / "metrics.jsonl", start, drop_kind="eval" if unscored else "")

    def restart_clocks(self, step: int) -> None:
        """Restarts the measurement of rates, after `step` steps."""
        self._last_line = self._last_epoch = self._now(step)

    def _now(self, step: int) -> np.ndarray:
        """Returns the number of steps, the seconds of training, and the seconds spent waiting for data."""
        return np.array([step, time.perf_counter() - self._excluded, self.stalls.seconds])

    def _rates(self, since: np.ndarray, now: np.ndarray) -> dict[str, float]:
        steps, seconds, stalled = (now - since).tolist()
        return {"data_wait": stalled / seconds, "images_per_second": self._config.batch_size * steps / seconds}

    def add_step(self, metrics: Metrics) -> None:
        """Adds the metrics of the step just dispatched to the next progress line."""
        self.stalls.step_started(metrics)
        self._interval = metrics if self._interval is None else _merge(self._interval, metrics)

    def log_progress(self, step: int) -> None:
        """Logs a progress line for the steps since the last one, and writes their metrics and rates."""
        assert self._interval is not None
        values = {name: float(metric.compute()) for name, metric in jax.device_get(self._interval).items()}
        self._interval = None
        values |= self._rates(self._last_line, now := self._now(step))
        self._last_line = now
        shown = "  ".join(text.format(values[name]) for name, text in PROGRESS_FORMATS.items() if name in values)
        total = self._config.total_steps
        left = datetime.timedelta(seconds=round((total - step) * self._config.batch_size / values["images_per_second"]))
        logger.info(f"step {step}/{total}  {shown}  {left} left")
        self._write("train", step, values)

    def end_of_epoch(self, step: int) -> None:
        """Writes the rates of the epoch that this step completes, if any."""
        seen, epoch = step * self._config.batch_size, self._examples_per_epoch
        if not epoch or seen // epoch == (seen - self._config.batch_size) // epoch:
            return
        self._write("epoch", step, {"epoch": seen // epoch} | self._rates(self._last_epoch, now := self._now(step)))
        self._last_epoch = now

    def exclude_time(self, seconds: float) -> None:
        """Excludes the last `seconds` from the rates."""
        self._excluded += seconds

    def log_evaluation(self, step: int, metrics: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
        """Writes the metrics of an evaluation, the learning curves, and pictures.

        A picture is an array uint8[H, W, 3], a PIL image, or a function that draws it.
        """
        self._write("eval", step, metrics)
        if not self._active:
            return
        self._draw_curves()
        for name, picture in pictures.items():
            try:
                if (self._pictures / name).parent != self._pictures:
                    raise ValueError("its name contains a directory")
                pixels = np.asarray(picture() if callable(picture) else picture)
                with files.atomic(self._pictures / f"{name}.png") as path, path.open("wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
            except Exception as error:  # such as a name that is too long, a full disk, or an array of the wrong shape
                logger.warning("the picture %r cannot be written (%s); training goes on", name[:100], first_line(error))
            else:
                self._to_writers(lambda writer: writer.write_images(step, {name: pixels[None]}))  # noqa: B023 -- called at once

    def _draw_curves(self) -> None:
        try:
            self._lines.flush()
            lines = jsonlines.read(self._workdir / "metrics.jsonl")
            points = [numbers_in(line) | {"kind": line.get("kind")} for line in lines]
            picture = figures.learning_curves(points, self._config.eval.best_metric)
            with files.atomic(self._workdir / "curves.png") as path, path.open("wb") as file:
                picture.save(file, "PNG")
        except Exception as error:  # such as a full disk, or no matplotlib
            logger.warning("the learning curves cannot be drawn (%s); training goes on", first_line(error))

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._active:
            return
        scalars = {f"{kind}/{name}": value for name, value in numbers_in(values).items() if not math.isnan(value)}
        self._to_writers(lambda writer: writer.write_scalars(step, scalars))
        about = {"step": step, "kind": kind}
        self._lines.write(about | dict(values) | about)  # `about` comes first and takes precedence over metrics

    def _to_writers(self, write: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            with self._without_on_error(name):
                write(writer)

    @contextlib.contextmanager
    def _without_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning("%s cannot be written (%s); training goes on without them", name, first_line(error))
            self._writers.pop(name, None)

    def flush(self) -> None:
        """Writes the pending lines."""
        if self._active:
            self._lines.flush()

    def close(self) -> None:
        self.stalls.close()
        if self._active:
            self._lines.close()
        self._to_writers(lambda writer: writer.close())


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among metrics by name.

    The fractions in the list "classes", which has a dict for each class, get names like "iou/road"; None becomes NaN.
    """
    found = {name: float(value) for name, value in metrics.items() if _is_number(value)}
    rows = metrics.get("classes")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and "name" in row:
            fractions = {name: math.nan if value is None else value for name, value in row.items()}
            found |= {f"{name}/{row['name']}": value for name, value in fractions.items() if isinstance(value, float)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, jax.Array | np.ndarray) and value.size == 1)


_merge = jax.jit(lambda interval, metrics: {name: metric.merge(metrics[name]) for name, metric in interval.items()})
PROGRESS_FORMATS = {  # of the values in a progress line
    "loss": "loss {:.3f}",
    "mean_iou": "batch mIoU {:.1%}",
    "learning_rate": "lr {:.5f}",
    "images_per_second": "{:.1f} images/s",
    "data_wait": "data wait {:.0%}",
}


class InputStallTimer:
    """Measures the time in which the devices are idle because the next batch is not ready."""

    def __init__(self) -> None:
        self.seconds = 0.0  # the total so far
        self._ended: Future[float] | None = None
        self._thread = ThreadPoolExecutor(1, "end of step")

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches, and adds up the time for which the devices waited for each."""
        iterator = iter(batches)
        while True:
            requested = time.perf_counter()
            if (batch := next(iterator, None)) is None:
                return
            received = time.perf_counter()
            if self._ended and self._ended.done():
                self.seconds += max(0.0, received - max(requested, self._ended.result()))
            yield batch

    def step_started(self, metrics: Metrics) -> None:
        """Records when a step that was just dispatched ends, by waiting for its metrics in a thread."""

        def end() -> float:
            jax.block_until_ready(metrics)
            return time.perf_counter()

        self._ended = self._thread.submit(end)

    def close(self) -> None:
        self._thread.shutdown()
