"""Predicts images that need no labels."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from pspnet_jax import image_files
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.infer import submission
from pspnet_jax.infer.draw import overlay, palette_image, save
from pspnet_jax.infer.predictor import Example, Predictor
from pspnet_jax.progress import progress

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def predict(
    predictor: Predictor,
    variables: Any,
    images: Mapping[str, epath.PathLike],
    output: epath.PathLike,
    info: DatasetInfo,
    form: str = "",
) -> None:
    """Predicts images, each at its own size.

    Writes output/index/NAME.png (gray, the values are class indices), output/color/NAME.png (the same in a palette of the
    classes' colors) and output/overlay/NAME.jpg (half color, half image); or, given a form, only what that server takes.

    Args:
      predictor: for the classes of `info`.
      variables: weights, see `Predictor.place`.
      images: files by the names that results get, see `find_images`.
      output: a folder, made if need be.
      info: the classes.
      form: "cityscapes", "ade20k" or "voc" for a submission to the benchmark's server.

    Raises:
      UserError: an image cannot be read, or the form is of other classes.
    """
    server = submission.choose(form, info) if form else None
    output = epath.Path(output)
    with progress("predicting", len(images)) as advance:
        for group, labels in predictor.stream(predictor.place(variables), _examples(images)):
            for example, label in zip(group, np.asarray(labels), strict=False):
                image, name = example["image"], example["name"]
                label = label[: image.shape[0], : image.shape[1]]
                if server:
                    save(server.encode(label), output / server.folder / f"{name}.png")
                else:
                    write(output, name, image, label, info)
            advance(len(group))


def write(output: epath.Path, name: str, image: np.ndarray, label: np.ndarray, info: DatasetInfo) -> None:
    """Writes the three pictures of uint8[H, W, 3] and its prediction uint8[H, W]."""
    save(Image.fromarray(label), output / "index" / f"{name}.png")
    save(palette_image(label, info.colors), output / "color" / f"{name}.png")
    mixed = Image.fromarray(overlay(image, label, info.colors))
    save(mixed, output / "overlay" / f"{name}.jpg", "JPEG", quality=95, subsampling=0)  # crisp edges


def find_images(source: epath.PathLike, subfolders: bool = False) -> dict[str, epath.Path]:
    """Returns an image, or those in a folder (and in its subfolders), by name, in order.

    Raises:
      MissingFileError: there is no such file or folder, or no image in it.
      UserError: two images have the same name but for their endings, so that their results would overwrite each other.
    """
    source = epath.Path(source).expanduser()
    if not source.exists():
        raise MissingFileError(f"--input {source}: no such file or folder")
    if not source.is_dir():
        return {source.stem: source}
    found = _files_below(source) if subfolders else source.iterdir()
    paths = sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise MissingFileError(f"--input {source}: no images in this folder; expected files ending in {', '.join(SUFFIXES)}")
    by_name: dict[str, epath.Path] = {}
    for path in paths:
        if path.stem in by_name:
            raise UserError(
                f"--input {source}: {by_name[path.stem].name} and {path.name} would both be written as {path.stem}.png; "
                "rename one"
            )
        by_name[path.stem] = path
    return by_name


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():  # epath's rglob knows no gs://, and leaves links to folders out
        yield from _files_below(path) if path.is_dir() else [path]


def _examples(images: Mapping[str, epath.PathLike]) -> Iterator[Example]:
    for name, path in images.items():
        yield {"image": image_files.read(path), "name": name}
