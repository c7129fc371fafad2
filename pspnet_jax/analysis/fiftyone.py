"""A dataset that FiftyOne opens, in its format `LegacyFiftyOneDataset`: pictures, label maps and samples.json.

fiftyone.Dataset.from_dir(dataset_dir="runs/x/report/fiftyone", dataset_type=fiftyone.types.LegacyFiftyOneDataset)
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.infer import draw

FOLDER = "fiftyone"
LABELS = ("ground_truth", "prediction")  # fields with class indices + 1, as FiftyOne does not draw 0, which is void


def write_image(
    folder: pathlib.Path, index: int, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, confidence: np.ndarray
) -> None:
    """Writes the files of an image, see `pictures.write`, at its own size."""
    Image.fromarray(draw.to_rgb(image)).save(folder / _path(index, "image"), quality=95)
    for field, label in zip(LABELS, (truth, prediction), strict=True):
        values = np.where(label == IGNORE, 0, label + np.uint8(1)).astype(np.uint8)
        Image.fromarray(values).save(folder / _path(index, field), compress_level=3)
    Image.fromarray(np.rint(confidence * 255).clip(0, 255).astype(np.uint8)).save(folder / _path(index, "confidence"))


def make_folders(folder: pathlib.Path) -> None:
    """Creates the directories for the files of images in the folder of a report."""
    for field in ("image", *LABELS, "confidence"):
        (folder / _path(0, field)).parent.mkdir(parents=True, exist_ok=True)


def write_samples(folder: pathlib.Path, document: Mapping[str, Any], info: DatasetInfo) -> None:
    """Writes the samples, with the scores of the images, and the names and colors of the classes.

    Args:
      folder: of the report.
      document: see docs/report.md.
      info: the classes.
    """
    targets = {str(k + 1): name for k, name in enumerate(info.class_names)}
    samples = []
    for index, row in enumerate(document["images"]):
        fields: dict[str, Any] = {
            field: {"_cls": "Segmentation", "tags": [], "mask_path": _within(index, field)} for field in LABELS
        }
        fields["confidence"] = {
            "_cls": "Heatmap",
            "tags": [],
            "map_path": _within(index, "confidence"),
            "range": [0, 255],
        }
        scores = {name: row[name] for name in ("mean_iou", "pixel_accuracy")} | {"mean_confidence": row["confidence"]}
        samples.append({"filepath": _within(index, "image"), "tags": [], "name": row["name"], **fields, **scores})
    dataset = document["dataset"]
    metadata = {
        "name": f"{document['title']} {dataset['split']}",
        "media_type": "image",
        "info": {"protocol": document["protocol"]["text"], "run": document["run"]},
        "default_mask_targets": targets,
    }
    for name, content in (("metadata", metadata), ("samples", {"samples": samples})):
        (folder / FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _within(index: int, field: str) -> str:
    """Returns the path of a file of an image in the dataset's directory."""
    if field == "image":
        return f"data/{index:06d}.jpg"
    return f"fields/{field}/{index:06d}.png"


def _path(index: int, field: str) -> str:
    return f"{FOLDER}/{_within(index, field)}"
