"""The network, preprocessing, classes and protocol of a source, as fields of a config."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import datasets
from pspnet_jax.errors import UserError
from pspnet_jax.weights.source import Source

logger = logging.getLogger(__name__)
DATASETS = {150: "ade20k", 21: "voc2012", 19: "cityscapes"}  # by the number of classes


def configure(config: ConfigDict, source: Source) -> None:
    """Writes what is known or assumed of a segmentation network into config.model, normalize, dataset and eval.

    Raises:
      UserError: it is a backbone alone.
    """
    if source.num_classes is None:
        raise UserError(f"{source}; there is nothing to evaluate: train from it with --config.init_from={source.path}")
    config.model.update({**source.assumed["model"], **source.model})
    config.normalize.update({**source.assumed["normalize"], **source.normalize})
    config.eval.update(source.evaluation)
    config.dataset.name, config.dataset.class_names, config.dataset.colors = _dataset(source, source.num_classes)


def _dataset(source: Source, num_classes: int) -> tuple[str, tuple[str, ...], tuple[datasets.Color, ...]]:
    """A benchmark by its number of classes, unless the file names most of its classes differently."""
    if num_classes in DATASETS:
        info = datasets.table(DATASETS[num_classes])
        same = sum(ours == theirs for ours, theirs in zip(info.class_names, source.class_names, strict=False))
        if not source.class_names or same > num_classes / 2:
            return info.name, info.class_names, info.colors
    names = source.class_names or tuple(f"class {i}" for i in range(num_classes))
    return "folder", names, source.colors or datasets.voc_palette(num_classes)


def assumptions(config: ConfigDict, source: Source) -> str:
    """Names, a line each, what the file does not tell and `config` has as `configure` assumes it; "" if there is nothing."""
    lines = [source.choice] if source.choice else []
    same = {s: {f: v for f, v in fields.items() if _same(config[s][f], v)} for s, fields in source.assumed.items()}
    if any(same.values()):
        given = " ".join(flags(section, fields) for section, fields in same.items() if fields)
        lines.append(f"ASSUMED, since the file does not tell (set what is otherwise): {given}")
    name, names, _ = _dataset(source, source.num_classes or 0)
    if names and names == tuple(config.dataset.class_names) and not source.class_names:
        lines.append(
            f"ASSUMED, by their number, {len(names)}: --config.dataset.name={name} with the classes {names[0]!r} to "
            f"{names[-1]!r}; if they are others, set --config.dataset.name=folder --config.dataset.class_names=..."
        )
    return "\n".join(lines)


def check_normalize(normalize: ConfigDict, source: Source) -> None:
    """Refuses weights whose file says that they were trained on otherwise normalized images; warns where that is assumed.

    Raises:
      UserError: names the flags to set.
    """

    def unlike(fields: Mapping[str, Any]) -> str:
        return flags("normalize", {field: value for field, value in fields.items() if not _same(normalize[field], value)})

    if wrong := unlike(source.normalize):
        raise UserError(f"{source}; it was trained on images normalized otherwise: set {wrong}")
    if wrong := unlike(source.assumed["normalize"]):
        logger.warning(f"{source}; ASSUMED to be trained with {wrong}, but other values are set")


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return len(value) == len(expected) and np.allclose(value, expected, atol=0.01)
    return value == expected


def flags(section: str, fields: Mapping[str, Any]) -> str:
    """The fields of a section as command-line arguments: "--config.model.bins=6,3,2,1 --config.model.auxiliary=false"."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return ",".join(map(str, value)) or "()"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"--config.{section}.{field}={text(value)}" for field, value in fields.items())
