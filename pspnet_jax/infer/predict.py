"""Predicts pictures that have no labels: a file, or all in a folder."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from pspnet_jax import files
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.infer import submission
from pspnet_jax.infer.draw import overlay, palette_image
from pspnet_jax.progress import progress
from pspnet_jax.infer.windows import Example, Predictor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def predict(
    predictor: Predictor,
    variables: Any,
    source: epath.PathLike,
    output: epath.PathLike,
    info: DatasetInfo,
    form: str = "",
) -> int:
    """Predicts one image, or each in a folder, at its own size.

    Writes output/index/NAME.png (gray, the values are class indices), output/color/NAME.png (the same in a palette of the
    classes' colors) and output/overlay/NAME.jpg (half color, half image); or, given a form, only what that server takes.

    Args:
      predictor: for the classes of `info`.
      variables: weights, see `Predictor.place`.
      source: an image, or a folder whose images are taken; those of its subfolders, too, if a form is given.
      output: a folder, made if need be.
      info: the classes.
      form: "cityscapes", "ade20k" or "voc" for a submission to the benchmark's server.

    Returns:
      The number of images.

    Raises:
      FileNotFoundError: `source` does not exist, or has no images.
      ValueError: an image cannot be read, two have the same name, or the form is of other classes.
    """
    server = submission.choose(form, info) if form else None
    paths = find_images(source, subfolders=bool(form))
    output = epath.Path(output)
    with progress("predicting", len(paths)) as advance:
        for group, labels in predictor.stream(predictor.place(variables), _examples(paths)):
            for example, label in zip(group, np.asarray(labels), strict=False):
                image, name = example["image"], example["name"]
                label = label[: image.shape[0], : image.shape[1]]
                if server:
                    _save(server.encode(label), output / server.folder / f"{name}.png", "PNG")
                else:
                    write(output, name, image, label, info)
            advance(len(group))
    return len(paths)


def write(output: epath.Path, name: str, image: np.ndarray, label: np.ndarray, info: DatasetInfo) -> None:
    """Writes the three pictures of uint8[H, W, 3] and its prediction uint8[H, W]."""
    _save(Image.fromarray(label), output / "index" / f"{name}.png", "PNG")
    _save(palette_image(label, info.colors), output / "color" / f"{name}.png", "PNG")
    mixed = Image.fromarray(overlay(image, label, info.colors))
    _save(mixed, output / "overlay" / f"{name}.jpg", "JPEG", quality=95, subsampling=0)  # crisp edges


def _save(picture: Image.Image, path: epath.Path, kind: str, **options: Any) -> None:
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        picture.save(file, kind, **options)


def find_images(source: epath.PathLike, subfolders: bool = False) -> list[epath.Path]:
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
    found = _files_below(source) if subfolders else source.iterdir()
    paths = sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
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


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files_below(path) if path.is_dir() else [path]


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
