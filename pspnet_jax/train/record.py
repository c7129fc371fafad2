"""What a run says of itself: progress lines, metrics.jsonl, TensorBoard and pictures."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.infer.evaluate import Report
from pspnet_jax.infer.metrics import summarize

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the progress of one run; only the job's first process writes.

    Layout: WORKDIR/metrics.jsonl (one JSON object a line, in the order of steps), WORKDIR/tensorboard, WORKDIR/pictures.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict, start: int):
        self._active = jax.process_index() == 0
        self._pictures, self._jsonl = workdir / "pictures", workdir / "metrics.jsonl"
        self._config = config
        lines = self._jsonl.read_text().splitlines() if self._jsonl.exists() else []
        self._lines = [line for line in lines if json.loads(line)["step"] <= start]  # the rest will be made again
        self.restart_clock(start)
        if self._active:
            from clu.metric_writers import SummaryWriter  # imports TensorFlow

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def restart_clock(self, step: int) -> None:
        """Makes images/s count from now, after `step` steps."""
        self._since, self._step, self._paused = time.perf_counter(), step, 0.0

    def train(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """Prints the progress line of a step and records its scalars; images/s are those since the last line."""
        values = {k: float(v) for k, v in scalars.items() if k != "confusion"}
        values["mean_iou"] = np.nan_to_num(summarize(np.asarray(scalars["confusion"])).mean_iou).item()  # 0: nothing labeled
        seconds_a_step = (time.perf_counter() - self._since - self._paused) / (step - self._step)
        values["images_per_second"] = self._config.batch_size / seconds_a_step
        self.restart_clock(step)
        left = duration(seconds_a_step * (self._config.total_steps - step))
        logger.info(
            f"step {step}/{self._config.total_steps}  loss {values['loss']:.3f}  batch mIoU {values['mean_iou']:.1%}  "
            f"lr {values['learning_rate']:.5f}  {values['images_per_second']:.1f} images/s  {left} left"
        )
        self._write("train", step, values)

    def evaluation(self, step: int, report: Report, seconds: float) -> None:
        """Records an evaluation, which took `seconds` from training, and saves its pictures."""
        self._paused += seconds
        self._write("eval", step, report.to_json())
        if not self._active:
            return
        for name, picture in report.pictures.items():
            with files.atomic(self._pictures / f"{name}.png") as path, path.open("wb") as file:
                picture.save(file, "PNG")
            self._tensorboard.write_images(step, {name: np.asarray(picture)[None]})

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._active:
            return
        self._tensorboard.write_scalars(step, {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, float)})
        self._lines.append(json.dumps({"step": step, "kind": kind, **values}))
        with files.atomic(self._jsonl) as path:
            path.write_text("\n".join(self._lines) + "\n")

    def close(self) -> None:
        if self._active:
            self._tensorboard.close()


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
