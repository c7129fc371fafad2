"""What the SHA-256 manifest of a checkpoint costs: the time to save and to restore a recipe's state, with it and without it.

python -m benchmarks.checkpoint --config configs/ade20k.py [--rounds 10] [--workdir DIR]

The two are measured in turns. A save ends when the checkpoint is complete.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, models, optimizers, parallel
from pspnet_jax.train import checkpoint, manifest
from pspnet_jax.train.step import TrainState, new_state

NONE = {"describe": lambda _: {}, "verify": lambda *_: None}


def make_state(config: ConfigDict) -> TrainState:
    """Returns the state of the first step, with random weights."""
    model = models.build(config.model, datasets.describe(config.dataset).num_classes)
    shape = (1, *config.augment.crop, 3)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros(shape), train=False))(jax.random.key(0))
    state = new_state(config, optimizers.build(config.optimizer, config.total_steps), variables)
    return jax.device_put(state, parallel.replicated(parallel.make_mesh()))


def measure(config: ConfigDict, state: TrainState, rounds: int, workdir: pathlib.Path) -> dict[tuple[str, str], list[float]]:
    """Returns the seconds of each round, by what was done ("save" or "restore") and how."""
    seconds: dict[tuple[str, str], list[float]] = {}
    checkpoints = checkpoint.Checkpoints(workdir)
    for step in range(1, 2 * rounds + 1):
        how = "with" if step % 2 else "without"
        with mock.patch.multiple(manifest, **NONE) if how == "without" else contextlib.nullcontext():
            began = time.perf_counter()
            checkpoints.save(step, state, config)
            checkpoints.save_failed(wait=True)
            seconds.setdefault(("save", how), []).append(time.perf_counter() - began)
            began = time.perf_counter()
            checkpoints.restore_newest(state)
            seconds.setdefault(("restore", how), []).append(time.perf_counter() - began)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workdir", help="where to write the checkpoints; default: a temporary directory")
    arguments = parser.parse_args(argv)
    config = configs.load_recipe(arguments.config)
    state = make_state(config)
    print(f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9:.3f} GB")
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as workdir:
        seconds = measure(config, state, arguments.rounds, pathlib.Path(workdir))
    for (what, how), times in seconds.items():
        median = statistics.median(times)
        print(f"{what}, {how} the manifest: {median:.3f} s ({min(times):.3f} to {max(times):.3f})")


if __name__ == "__main__":
    main()
