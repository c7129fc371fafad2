"""The learning curves of a run, read from its metrics.jsonl."""

import contextlib
import json
import math
from typing import Any

from etils import epath

from pspnet_jax import files
from pspnet_jax.report import OF_ALL_CLASSES

MAX_POINTS = 1000  # of the training curves; of a longer run, every n-th line


def read(workdir: epath.Path) -> dict[str, list[dict[str, float | None]]]:
    """Returns {"training": [...], "evaluations": [...]}, dicts of numbers with their step; empty without a file."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if files.is_there(path) else []
    entries: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a damaged line
            values = json.loads(line)
            entries[values["kind"]].append({"step": int(values["step"]), **values})
    training, evaluations = (list(map(_numbers, entries[kind])) for kind in ("train", "eval"))
    every = math.ceil(len(training) / MAX_POINTS) or 1
    scores = [{name: entry[name] for name in ("step", *OF_ALL_CLASSES) if name in entry} for entry in evaluations]
    return {"training": training[::every], "evaluations": scores}


def _numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """Returns the numbers of a line; those that are not finite, which JSON does not have, become None."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
