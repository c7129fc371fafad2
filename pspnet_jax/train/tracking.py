"""Experiment trackers, which get the config, all numbers and the pictures of a run. Their packages are optional.

The packages' own settings apply, such as WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
WORKDIR/tracker.json has the tracker's id of the run, with which a resumed run continues.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files
from pspnet_jax.errors import UserError

PROJECT = "pspnet_jax"  # unless the environment names another


def require(name: str) -> None:
    """Checks that the package of config.track is installed.

    Raises:
      UserError: it is not.
    """
    if name and not importlib.util.find_spec(name):
        raise UserError(f"track={name!r}: its package is not installed; run pip install 'pspnet_jax[{name}]'")


class Wandb:
    """A run of Weights & Biases, whose local files are in WORKDIR/wandb."""

    def __init__(self, workdir: epath.Path, config: ConfigDict, start: int):
        """Begins a run, or continues that of the workdir if training continues after `start` steps."""
        import wandb

        self._image, id_ = wandb.Image, _read_id(workdir, "wandb", start)
        project, folder = os.environ.get("WANDB_PROJECT", PROJECT), None if files.is_remote(workdir) else str(workdir)
        fields = dict(configs.leaves(config))
        self._run = wandb.init(project=project, name=config.name, dir=folder, config=fields, id=id_, resume="allow")
        _write_id(workdir, "wandb", self._run.id)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: [self._image(image) for image in batch] for name, batch in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow."""

    def __init__(self, workdir: epath.Path, config: ConfigDict, start: int):
        """Begins a run, or continues that of the workdir if training continues after `start` steps."""
        import mlflow

        self._mlflow, id_ = mlflow, _read_id(workdir, "mlflow", start)
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = mlflow.start_run(run_id=id_, run_name=config.name)
        if not id_:  # MLflow's parameters cannot be changed
            mlflow.log_params(dict(configs.leaves(config)))
        _write_id(workdir, "mlflow", run.info.run_id)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({_allowed(name): value for name, value in scalars.items()}, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            self._mlflow.log_image(batch[0], key=_allowed(name), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[Wandb | MLflow]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
}  # by config.track


def _allowed(name: str) -> str:
    """Replaces the characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _read_id(workdir: epath.Path, name: str, start: int) -> str | None:
    return files.read_json(workdir / "tracker.json").get(name) if start else None


def _write_id(workdir: epath.Path, name: str, id_: str) -> None:
    with files.atomic(workdir / "tracker.json") as path:
        path.write_text(json.dumps({name: id_}) + "\n")
