"""The package as a library: what `pspnet_jax.load` and `pspnet_jax.train` do. Both are imported on first use."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, jobs, programs, runs, scoring, weights
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.train import checkpoint as checkpoints
from pspnet_jax.train import scores

SETTINGS = [field for field in configs.base_config().eval if field not in ("split", "best_metric")]  # that `load` takes


def load(
    path: str | os.PathLike, *, checkpoint: str | int = "latest", devices: Sequence[jax.Device] | None = None, **settings: Any
) -> Segmenter:
    """Returns a network that is ready to segment images: `load("runs/camvid")("photo.jpg").labels`.

    Args:
      path: the directory of a run, or a weights file of another project (see `weights.inspect`); local, gs:// or a name such as
        hf://USER/REPO. What a weights file does not specify is assumed and logged; --mode import can set it.
      checkpoint: of a run: "latest", "best" (by validation score) or a step.
      devices: devices of this process to compute on; None: all of them.
      **settings: fields of config.eval, which replace those saved with a run or usual for the weights: protocol, inference,
        crop, stride, base_size, short_size, scales, flip and batch_size. For example, `scales=(0.5, 1.0, 1.5), flip=False`.

    Raises:
      MissingFileError: there is no such run, checkpoint or file.
      UserError: it is damaged, its network is unknown, or a setting is wrong.
    """
    programs.skip_tpu_compiler()
    are_devices = isinstance(devices, Sequence) and devices and all(isinstance(device, jax.Device) for device in devices)
    if not os.fspath(path) or (devices is not None and not are_devices):
        raise UserError(
            f"load({os.fspath(path)!r}, devices={devices}): expected a path or a name, and a list of devices or None"
        )
    change = functools.partial(_set, settings)
    place = files.user_path(weights.fetch(path if weights.is_name(path) else files.user_path(path)))
    file, _ = weights.split_entry(place)
    if not files.is_there(file):
        raise MissingFileError(f"{path}: no such file or directory; expected a run or a weights file")
    if file.is_dir() and not weights.is_folder(file):
        restored = runs.restore_run(file, str(checkpoint), change)
        return scoring.segmenter(restored.config, restored.variables, devices)
    if checkpoint != "latest":
        raise UserError(f"checkpoint={checkpoint!r}: {path} is a file, and only runs have checkpoints; leave it out")
    return scoring.segmenter(*runs.read_weights(place, change), devices)


def _set(settings: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
    """Sets fields of config.eval."""
    for field, value in settings.items():
        if field not in SETTINGS:
            raise UserError(f"{field}: unknown setting; expected checkpoint, devices, {', '.join(SETTINGS)}")
        wrong = UserError(f"{field}={value!r}: expected a value like {config.eval[field]!r}")
        if value is None:  # ConfigDict accepts it for any field
            raise wrong
        try:
            config.eval[field] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise wrong from error
    return config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training run. `load(trained.workdir)` loads its network."""

    workdir: epath.Path  # directory of the run
    step: int  # of its newest checkpoint
    metrics: dict[str, float]  # of its last evaluation, such as mean_iou; empty if the run is not evaluated


def train(config: ConfigDict | str | os.PathLike, *, workdir: str | os.PathLike = "") -> Trained:
    """Trains a recipe, or resumes its run, as --mode train does. `logging.basicConfig(level="INFO")` shows the progress.

    Signals are caught only if this is called in the main thread; then Ctrl-C saves the state before it raises SystemExit.

    Args:
      config: made by `config.base_config` or `config.load_recipe`; or the name or path of a recipe, as for --config. It is not
        changed.
      workdir: directory of the run; empty: runs/<name of the recipe>.

    Raises:
      UserError: the config or the data is wrong, or the workdir holds another run; see also `train.loop.fit`.
      SystemExit: SIGTERM (143) or Ctrl-C (130) was received, and the state is saved.
    """
    programs.skip_tpu_compiler()
    if not isinstance(config, ConfigDict | str | os.PathLike):
        raise UserError(f"train({config!r}): expected a config, or the name or path of a recipe")
    given = ConfigDict(config) if isinstance(config, ConfigDict) else configs.load_recipe(os.fspath(config))
    config = runs.prepare(configs.check(given.copy_and_resolve_references()), jax.device_count())
    directory = files.user_path(workdir or f"runs/{config.name}")
    jobs.train_run(config, directory)
    with contextlib.closing(checkpoints.Checkpoints(directory, read_only=True)) as saved:
        step = saved.find("latest")
        score = saved.scores.of(step) or {}
    metrics = {name: value for name, value in score.items() if name not in (scores.SCORE, scores.SETTINGS)}
    return Trained(directory, step, metrics)
