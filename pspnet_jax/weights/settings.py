"""Config fields that match a weights file: network, normalization, classes and protocol."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.errors import UserError
from pspnet_jax.weights import own
from pspnet_jax.weights.source import Source

logger = logging.getLogger(__name__)
DATASETS = {150: "ade20k", 21: "voc2012", 19: "cityscapes", 59: "pascal_context", 171: "coco_stuff"}  # by number of classes


def configure(config: ConfigDict, source: Source) -> None:
    """Sets config.model, normalize, dataset and eval to what is known or assumed about a segmentation network.

    Raises:
      UserError: the file has a backbone only.
    """
    if source.num_classes is None:
        raise UserError(f"{source}; there is nothing to evaluate: train from it with --config.init_from={source.path}")
    config.model.update({**source.assumed["model"], **source.model})
    config.normalize.update({**source.assumed["normalize"], **source.normalize})
    config.eval.update(source.evaluation)
    config.dataset.name, config.dataset.class_names, config.dataset.colors = _dataset(source, source.num_classes)


def _dataset(source: Source, num_classes: int) -> tuple[str, tuple[str, ...], tuple[datasets.Color, ...]]:
    """Returns the benchmark with this number of classes, unless the file names others or, if it is ours, has other colors."""
    if num_classes in DATASETS:
        info = datasets.table(DATASETS[num_classes])
        same_names = [*map(_folded, source.class_names)] in ([], [*map(_folded, info.class_names)])
        if same_names and (source.family is not own.FAMILY or source.colors in ((), info.colors)):
            return info.name, info.class_names, info.colors
    names = source.class_names or tuple(f"class {i}" for i in range(num_classes))
    return "folder", names, source.colors or datasets.voc_palette(num_classes)


def _folded(name: str) -> str:
    """Returns a name without what is spelled in several ways: case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()


def assumptions(config: ConfigDict, source: Source) -> str:
    """Lists the assumptions of `configure` that still hold in `config`, one per line; "" if there are none."""
    lines = [source.entry_note] if source.entry_note else []
    same = {s: {f: v for f, v in fields.items() if _matches(config[s][f], v)} for s, fields in source.assumed.items()}
    if any(same.values()):
        given = " ".join(flags(section, fields) for section, fields in same.items() if fields)
        lines.append(f"ASSUMED, since the file does not specify it (set what is different): {given}")
    name, names, _ = _dataset(source, source.num_classes or 0)
    if names and names == tuple(config.dataset.class_names) and not source.class_names:
        lines.append(
            f"ASSUMED from the number of classes, {len(names)}: --config.dataset.name={name} with the classes {names[0]!r} to "
            f"{names[-1]!r}; for other classes, set --config.dataset.name=folder --config.dataset.class_names=..."
        )
    return "\n".join(lines)


def check_normalize(normalize: ConfigDict, source: Source, fields: Collection[str] = ("mean", "std", "order")) -> None:
    """Checks the fields of `normalize` against those that the weights were trained with, and warns if these are only assumed.

    Raises:
      UserError: the file specifies another normalization; names the flags to set.
    """

    def differing(known: Mapping[str, Any]) -> str:
        compared = {field: value for field, value in known.items() if field in fields}
        return flags("normalize", {field: value for field, value in compared.items() if not _matches(normalize[field], value)})

    if wrong := differing(source.normalize):
        raise UserError(f"{source}; it was trained with another normalization: set {wrong}")
    if wrong := differing(source.assumed["normalize"]):
        logger.warning(f"{source}; ASSUMED to be trained with {wrong}, but other values are set")


def _matches(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return len(value) == len(expected) and np.allclose(value, expected, atol=0.01)
    return value == expected


def flags(section: str, fields: Mapping[str, Any]) -> str:
    """Returns fields as command-line arguments: "--config.model.bins=6,3,2,1 --config.model.auxiliary=false"."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return ",".join(map(str, value)) or "()"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"--config.{section}.{field}={text(value)}" for field, value in fields.items())
