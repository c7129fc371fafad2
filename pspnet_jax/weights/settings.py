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
ASSUMED = {  # where a file does not tell: the value taken, and what else it may be
    "align_corners": (False, True),
    "stride_in": ("conv1x1", "conv3x3"),
    "bins": ((1, 2, 3, 6), "..."),
}


def configure(config: ConfigDict, source: Source) -> None:
    """Writes what is known of a segmentation network into config.model, normalize, dataset and eval.

    Raises:
      UserError: it is a backbone alone.
    """
    if source.num_classes is None:
        raise UserError(f"{source}; there is nothing to evaluate: train from it with --config.init_from={source.path}")
    for field, value in source.model.items():
        if value is None:
            value, other = ASSUMED[field]
            flag = flags("model", {field: other})
            logger.warning("%s does not tell model.%s: it is %s without %s", source.path, field, value, flag)
        config.model[field] = value
    config.normalize.update(source.normalize)
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


def check_normalize(normalize: ConfigDict, source: Source) -> None:
    """Refuses to start from weights that were trained on otherwise normalized images.

    Raises:
      UserError: names the flags to set.
    """
    wrong = {field: value for field, value in source.normalize.items() if not _same(normalize[field], value)}
    if wrong:
        raise UserError(f"{source}; it was trained on images normalized otherwise: set {flags('normalize', wrong)}")


def _same(value: Any, expected: Any) -> bool:
    return value == expected if isinstance(expected, str) else np.allclose(value, expected, atol=0.01)


def flags(section: str, fields: Mapping[str, Any]) -> str:
    """The fields of a section as command-line arguments: "--config.model.bins=6,3,2,1 --config.model.auxiliary=false"."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return ",".join(map(str, value)) or "()"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"--config.{section}.{field}={text(value)}" for field, value in fields.items())
