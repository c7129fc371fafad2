"""What a run says of itself: progress lines, metrics.jsonl, TensorBoard and pictures."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import files
from pspnet_jax.infer.evaluate import Report
from pspnet_jax.metrics import summarize
from pspnet_jax.train.clock import Clock, DataWait

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the progress of one run; only the job's first process writes.

    Layout: WORKDIR/metrics.jsonl (one JSON object a line, in the order of steps), WORKDIR/tensorboard, WORKDIR/pictures.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict, start: int, wait: DataWait, epoch: int = 0):
        """Goes on after `start` steps; `epoch` is the number of examples in one, 0 for unknown."""
        self._active = jax.process_index() == 0
        self._pictures, self._jsonl = workdir / "pictures", workdir / "metrics.jsonl"
        self._config = config
        lines = self._jsonl.read_text().splitlines() if self._jsonl.exists() else []
        self._lines = [line for line in lines if json.loads(line)["step"] <= start]  # the rest will be made again
        self._clock, self._epoch_clock, self._epoch = Clock(start, wait), Clock(start, wait), epoch
        if self._active:
            from clu.metric_writers import SummaryWriter  # imports TensorFlow

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def restart_clock(self, step: int) -> None:
        """Makes the rates count from now, after `step` steps."""
        self._clock.restart(step)
        self._epoch_clock.restart(step)

    def train(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """Prints the progress line of a step and records its scalars; images/s and data wait are those since the last line."""
        values = {k: float(v) for k, v in scalars.items() if k != "confusion"}
        values["mean_iou"] = np.nan_to_num(summarize(np.asarray(scalars["confusion"])).mean_iou).item()  # 0: nothing labeled
        seconds_a_step, values["data_wait"] = self._clock.read(step)
        values["images_per_second"] = self._config.batch_size / seconds_a_step
        self._clock.restart(step)
        left = duration(seconds_a_step * (self._config.total_steps - step))
        logger.info(
            f"step {step}/{self._config.total_steps}  loss {values['loss']:.3f}  batch mIoU {values['mean_iou']:.1%}  "
            f"lr {values['learning_rate']:.5f}  {values['images_per_second']:.1f} images/s  "
            f"data wait {values['data_wait']:.0%}  {left} left"
        )
        self._write("train", step, values)

    def end_of_epoch(self, step: int) -> None:
        """Records the rates of an epoch if this step ends one."""
        seen = step * self._config.batch_size
        if not self._epoch or seen // self._epoch == (seen - self._config.batch_size) // self._epoch:
            return
        seconds_a_step, data_wait = self._epoch_clock.read(step)
        self._epoch_clock.restart(step)
        rates = {"data_wait": data_wait, "images_per_second": self._config.batch_size / seconds_a_step}
        self._write("epoch", step, {"epoch": seen // self._epoch, **rates})

    def evaluation(self, step: int, report: Report, seconds: float) -> None:
        """Records an evaluation, which took `seconds` from training, and saves its pictures."""
        self._clock.pause(seconds)
        self._epoch_clock.pause(seconds)
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
