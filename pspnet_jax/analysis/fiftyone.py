"""A dataset that FiftyOne opens, in its format `LegacyFiftyOneDataset`: pictures, label maps and samples.json.

fiftyone.Dataset.from_dir(dataset_dir="runs/x/report/fiftyone", dataset_type=fiftyone.types.LegacyFiftyOneDataset)
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from pspnet_jax.datasets import IGNORE
from pspnet_jax.infer import draw

FOLDER = "fiftyone"
FILES = {  # of an image, by field
    "filepath": "data/{:06d}.jpg",
    "ground_truth": "fields/ground_truth/{:06d}.png",
    "prediction": "fields/prediction/{:06d}.png",
    "confidence": "fields/confidence/{:06d}.png",
}


def make_folders(folder: pathlib.Path) -> None:
    """Creates the directories of the files in the folder of a report."""
    for file in FILES.values():
        (folder / FOLDER / file).parent.mkdir(parents=True)


def write_image(
    folder: pathlib.Path, index: int, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, confidence: np.ndarray
) -> None:
    """Writes the files of an image, see `pictures.write`, at its own size.

    The values of label maps are class indices plus 1: FiftyOne does not draw 0, which is void.
    """
    values = np.rint(confidence * 255).clip(0, 255).astype(np.uint8)
    labels = [np.where(label == IGNORE, 0, label + np.uint8(1)).astype(np.uint8) for label in (truth, prediction)]
    for file, array in zip(FILES.values(), (draw.to_rgb(image), *labels, values), strict=True):
        Image.fromarray(array).save(folder / FOLDER / file.format(index), quality=95, compress_level=3)  # of JPEG and of PNG


def write_samples(folder: pathlib.Path, document: Mapping[str, Any]) -> None:
    """Writes the images' scores and files, and the names of the classes, given the document in docs/report.md."""
    samples = []
    for index, row in enumerate(document["images"]):
        files = {field: file.format(index) for field, file in FILES.items()}
        labels = {field: {"_cls": "Segmentation", "mask_path": files[field]} for field in ("ground_truth", "prediction")}
        heatmap = {"_cls": "Heatmap", "map_path": files["confidence"], "range": [0, 255]}
        scores = {"mean_iou": row["mean_iou"], "pixel_accuracy": row["pixel_accuracy"], "mean_confidence": row["confidence"]}
        samples.append({"filepath": files["filepath"], "name": row["name"], **labels, "confidence": heatmap, **scores})
    names = [entry["name"] for entry in document["dataset"]["classes"]]
    info = {
        "default_mask_targets": {str(k + 1): name for k, name in enumerate(names)},
        "protocol": document["protocol"]["text"],
    }
    for name, content in (("metadata", {"media_type": "image", "info": info}), ("samples", {"samples": samples})):
        (folder / FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
