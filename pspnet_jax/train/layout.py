"""Contents of a checkpoint, and functions that read them.

WORKDIR/checkpoints/STEP contains the items weights, ema, optimizer, config, data, and sha256, the manifest of the others; and
score.json, if the checkpoint was evaluated. Evaluation reads only the config and either the weights or their moving average.
Checkpoints of version 0.1, which have everything but the config in STEP/state, are also supported.

Each process reads on its own, so that none waits for another that fails.
"""

from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, parallel
from pspnet_jax.errors import UserError
from pspnet_jax.train import integrity, manifest
from pspnet_jax.train.step import TrainState, Variables


def items(state: TrainState) -> dict[str, Any]:
    """Returns the trees to save, by item name."""
    trees = {"weights": state.weights, "optimizer": state.opt_state, "ema": state.ema}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}  # orbax cannot save empty trees


def item_names(directory: epath.Path, target: TrainState) -> Sequence[str]:
    """Returns the names of the items that `read_state` reads, and "config"."""
    return ("config", "state") if files.is_there(directory / "state") else ("config", *items(target))


def evaluated_item(directory: epath.Path) -> str:
    """Returns the item that `read_variables` reads: with a moving average in the config, "ema", even if it is missing."""
    if files.is_there(directory / "state"):
        return "state"
    has_config = files.is_there(directory / "config")
    return "ema" if has_config and read_config(directory)[0].optimizer.ema_decay else "weights"


def read_state(directory: epath.Path, target: TrainState) -> TrainState:
    """Reads a checkpoint into the target's shapes and shardings.

    Raises:
      OtherNetworkError: the saved arrays do not match the target.
      DamagedError: the checkpoint does not match its manifest.
      UserError: the directory name is not the step that the checkpoint was saved as.
    """
    _read_data(directory)
    if files.is_there(directory / "state"):
        parts = {"average" if name == "ema" else name: tree for name, tree in vars(target).items()}
        read = _read_tree(directory / "state", target.step.sharding, tuple(parts))
        old = jax.tree.unflatten(jax.tree.structure(parts), jax.tree.leaves(read))  # optax's empty states have changed since
        return TrainState(ema=old.pop("average"), **old)
    targets, reader, saved = items(target), ocp.StandardCheckpointHandler(), manifest.read(directory)
    integrity.check_shapes(directory, targets, saved)
    read = {name: reader.restore(directory / name, args=ocp.args.StandardRestore(tree)) for name, tree in targets.items()}
    for name, tree in read.items():
        manifest.verify(saved, name, tree)
    number = jax.device_put(jax.numpy.int32(int(directory.name)), target.step.sharding)
    return TrainState(number, opt_state=read.get("optimizer", target.opt_state), ema=read.get("ema"), **read["weights"])


def read_variables(directory: epath.Path, mesh: Mesh) -> Variables:
    """Reads the variables for evaluation (the moving average, if there is one), replicated over the mesh.

    Raises DamagedError if they do not match the checkpoint's manifest.
    """
    item, everywhere = evaluated_item(directory), parallel.replicated(mesh)
    if item == "state" and (average := _read_tree(directory / item, everywhere, ("average",))):
        return average["average"]
    variables = _read_tree(directory / item, everywhere)
    manifest.verify(manifest.read(directory), item, variables)
    return variables


def read_config(directory: epath.Path) -> tuple[ConfigDict, str]:
    """Reads the config and the training data fingerprint of a checkpoint. The fingerprint is empty if unknown.

    Raises:
      DamagedError: they do not match the checkpoint's manifest.
      UserError: the directory name is not the step that the checkpoint was saved as.
    """
    return configs.from_dict(_read_json(directory, "config")), _read_data(directory)["fingerprint"]


def _read_data(directory: epath.Path) -> dict[str, Any]:
    if not files.is_there(directory / "data"):  # written by version 0.1
        return {"fingerprint": ""}
    data = _read_json(directory, "data")
    if (step := data.get("step", int(directory.name))) != int(directory.name):
        raise UserError(f"{directory}: was saved as step {step}; rename it to {step} or, if it is a copy, move it away")
    return data


def _read_json(directory: epath.Path, item: str) -> dict[str, Any]:
    found = ocp.JsonCheckpointHandler().restore(directory / item)
    manifest.verify(manifest.read(directory), item, manifest.document(found))
    return found


def _read_tree(path: epath.Path, sharding: Sharding, parts: Sequence[str] = ("params", "batch_stats")) -> Any:
    """Reads the non-empty parts of a saved tree, with their saved shapes."""

    def target(saved: Any) -> Any:
        return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)

    reader = ocp.PyTreeCheckpointHandler()
    saved = reader.metadata(path).tree
    shapes = jax.tree.map(target, {name: saved[name] for name in parts if saved[name] is not None})
    if not shapes:
        return {}
    restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
    return reader.restore(path, args=ocp.args.PyTreeRestore(shapes, restore_args=restore_args, partial_restore=True))
