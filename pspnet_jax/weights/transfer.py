"""Converts checkpoints to our variables, accounting for every key, and our variables to semseg's format."""

import logging
import os
import re
from collections.abc import Mapping, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pspnet_jax import files, models
from pspnet_jax.errors import UserError
from pspnet_jax.models.pspnet import RESNET_FIELDS
from pspnet_jax.weights import names, pytorch
from pspnet_jax.weights.settings import flags
from pspnet_jax.weights.source import Source, read

logger = logging.getLogger(__name__)
FORMATS = {  # the writer, and the allowed file endings
    "torch": (pytorch.write_torch, (".pth", ".pt")),
    "safetensors": (pytorch.write_safetensors, (".safetensors",)),
}
Shapes = Mapping[str, tuple[int, ...]]
SEMSEG = names.FAMILIES["semseg"]
EXPORTABLE = {  # the networks that semseg's code can compute
    **SEMSEG.model,
    **{"channels": 3, "width": 64, "stem": "deep", "bins": (1, 2, 3, 6), "reduce_channels": True, "head_kernel": 3},
}
EXPORTABLE_DEPTHS = (50, 101, 152)


def load(path: str | os.PathLike, model: nn.Module, partial: bool = False) -> dict[str, Any]:
    """Returns the variables of a checkpoint for a network.

    Args:
      path: a file whose network `inspect` detects.
      model: a PSPNet made by `models.build` with the structure of the file's network. For a file with only a backbone, any
        module with a `models.ResNet` as its `backbone`.
      partial: skip an auxiliary head that the file lacks, and classifiers with another number of classes, unless the file names
        its classes: then, classifiers are returned in the file's shape.

    Returns:
      {"params", "batch_stats"}, nested dicts of float32 arrays; for a file with only a backbone, just their "backbone". If the
      network takes images with another number of channels, its first kernel is from `adapt_channels`.

    Raises:
      MissingFileError: the file does not exist.
      UserError: the file cannot be read; its network differs from the model (names the flags to set); or arrays are unexpected,
        missing, of another shape, not floats or not finite (gives their number and the first few). What the file does not
        specify (`Source.assumed`) may differ, with a warning.
    """
    source, arrays = read(path)
    fields = model_fields(model)
    _check_fields(source, fields, partial)
    shapes = _expected_shapes(source, model)
    known = {key: variable for variable in shapes if (key := source.key(variable))}
    wanted = {key: variable for key, variable in known.items() if not _is_skipped(variable, source, fields)}
    _check_arrays(source, arrays, known.keys(), wanted, shapes)
    if zero := [key for key, variable in wanted.items() if variable.endswith("/var") and not arrays[key].any()]:
        raise UserError(f"{source}; {len(zero)} of its variances are all zeros, such as {zero[0]}: the file is incomplete")
    if zero := [key for key, variable in wanted.items() if variable.endswith("/kernel") and not arrays[key].any()]:
        kernels = sum(variable.endswith("/kernel") for variable in wanted.values())
        logger.warning(f"{source}; {len(zero)} of its {kernels} kernels are all zeros, such as {zero[0]}")
    flat = {variable: _float32(names.to_hwio(arrays[key])) for key, variable in wanted.items()}
    order = {**source.assumed["normalize"], **source.normalize}["order"]
    return adapt_channels(traverse_util.unflatten_dict(flat, sep="/"), fields["channels"], str(source), order)


def adapt_channels(variables: Any, channels: int, name: str, order: str = "RGB") -> Any:
    """Returns variables whose first kernel takes images with this number of channels C, and logs if that changes it.

    From a kernel for c channels, such as red, green and blue, the first c channels of the new one are copied, and each further
    channel gets the mean of the c; with C < c, all channels get the mean. All are multiplied by c / C, so that images whose
    channels are equal keep their features. The new network takes the channels in the order of the files, so those of a kernel
    for BGR are reversed.

    Args:
      variables: of a network with a `models.ResNet` as its backbone; others are returned unchanged.
      channels: C.
      name: of the file or run, for the log.
      order: of the channels that the kernel takes, RGB or BGR.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    path = "params/backbone/stem_conv1/conv/kernel"
    if path not in flat or (given := np.shape(flat[path])[2]) == channels:
        return variables
    kernel = np.asarray(flat[path])[:, :, :: -1 if order == "BGR" else 1]
    kept, mean = kernel if channels > given else kernel[:, :, :0], kernel.mean(2, keepdims=True)
    means = np.repeat(mean, channels - kept.shape[2], 2)
    flat[path] = np.concatenate([kept, means], 2) * np.float32(given / channels)
    new = "the further ones start from their mean" if channels > given else "all start from their mean"
    logger.info(f"{name}: its first kernel, for {given} channels, is adapted to {channels}: {new}")
    return traverse_util.unflatten_dict(flat, sep="/")


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Returns num_classes and the fields of config.model, as far as the network consists of our modules."""
    fields: dict[str, Any] = {}
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if isinstance(backbone, models.ResNet):
        fields |= {field: getattr(backbone, field) for field in RESNET_FIELDS}
    if isinstance(model, models.PSPNet) and isinstance(head, models.PyramidHead):
        pyramid = model.pyramid or models.Pyramid(bins=())
        auxiliary = model.auxiliary_head
        if isinstance(pyramid, models.Pyramid) and isinstance(auxiliary, models.AuxiliaryHead | None):
            fields |= {"bins": tuple(pyramid.bins), "pool": pyramid.pool, "reduce_channels": pyramid.reduce_channels}
            fields |= {"head_kernel": head.kernel_size, "align_corners": model.align_corners}
            fields |= {"auxiliary": auxiliary is not None, "num_classes": head.num_classes}
    return fields


def _check_fields(source: Source, fields: Mapping[str, Any], partial: bool) -> None:
    if not {*source.model, *source.assumed["model"]} <= fields.keys():
        own = "a backbone other than models.ResNet" if "depth" not in fields else "parts that models.build does not make"
        raise UserError(f"{source}; it cannot be loaded into a network with {own}")
    adapted = ("channels", "auxiliary") if source.model.get("auxiliary") or partial else ("channels",)
    known = {field: value for field, value in source.model.items() if field not in adapted}
    if wrong := {field: value for field, value in known.items() if value != fields[field]}:
        raise UserError(f"{source}; the model differs: set {flags('model', wrong)}")
    if source.num_classes and source.levels != len(fields["bins"]):
        bins = flags("model", {"bins": ("...",) * source.levels})
        raise UserError(f"{source}; its pyramid has {source.levels} levels, but model.bins={fields['bins']}: set {bins}")
    if differing := {field: value for field, value in source.assumed["model"].items() if value != fields[field]}:
        logger.warning(f"{source}; ASSUMED to have {flags('model', differing)}, but other values are set")
    if not partial and source.num_classes not in (None, fields.get("num_classes")):
        raise UserError(f"{source}, but the model has {fields['num_classes']} classes")


def _expected_shapes(source: Source, model: Any) -> Shapes:
    """Returns the shapes in the file's layout (OIHW) of all variables that it may have, including an auxiliary head's."""
    if source.num_classes is None:
        network = models.PSPNet(model.backbone, models.PyramidHead(1))  # the head does not matter
    else:
        head = model.head.clone(num_classes=source.num_classes)
        network = model.clone(head=head, auxiliary_head=models.AuxiliaryHead(source.num_classes))
    network = network.clone(backbone=model.backbone.clone(channels=source.model.get("channels", 3)))
    image = jnp.zeros((1, 64, 64, network.backbone.channels))  # any size has the same variables
    variables = jax.eval_shape(lambda: jax.tree.map(names.to_oihw, network.init(jax.random.key(0), image, train=False)))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables, sep="/").items()}


def _is_skipped(variable: str, source: Source, fields: Mapping[str, Any]) -> bool:
    """Returns whether a variable is in an auxiliary head that only one side has, or in a classifier of other classes."""
    unpaired = "/auxiliary" in variable and not (fields["auxiliary"] and source.model["auxiliary"])
    other_classes = source.num_classes != fields.get("num_classes") and not source.class_names
    return unpaired or ("classifier/" in variable and other_classes)


def _check_arrays(source: Source, arrays: pytorch.Arrays, known: Set[str], wanted: Mapping[str, str], shapes: Shapes) -> None:
    """Refuses arrays that are not `known`, and `wanted` arrays (key -> variable) that are missing or wrong."""
    present = {key: arrays[key] for key in wanted if key in arrays}
    expected = {key: shapes[variable] for key, variable in wanted.items()}
    ignored = re.compile(source.family.ignored)
    problems = {
        "unexpected": [k for k in arrays if k not in known and not ignored.fullmatch(k)],
        "missing": [k for k in wanted if k not in arrays],
        "of another shape": [f"{k} {v.shape}, not {expected[k]}" for k, v in present.items() if v.shape != expected[k]],
        "not floating point": [f"{k} ({v.dtype})" for k, v in present.items() if not jnp.issubdtype(v.dtype, jnp.floating)],
    }
    if not any(problems.values()):
        problems = {
            "not finite in float32": [
                f"{k} {n}" for k, v in present.items() if (n := _format_count(~np.isfinite(_float32(v))))
            ],
            "with negative variances": [
                f"{k} {n}" for k, v in present.items() if wanted[k].endswith("/var") and (n := _format_count(v < 0))
            ],
        }
    found = [f"{len(k)} {what}: {', '.join(k[:4] + ['...'] * (len(k) > 4))}" for what, k in problems.items() if k]
    if found:
        raise UserError(f"{source}; its arrays do not fit: {'; '.join(found)}")


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is reported
        return np.array(array, np.float32, order="C")


def _format_count(wrong: np.ndarray) -> str:
    return f"({np.count_nonzero(wrong)} of {wrong.size} values)" if wrong.any() else ""


def check_output(path: str | os.PathLike, fmt: str) -> None:
    """Checks what `save` needs, as far as it is known without the network.

    Raises:
      UserError: fmt is unknown, or the path exists or has another ending.
    """
    if fmt not in FORMATS:
        raise UserError(f"--format {fmt}: expected one of {', '.join(FORMATS)}")
    file, (_, endings) = files.absolute(path), FORMATS[fmt]
    if file.suffix not in endings:
        raise UserError(f"--output {file}: expected a name that ends in {' or '.join(endings)}, for --format {fmt}")
    if file.exists():
        raise UserError(f"--output {file}: already exists; choose another name, or delete it")


def save(path: str | os.PathLike, variables: Any, model: nn.Module, fmt: str) -> None:
    """Writes the variables of a network in semseg's format.

    Args:
      path: the file to write; the write is atomic.
      variables: {"params", "batch_stats"} of `model`.
      model: a network that semseg's PSPNet can compute.
      fmt: "torch", a checkpoint like those of semseg's training, with the key prefix that its code expects; or
        "safetensors", the same arrays without the prefix.

    Raises:
      UserError: as `check_output`; or semseg's code cannot compute this network, torch is missing, or the file cannot be
        written.
    """
    check_output(path, fmt)
    file, (write, _) = files.absolute(path), FORMATS[fmt]
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise UserError(f"{file}: the run's weights contain values that are not finite, so they were not exported")
    fields = model_fields(model)
    if EXPORTABLE.keys() <= fields.keys():
        wrong = [f"model.{field}={fields[field]}, not {value}" for field, value in EXPORTABLE.items() if fields[field] != value]
        if fields["depth"] not in EXPORTABLE_DEPTHS:
            wrong.append(f"model.depth={fields['depth']}, not one of {EXPORTABLE_DEPTHS}")
    else:
        wrong = ["parts that models.build does not make"]
    if wrong:
        raise UserError(f"{file}: semseg's code cannot compute this network, which has {'; '.join(wrong)}")
    image = jnp.zeros((1, 64, 64, fields["channels"]))  # any size has the same variables
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    wanted, given = ({k: v.shape for k, v in traverse_util.flatten_dict(t, sep="/").items()} for t in (expected, variables))
    if differing := sorted(path for path in wanted | given if wanted.get(path) != given.get(path)):
        path = differing[0]
        raise UserError(
            f"{file}: the variables do not fit the network: {len(differing)} differ, such as {path}: "
            f"{given.get(path, 'missing')}; expected {wanted.get(path, 'none')}"
        )
    try:
        write(file, semseg_arrays(variables, fields))
    except OSError as error:
        raise UserError(f"--output {file}: cannot be written ({error}); no partial file was left") from error


def semseg_arrays(variables: Any, fields: Mapping[str, Any]) -> pytorch.Arrays:
    """Returns a network's arrays under semseg's names; `fields` are those of `model_fields` or config.model."""
    arrays = {}
    for path, value in traverse_util.flatten_dict(variables, sep="/").items():
        key = SEMSEG.key(path, fields["bins"], fields["depth"])
        assert key is not None
        arrays[key] = np.array(names.to_oihw(np.asarray(value)), order="C")
        if key.endswith(".running_mean"):
            arrays[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return arrays
