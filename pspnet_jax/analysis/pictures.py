"""The pictures of an image in a report: the image, its truth, the prediction, its errors and its confidence."""

import pathlib

import cv2
import numpy as np
from PIL import Image

from pspnet_jax.datasets import IGNORE, DatasetInfo
from pspnet_jax.infer import draw

MAX_SIDE = 2048  # pixels; larger pictures are reduced
QUALITY = 90
RIGHT, WRONG, VOID = (226, 232, 240), (220, 38, 38), (148, 163, 184)
KINDS = {"image": "jpg", "truth": "png", "prediction": "png", "error": "png", "confidence": "jpg"}
OF_RUN = ("prediction", "error", "confidence")  # which differ between two runs


def paths(index: int, prefix: str = "") -> dict[str, str]:
    """Returns the paths of an image's pictures in the folder of the report; `prefix` is for those of another run."""
    kinds = OF_RUN if prefix else KINDS
    return {kind: f"pictures/{index:06d}_{prefix}{kind}.{KINDS[kind]}" for kind in kinds}


def write(
    folder: pathlib.Path,
    names: dict[str, str],
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    confidence: np.ndarray,
    info: DatasetInfo,
) -> None:
    """Writes the pictures that `paths` names to the folder of a report, of at most `MAX_SIDE` pixels a side.

    They are made from an image [H, W, C], class indices uint8[H, W] (in the truth, also 255), and the probability of the
    predicted class f32[H, W], which is drawn from dark (0) to bright (1).
    """
    errors = np.where(truth == IGNORE, np.uint8(2), (truth != prediction).astype(np.uint8))
    labels = {"truth": (truth, info.colors), "prediction": (prediction, info.colors), "error": (errors, (RIGHT, WRONG, VOID))}
    for kind, path in names.items():
        if kind == "image":
            picture = Image.fromarray(_reduced(draw.to_rgb(image), cv2.INTER_AREA))
        elif kind == "confidence":
            level = _reduced(np.rint(confidence * 255).clip(0, 255).astype(np.uint8), cv2.INTER_AREA)
            picture = Image.fromarray(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS)[..., ::-1])
        else:
            label, colors = labels[kind]
            picture = draw.palette_image(_reduced(label, cv2.INTER_NEAREST), colors)
        picture.save(folder / path, quality=QUALITY, compress_level=3)  # of JPEG and of PNG


def _reduced(array: np.ndarray, interpolation: int) -> np.ndarray:
    """Returns a picture [H, W, ...] of at most `MAX_SIDE` pixels a side."""
    scale = MAX_SIDE / max(array.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(array)
    height, width = (max(1, round(side * scale)) for side in array.shape[:2])
    return cv2.resize(array, (width, height), interpolation=interpolation)
