"""Tiny datasets in the layouts that users have, with contents that a test can work out again."""

import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image


def pair(split: str, index: int, size: tuple[int, int] = (40, 48), num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Returns noise uint8[H,W,3] and labels uint8[H,W] of 0..K-1 and 255, different for every split and index."""
    random = np.random.default_rng([*split.encode(), index])
    label = random.integers(0, num_classes + 1, size, dtype=np.uint8)
    return random.integers(0, 256, (*size, 3), dtype=np.uint8), np.where(label == num_classes, 255, label).astype(np.uint8)


def write_folder(
    root: pathlib.Path, splits: Mapping[str, int], size: tuple[int, int] = (40, 48), num_classes: int = 4
) -> pathlib.Path:
    """Writes `pair`s as images/SPLIT/000.png, labels/SPLIT/000.png and so on, and classes.txt; returns the root."""
    for split, count in splits.items():
        for index in range(count):
            image, label = pair(split, index, size, num_classes)
            write_image(root / "images" / split / f"{index:03d}.png", image)
            write_image(root / "labels" / split / f"{index:03d}.png", label)
    (root / "classes.txt").write_text("".join(f"class {index}\n" for index in range(num_classes)))
    return root


def write_image(path: pathlib.Path, array: np.ndarray, **options: object) -> None:
    """Writes uint8[H,W] as gray or uint8[H,W,3] as RGB, in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_palette(path: pathlib.Path, label: np.ndarray) -> None:
    """Writes uint8[H,W] as a palette PNG, whose colors are not its indices."""
    picture = Image.fromarray(label, "P")
    picture.putpalette([(7 * value + 100) % 256 for value in range(3 * 256)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
