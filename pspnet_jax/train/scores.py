"""The scores of a run's checkpoints, each in a file score.json in the checkpoint's directory, and which one is the best."""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from pspnet_jax import files
from pspnet_jax.errors import first_line

logger = logging.getLogger(__name__)
SCORE = "score"  # the metric in score.json that selects the best checkpoint; version 0.1 had only "mean_iou"
SETTINGS = "settings"  # the evaluation settings in score.json; scores are only compared if these are equal


class Scores:
    """The metrics of the checkpoints that were scored, and the steps whose score files are `unreadable`."""

    def __init__(self, directory: epath.Path, steps: Sequence[int]):
        """Reads the scores of these checkpoints in a directory."""
        self._directory, self.unreadable = directory, set[int]()
        self._of_step = {step: score for step in steps if (score := self._read(step))}

    def of(self, step: int) -> Mapping[str, Any] | None:
        """Returns the metrics of a checkpoint with their `SETTINGS`, or None if it was not scored."""
        return self._of_step.get(step)

    def add(self, step: int, metrics: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """Writes the score of a complete checkpoint.

        The metrics are numbers by name, including `SCORE`; a larger score is better. The settings are those of the evaluation,
        serializable as JSON.
        """
        data = settings.get("data")
        if self._of_step and (self._of_step[max(self._of_step)].get(SETTINGS) or {}).get("data", data) != data:
            logger.warning(
                "the evaluation data has changed: the best checkpoint is chosen among those scored from step %s on", step
            )
        self._of_step[step] = json.loads(json.dumps({**metrics, SETTINGS: settings}))
        self.unreadable.discard(step)
        checkpoint = self._directory / str(step)
        if jax.process_index() == 0 and checkpoint.exists():
            files.write_atomic(checkpoint / "score.json", json.dumps(self._of_step[step]))

    def remove(self, step: int) -> None:
        """Forgets the score of a checkpoint that is not there any more."""
        self._of_step.pop(step, None)

    def best(self, steps: Collection[int]) -> int | None:
        """Returns the one of `steps` with the largest score, of equal ones the first; None if none has a score.

        Only scores with the settings of the newest one are compared.
        """
        scores = {step: score for step, score in self._of_step.items() if step in steps and not math.isnan(score[SCORE])}
        if not scores:
            return None
        newest = scores[max(scores)].get(SETTINGS)
        return -max((score[SCORE], -step) for step, score in scores.items() if score.get(SETTINGS) == newest)[1]

    def steps_since_best(self, steps: Collection[int], settings: Mapping[str, Any]) -> int:
        """Returns the number of steps from the best of `steps` to the last one that was scored; 0 if that had other settings.

        The settings are as in `add`, without the data.
        """
        if (best := self.best(steps)) is None:
            return 0
        last = max(self._of_step)
        return last - best if {**(self._of_step[last].get(SETTINGS) or {}), "data": 0} == {**settings, "data": 0} else 0

    def _read(self, step: int) -> dict[str, Any] | None:
        paths = [self._directory / str(step) / name for name in ("score.json", "metrics/metrics")]
        try:
            path = next((path for path in paths if files.is_there(path)), None)
            if path is None:
                return None
            metrics = json.loads(path.read_text())
            if not isinstance(metrics.get(SETTINGS, {}), dict):
                raise ValueError(f"{SETTINGS} is not an object")
            return {**metrics, SCORE: float(metrics.get(SCORE, metrics.get("mean_iou", math.nan)))}
        except Exception as error:  # the other checkpoints must remain usable
            self.unreadable.add(step)
            logger.warning(
                "the score of checkpoint %s cannot be read (%s); it cannot be selected as the best, but it is kept",
                *(step, first_line(error)),
            )
            return None
