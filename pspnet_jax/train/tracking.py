"""Experiment trackers, which get the config, all numbers and the pictures of a run. Their packages are optional.

The packages' own settings apply, such as WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
WORKDIR/tracker.json has the tracker's id of the run, with which a resumed run continues.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files
from pspnet_jax.errors import UserError

PROJECT = "pspnet_jax"  # unless the environment names another


def require(name: str) -> None:
    """Raises UserError unless the package of config.track is installed."""
    spec = importlib.util.find_spec(name) if name else None
    if name and not (spec and spec.origin):  # a folder of this name, such as wandb's own for its files, has no origin
        raise UserError(f"track={name!r}: its package is not installed; run pip install 'pspnet_jax[{name}]'")


class Wandb:
    """A run of Weights & Biases, whose local files are in WORKDIR/wandb."""

    def __init__(self, workdir: epath.Path, name: str, fields: Mapping[str, Any], run_id: str | None):
        import wandb

        project, folder = os.environ.get("WANDB_PROJECT", PROJECT), None if files.is_remote(workdir) else str(workdir)
        self._run = wandb.init(project=project, name=name, dir=folder, config=dict(fields), id=run_id, resume="allow")
        self._image, self.id = wandb.Image, self._run.id

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: self._image(image) for name, [image] in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, which allows no change of the config and only some characters in names."""

    def __init__(self, workdir: epath.Path, name: str, fields: Mapping[str, Any], run_id: str | None):
        import mlflow

        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow, self.id = mlflow, mlflow.start_run(run_id, run_name=name).info.run_id
        if not run_id:
            mlflow.log_params(fields)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({self._allowed(name): value for name, value in scalars.items()}, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, [image] in images.items():
            self._mlflow.log_image(image, key=self._allowed(name), step=step)

    def close(self) -> None:
        self._mlflow.end_run()

    def _allowed(self, name: str) -> str:
        return re.sub(r"[^\w\-. /]", "_", name)


TRACKERS: dict[str, type[Wandb | MLflow]] = {"wandb": Wandb, "mlflow": MLflow}  # by config.track


def begin(workdir: epath.Path, config: ConfigDict, resumed: bool) -> Wandb | MLflow:
    """Begins a run of the tracker config.track or, if training is `resumed`, continues that of the workdir."""
    path = workdir / "tracker.json"
    run_id = files.read_json(path).get(config.track) if resumed else None
    tracker = TRACKERS[config.track](workdir, config.name, dict(configs.leaves(config)), run_id)
    files.write_atomic(path, json.dumps({config.track: tracker.id}) + "\n")
    return tracker
