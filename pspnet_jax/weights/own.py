"""Our own format: a safetensors file with semseg's array names for any of our networks, and the config that describes it.

`--mode export --format hf` writes it as a folder, with the config in config.json and, for the file alone, in its metadata.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import safetensors
from etils import epath
from ml_collections import ConfigDict

import pspnet_jax
from pspnet_jax import config as configs
from pspnet_jax import datasets, files, models
from pspnet_jax.errors import UserError
from pspnet_jax.models.pspnet import RESNET_FIELDS
from pspnet_jax.weights.names import FAMILIES

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # file names of the Hugging Face hub
LIBRARY = "pspnet_jax"  # the value of "library_name", by which our configs are recognized
FAMILY = dataclasses.replace(FAMILIES["semseg"], title="a PSPNet of this package", model={}, normalize={})
# Fields of config.model that belong to the weights; the others belong to training or to the device.
MODEL_FIELDS = (*RESNET_FIELDS, "bins", "pool", "reduce_channels", "head_kernel", "align_corners", "auxiliary")
EVAL_FIELDS = ("protocol", "inference", "crop", "stride", "base_size", "short_size", "scales", "flip")


def describe(config: ConfigDict) -> dict[str, Any]:
    """Returns the contents of config.json for a network: plain values, with class names as the hub expects them."""
    info = datasets.describe(config.dataset)
    return {
        "library_name": LIBRARY,
        "library_version": pspnet_jax.__version__,
        "architectures": ["PSPNet"],
        "id2label": {str(i): name for i, name in enumerate(info.class_names)},
        "label2id": {name: i for i, name in enumerate(info.class_names)},
        "colors": [list(color) for color in info.colors],
        "model": {field: config.model[field] for field in MODEL_FIELDS},
        "normalize": config.normalize.to_dict(),
        "eval": {field: config.eval[field] for field in EVAL_FIELDS},
    }


def is_folder(path: epath.Path) -> bool:
    """Returns whether the path is a directory with model.safetensors."""
    return (path / WEIGHTS).exists()


def read_config(path: epath.Path) -> dict[str, Any]:
    """Returns the config beside a model.safetensors, or else in a file's metadata; empty if neither is ours."""
    if path.name == WEIGHTS and (beside := files.read_json(path.with_name(CONFIG))).get("library_name") == LIBRARY:
        return beside
    anything = ValueError, RecursionError, safetensors.SafetensorError  # which a stranger's metadata may cause
    with contextlib.suppress(*anything), safetensors.safe_open(path, "numpy") as file:
        found = json.loads((file.metadata() or {}).get(LIBRARY, "{}"))
        return found if isinstance(found, dict) else {}
    return {}


def fields(path: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a `Source` that a config determines.

    Raises:
      UserError: the config is incomplete or has an invalid value.
    """
    try:
        config = configs.from_dict({section: saved[section] for section in ("model", "normalize", "eval")})
        names = tuple(str(saved["id2label"][str(i)]) for i in range(len(saved["id2label"])))
        info = datasets.DatasetInfo("", names, tuple((int(r), int(g), int(b)) for r, g, b in saved["colors"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its {CONFIG} is incomplete or damaged ({error!r}); download it again") from error
    if problems := models.problems(config.model):
        raise UserError("\n".join(f"{path}: its {CONFIG} has {problem}" for problem in problems))
    return {
        "family": FAMILY,
        "model": {field: config.model[field] for field in MODEL_FIELDS},
        "normalize": config.normalize.to_dict(),
        "assumed": {"model": {}, "normalize": {}},
        "evaluation": {field: config.eval[field] for field in EVAL_FIELDS},
        "num_classes": info.num_classes,
        "levels": len(config.model.bins),
        "class_names": info.class_names,
        "colors": info.colors,
    }
