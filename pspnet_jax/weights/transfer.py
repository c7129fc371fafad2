"""A checkpoint's arrays as our variables, with every key accounted for; and our variables under semseg's names."""

import os
import pathlib
import re
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pspnet_jax import models
from pspnet_jax.weights import names, pytorch
from pspnet_jax.weights.settings import flags
from pspnet_jax.weights.source import Source, read

LISTED = 4  # of the keys that do not fit, how many a message names
FORMATS = {"torch": pytorch.write_torch, "safetensors": pytorch.write_safetensors}
ENDINGS = {"torch": (".pth", ".pt"), "safetensors": (".safetensors",)}
EXPORTED = names.KINDS["semseg"].model | {"stem": "deep", "bins": (1, 2, 3, 6)}  # the networks that semseg's code computes
EXPORTED_DEPTHS = (50, 101, 152)


def load(path: str | os.PathLike, model: models.PSPNet, partial: bool = False) -> dict[str, Any]:
    """Reads a checkpoint into the variables of a network.

    Args:
      path: a file that `inspect` recognizes.
      model: the network; its form has to be the file's.
      partial: leave classifiers of another class count out, and an auxiliary head that the file lacks.

    Returns:
      {"params", "batch_stats"}, nested dicts of float32 arrays; from a backbone alone their "backbone" and nothing else.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read; its network differs from the model, with the flags to set; or its keys do: the first of
        those that are unexpected, missing, of another shape, no floats or not finite, and how many there are.
    """
    source, arrays = read(path)
    _check_fields(source, model, partial)
    shapes = _shapes(model)
    known = {key: variable for variable in shapes if (key := source.key(variable))}
    wanted = {key: variable for key, variable in known.items() if not _left_out(variable, source, model)}
    _check_arrays(source, arrays, known.keys(), {key: shapes[variable] for key, variable in wanted.items()})
    flat = {variable: np.array(names.to_ours(arrays[key]), np.float32, order="C") for key, variable in wanted.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _shapes(model: models.PSPNet) -> dict[str, tuple[int, ...]]:
    """The shapes of all variables, with an auxiliary head's, as others store them."""
    model, image = model.clone(auxiliary=True), jnp.zeros((1, 64, 64, 3))  # any size has the same variables
    variables = jax.eval_shape(lambda: jax.tree.map(names.to_theirs, model.init(jax.random.key(0), image, train=False)))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables, sep="/").items()}


def _check_fields(source: Source, model: models.PSPNet, partial: bool) -> None:
    wrong = {}
    for field, value in source.model.items():
        present = _field(model, field)
        unused = field == "auxiliary" and (value or partial)
        if value not in (None, present) and not unused:
            wrong[field] = value
    if wrong:
        raise ValueError(f"{source}; the network differs from it: set {flags('model', wrong)}")
    if not partial and source.num_classes not in (None, model.num_classes):
        raise ValueError(f"{source}; the network has {model.num_classes} classes")


def _field(model: models.PSPNet, field: str) -> Any:
    value = getattr(model, field)
    return tuple(value) if field == "bins" else value


def _left_out(variable: str, source: Source, model: models.PSPNet) -> bool:
    """Whether a variable belongs to an auxiliary head that only one side has, or to a classifier of other classes."""
    unpaired = "/auxiliary" in variable and not (model.auxiliary and source.model.get("auxiliary"))
    return unpaired or ("classifier/" in variable and source.num_classes != model.num_classes)


def _check_arrays(source: Source, arrays: pytorch.Arrays, known: Set[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses arrays that are not known, and those wanted that are missing or cannot be what they should be."""
    present = {key: arrays[key] for key in wanted if key in arrays}
    dropped = re.compile(names.KINDS[source.kind].dropped)
    problems = {
        "unexpected": [k for k in arrays if k not in known and not dropped.fullmatch(k)],
        "missing": [k for k in wanted if k not in arrays],
        "of another shape": [f"{k} {v.shape}, not {wanted[k]}" for k, v in present.items() if v.shape != wanted[k]],
        "not floating point": [f"{k} ({v.dtype})" for k, v in present.items() if not jnp.issubdtype(v.dtype, jnp.floating)],
    }
    if not any(problems.values()):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is told as such
            finite = {key: np.isfinite(array.astype(np.float32)).all() for key, array in present.items()}
        problems = {"not finite in float32": [key for key in finite if not finite[key]]}
    told = [f"{len(v)} {what}: {', '.join(v[:LISTED])}{', ...' * (len(v) > LISTED)}" for what, v in problems.items() if v]
    if told:
        raise ValueError(f"{source}; its arrays do not fit: {'; '.join(told)}")


def save(path: str | os.PathLike, variables: Any, model: models.PSPNet, fmt: str) -> None:
    """Writes the variables of a network in semseg's form.

    Args:
      path: the file to write, in one piece or not at all.
      variables: {"params", "batch_stats"}, as they are used with `model`.
      model: a network that semseg's PSPNet computes too.
      fmt: "torch", a checkpoint as semseg's training writes it, with the prefix that its code expects; or "safetensors",
        the same arrays without the prefix.

    Raises:
      ValueError: semseg's code cannot compute this network, fmt is unknown, or torch is missing.
    """
    if fmt not in FORMATS:
        raise ValueError(f"--format {fmt}: expected one of {', '.join(FORMATS)}")
    path = pathlib.Path(path)
    if path.suffix not in ENDINGS[fmt]:
        raise ValueError(f"--output {path}: expected a name that ends in {' or '.join(ENDINGS[fmt])}, as --format is {fmt}")
    if path.exists():
        raise ValueError(f"--output {path}: is there already; choose another name, or delete it")
    wrong = [f"model.{f}={getattr(model, f)}, not {v}" for f, v in EXPORTED.items() if _field(model, f) != v]
    if model.depth not in EXPORTED_DEPTHS:
        wrong.append(f"model.depth={model.depth}, not one of {EXPORTED_DEPTHS}")
    if wrong:
        raise ValueError(f"{path}: semseg's PSPNet is another network than this one, which has {'; '.join(wrong)}")
    arrays = {}
    for ours, value in traverse_util.flatten_dict(variables, sep="/").items():
        key = names.KINDS["semseg"].key(ours, model.bins, model.depth)
        assert key is not None
        arrays[key] = np.array(names.to_theirs(np.asarray(value)), order="C")
        if key.endswith(".running_mean"):
            arrays[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    FORMATS[fmt](path, arrays)
