"""The learning curves of a run, read from its metrics.jsonl."""

import math
from typing import Any

from etils import epath

from pspnet_jax.report import OF_ALL_CLASSES
from pspnet_jax.train import jsonlines

MAX_POINTS = 1000  # of the training curves; of a longer run, every n-th line


def read(workdir: epath.Path) -> dict[str, list[dict[str, float | None]]]:
    """Returns {"training": [...], "evaluations": [...]}, dicts of numbers with their step; empty without a file."""
    lines = jsonlines.read(workdir / "metrics.jsonl")
    training, evaluations = ([_numbers(line) for line in lines if line.get("kind") == kind] for kind in ("train", "eval"))
    every = math.ceil(len(training) / MAX_POINTS) or 1
    scores = [{name: entry[name] for name in ("step", *OF_ALL_CLASSES) if name in entry} for entry in evaluations]
    return {"training": training[::every], "evaluations": scores}


def _numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """Returns the numbers of a line; those that are not finite, which JSON does not have, become None."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
