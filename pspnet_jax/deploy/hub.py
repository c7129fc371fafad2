"""A folder to upload to the Hugging Face hub: weights, config, preprocessing, model card, classes and a picture."""

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from pspnet_jax import datasets, files, parallel, report
from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.weights import own, pytorch, transfer

INSTALL = 'pip install "pspnet_jax @ git+https://github.com/OWNER/pspnet_jax"'  # as in README.md
EXAMPLE = """import pspnet_jax

segmenter = pspnet_jax.load("hf://USER/REPO")  # or the path of this folder
labels = segmenter("photo.jpg").labels  # uint8[H, W]"""
METRICS = {"mean_iou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}


class Score(NamedTuple):
    """One evaluation of the exported weights."""

    dataset: str  # its name or, for a folder of images, that of the run
    split: str
    protocol: str  # in words
    metrics: Mapping[str, float]  # fractions, by the keys of METRICS


def write(
    config: ConfigDict, variables: Any, folder: epath.Path, licence: str, scores: list[Score], picture: Image.Image | None
) -> None:
    """Writes the folder.

    Args:
      config: its model, normalize, dataset and eval describe the network.
      variables: of the network, as NumPy arrays.
      folder: a local directory that does not exist yet; it appears only when it is complete.
      licence: of the weights, by the hub's identifiers, such as "mit".
      scores: of these weights; without any, the card states none.
      picture: shown in the card.

    Raises:
      UserError: the folder exists, is remote or cannot be written; or the weights are not finite.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise UserError(f"{folder}: the run's weights contain values that are not finite, so they were not exported")
    described, info = own.describe(config), datasets.describe(config.dataset)
    arrays = transfer.semseg_arrays(variables, config.model)
    colors = (f'"{name}" {r} {g} {b}\n' for name, (r, g, b) in zip(info.class_names, info.colors, strict=True))
    with files.new_folder(folder) as temporary:
        metadata = {"format": "pt", own.LIBRARY: json.dumps(described)}
        pytorch.write_safetensors(temporary / own.WEIGHTS, arrays, metadata)
        _write_json(temporary / own.CONFIG, described)
        _write_json(temporary / "preprocessor_config.json", preprocessor(config.normalize))
        (temporary / "classes.txt").write_text("".join(colors), encoding="utf-8")
        if picture:
            picture.save(temporary / "example.png")
        (temporary / "README.md").write_text(card(config, licence, scores, bool(picture)), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def preprocessor(normalize: ConfigDict) -> dict[str, Any]:
    """Returns the preprocessing in the fields of the hub's image processors: (pixel / 255 - mean) / std for each channel."""
    bgr = normalize.order == "BGR"
    mean, std = ([value / 255 for value in (values[::-1] if bgr else values)] for values in (normalize.mean, normalize.std))
    return {
        "do_resize": False,
        "do_flip_channel_order": bgr,  # from RGB, before the mean is subtracted
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def card(config: ConfigDict, licence: str, scores: list[Score], has_picture: bool) -> str:
    """Returns the model card: its header, which the hub reads, and a text."""
    model, data, info = config.model, config.dataset, datasets.describe(config.dataset)
    header: dict[str, Any] = {
        "library_name": own.LIBRARY,
        "pipeline_tag": "image-segmentation",
        "license": licence,
        "tags": ["semantic-segmentation", "pspnet", "jax"],
    }
    if scores:
        header["model-index"] = [{"name": config.name, "results": [_result(score) for score in scores]}]
    rows = [
        f"| {s.dataset}, {s.split} | {s.protocol} | {' | '.join(f'{s.metrics[key]:.2%}' for key in METRICS)} |" for s in scores
    ]
    table = [f"| data | protocol | {' | '.join(METRICS.values())} |", "| --- | --- | --- | --- | --- |", *rows]
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        f"# {config.name}\n",
        f"PSPNet (Zhao et al., CVPR 2017) with a ResNet-{model.depth} of output stride {model.output_stride}, for "
        f"{info.num_classes} classes{'' if data.name == 'folder' else f' of {data.tfds_name or data.name}'}.\n",
        *(["![An image and its segmentation](example.png)\n"] if has_picture else []),
        f"```sh\n{INSTALL}\n```\n",
        f"```python\n{EXAMPLE}\n```\n",
        "## Score\n",
        *(["\n".join(table) + "\n"] if scores else ["These weights were not evaluated.\n"]),
        "## Input\n",
        f"RGB images, normalized as (pixel - mean) / std with mean {config.normalize.mean} and std {config.normalize.std} for "
        f"red, green and blue{', then in the order BGR' if config.normalize.order == 'BGR' else ''}.\n",
        "## Classes\n",
        ", ".join(f"{i} {name}" for i, name in enumerate(info.class_names)) + "; with their colors in `classes.txt`.\n",
    ]
    return "\n".join(lines)


def _result(score: Score) -> dict[str, Any]:
    metrics = [
        {"type": key, "value": round(100 * score.metrics[key], 2), "name": f"{name}, % ({score.protocol})"}
        for key, name in METRICS.items()
    ]
    dataset = {"name": score.dataset, "type": score.dataset, "split": score.split}
    return {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": metrics}


def example(segmenter: Callable[[], Segmenter], image: epath.Path | None, workdir: epath.Path) -> Image.Image | None:
    """Returns an image beside its prediction; without an image, one that training drew, or None if there is none."""
    if image:
        network = segmenter()
        result = network(image)
        return draw.side_by_side(result.image, {"prediction": result.labels}, network.info)
    drawn = sorted(path for path in (workdir / "pictures").glob("*.png") if path.name != "confusion_matrix.png")
    return Image.open(io.BytesIO(drawn[0].read_bytes())) if drawn else None


def _folder_name(root: str, config: ConfigDict) -> str:
    """Returns the name of the run for the folder that it was trained on, and that of the folder for another one."""
    return config.name if root in ("", config.dataset.root) else os.path.basename(root.rstrip("/"))


def _over(present: float | None, config: ConfigDict) -> str:
    """Returns over how many classes a mIoU is, if some are missing."""
    num_classes = datasets.describe(config.dataset).num_classes
    return f", mIoU over {present:.0f} of {num_classes} classes" if present is not None and present < num_classes else ""


def read_scores(
    workdir: epath.Path, step: int, config: ConfigDict, variables: Any, trained: Mapping[str, Any] | None
) -> list[Score]:
    """Returns the scores of a run's checkpoint: those of --mode evaluate, otherwise that of its training.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      config, variables: of the network; the reports of --mode evaluate have fields of the first, and a checksum of the second.
      trained: the metrics and settings that training saved with the checkpoint, see `train.checkpoint.Checkpoints.score`.
    """
    network = json.loads(json.dumps({"model": config.model.to_dict(), "normalize": config.normalize.to_dict()}))
    network["weights"] = parallel.checksum(variables)
    reports = [files.read_json(path) for path in sorted((workdir / "evaluation").glob("*.json"))]
    found = [r for r in reports if r.get("step") == step and network.items() <= r.items()]
    if not found and trained and trained.get("settings"):
        settings = {key.split(".", 1)[-1]: value for key, value in trained["settings"].items()}
        found = [{**trained, **settings, "dataset": settings.get("name")}]
    known = datasets.tables()
    return [
        Score(
            r["dataset"] if r["dataset"] in known else r.get("tfds_name") or _folder_name(r.get("root", ""), config),
            r["split"],
            report.describe_protocol(r) + _over(r.get("classes_in_mean_iou"), config),
            {key: r[key] for key in METRICS},
        )
        for r in found
        if {"dataset", "split", "protocol"} <= r.keys() and all(math.isfinite(r.get(key, math.nan)) for key in METRICS)
    ]
