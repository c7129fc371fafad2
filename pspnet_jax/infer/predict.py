"""Predicts pictures that have no labels: a file, or all in a folder."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from pspnet_jax import files
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.infer.draw import overlay, palette_image
from pspnet_jax.infer.progress import progress
from pspnet_jax.infer.windows import Example, Predictor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def predict(predictor: Predictor, variables: Any, source: epath.PathLike, output: epath.PathLike, info: DatasetInfo) -> int:
    """Predicts one image, or each in a folder, at its own size.

    Writes output/index/NAME.png (gray, the values are class indices), output/color/NAME.png (the same in a palette of the
    classes' colors) and output/overlay/NAME.jpg (half color, half image).

    Args:
      predictor: for the classes of `info`.
      variables: weights, see `Predictor.place`.
      source: an image, or a folder whose images are taken, not those of its subfolders.
      output: a folder, made if need be.
      info: the classes.

    Returns:
      The number of images.

    Raises:
      FileNotFoundError: `source` does not exist, or has no images.
      ValueError: an image cannot be read, or two have the same name.
    """
    paths = find_images(source)
    output = epath.Path(output)
    with progress("predicting", len(paths)) as advance:
        for group, labels in predictor.stream(predictor.place(variables), _examples(paths)):
            for example, label in zip(group, np.asarray(labels), strict=False):
                image = example["image"]
                write(output, example["name"], image, label[: image.shape[0], : image.shape[1]], info)
            advance(len(group))
    return len(paths)


def write(output: epath.Path, name: str, image: np.ndarray, label: np.ndarray, info: DatasetInfo) -> None:
    """Writes the three pictures of uint8[H, W, 3] and its prediction uint8[H, W]."""
    with files.atomic(output / "index" / f"{name}.png") as path, path.open("wb") as file:
        Image.fromarray(label).save(file, "PNG")
    with files.atomic(output / "color" / f"{name}.png") as path, path.open("wb") as file:
        palette_image(label, info.colors).save(file, "PNG")
    with files.atomic(output / "overlay" / f"{name}.jpg") as path, path.open("wb") as file:
        Image.fromarray(overlay(image, label, info.colors)).save(file, "JPEG", quality=95, subsampling=0)  # crisp edges


def find_images(source: epath.PathLike) -> list[epath.Path]:
    """Returns the images that `predict` takes, in the order of their names.

    Raises:
      FileNotFoundError: there is no such file or folder, or no image in it.
      ValueError: two images have the same name but for their endings, so that their results would overwrite each other.
    """
    source = epath.Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"--input {source}: no such file or folder")
    if not source.is_dir():
        return [source]
    paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"--input {source}: no images in this folder; expected files ending in {', '.join(SUFFIXES)}")
    by_name: dict[str, epath.Path] = {}
    for path in paths:
        if path.stem in by_name:
            raise ValueError(
                f"--input {source}: {by_name[path.stem].name} and {path.name} would both be written as {path.stem}.png; "
                "rename one"
            )
        by_name[path.stem] = path
    return paths


def read_image(path: epath.PathLike) -> np.ndarray:
    """Returns uint8[H, W, 3], RGB, turned upright as its EXIF orientation says.

    Raises:
      ValueError: the file is no image, is damaged, or has more than 8 bits a channel.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels, expected 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def _examples(paths: Sequence[epath.Path]) -> Iterator[Example]:
    for path in paths:
        yield {"image": read_image(path), "name": path.stem}
