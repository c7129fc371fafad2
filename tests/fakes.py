"""Tiny datasets in the layouts of real ones, with contents that a test can compute."""

import pathlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.io
from PIL import Image

from pspnet_jax import datasets


def pair(split: str, index: int, size: tuple[int, int] = (40, 48), num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Returns random uint8[H,W,3] and a random label uint8[H,W] of 0..K-1 and 255, different for every split and index."""
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
    """Writes uint8[H,W] as gray or uint8[H,W,3] as RGB, in the format of the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def cut_pixels(path: pathlib.Path) -> None:
    """Keeps only the first half of a PNG's pixels, in a file with valid checksums."""
    contents, chunks, place = path.read_bytes(), [], 8
    while place < len(contents):
        size = int.from_bytes(contents[place : place + 4], "big")
        chunks.append((contents[place + 4 : place + 8], contents[place + 8 : place + 8 + size]))
        place += size + 12
    pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    half = zlib.compress(pixels[: len(pixels) // 2])
    chunks = [(kind, half if kind == b"IDAT" else data) for kind, data in chunks]
    sums = [zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks]
    parts = [len(data).to_bytes(4, "big") + kind + data + end for (kind, data), end in zip(chunks, sums, strict=True)]
    path.write_bytes(contents[:8] + b"".join(parts))


def write_palette(path: pathlib.Path, label: np.ndarray) -> None:
    """Writes uint8[H,W] as a palette PNG whose colors differ from the indices."""
    picture = Image.fromarray(label, "P")
    picture.putpalette([(7 * value + 100) % 256 for value in range(3 * 256)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_ade20k(root: pathlib.Path, splits: Mapping[str, int], size: tuple[int, int] = (40, 48)) -> pathlib.Path:
    """Writes `pair`s of 150 classes as images/training/ADE_train_00000001.jpg, annotations/training/ADE_train_00000001.png
    and so on, where 0 is void and classes count from 1."""
    for split, count in splits.items():
        for index in range(count):
            image, label = pair(split, index, size, 150)
            name = f"{split}/ADE_{ {'training': 'train', 'validation': 'val'}[split] }_{index + 1:08d}"
            write_image(root / f"images/{name}.jpg", image)
            write_image(root / f"annotations/{name}.png", np.where(label == 255, 0, label + 1).astype(np.uint8))
    return root


def write_voc2012(root: pathlib.Path, splits: Mapping[str, Sequence[str]], size: tuple[int, int] = (40, 48)) -> pathlib.Path:
    """Writes the pairs `pair("voc", int(name))` in VOC's layout, without labels for the split "test"."""
    for split, names in splits.items():
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            image, label = pair("voc", int(name), size, 21)
            write_image(root / f"JPEGImages/{name}.jpg", image)
            if split != "test":
                write_palette(root / f"SegmentationClass/{name}.png", label)
    return root


def write_sbd(root: pathlib.Path, splits: Mapping[str, Sequence[str]], size: tuple[int, int] = (40, 48)) -> pathlib.Path:
    """Writes the pairs `pair("sbd", int(name))` in SBD's layout: img/NAME.jpg and cls/NAME.mat, with 0 instead of 255."""
    for split, names in splits.items():
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            image, label = pair("sbd", int(name), size, 21)
            write_image(root / f"img/{name}.jpg", image)
            label = np.where(label == 255, 0, label).astype(np.uint8)
            (root / "cls").mkdir(exist_ok=True)
            boundaries = np.array([[np.eye(2)]] * 20, object)
            content = {"Segmentation": label, "Boundaries": boundaries, "CategoriesPresent": np.unique(label)[:, None]}
            scipy.io.savemat(root / f"cls/{name}.mat", {"GTcls": content}, do_compression=True)
    return root


def write_cityscapes(
    root: pathlib.Path, splits: Mapping[str, int], size: tuple[int, int] = (40, 48), kind: str = "labelIds"
) -> pathlib.Path:
    """Writes `pair`s of 19 classes as leftImg8bit/SPLIT/CITY/..., with labels of a kind (blank for "test", as published).

    The cities alternate between aachen and bochum, in "train_extra" between augsburg and bayreuth.
    """
    ids = np.full(256, 3, np.uint8)  # "out of roi", which is not scored
    ids[:19] = datasets.RAW_VALUES["cityscapes"]
    for split, count in splits.items():
        truth = "gtCoarse" if split == "train_extra" else "gtFine"
        for index in range(count):
            image, label = pair(split, index, size, 19)
            city = (("augsburg", "bayreuth") if split == "train_extra" else ("aachen", "bochum"))[index % 2]
            name = f"{split}/{city}/{city}_{index:06d}_000019"
            write_image(root / f"leftImg8bit/{name}_leftImg8bit.png", image)
            raw = label if kind == "labelTrainIds" else ids[label]
            write_image(root / f"{truth}/{name}_{truth}_{kind}.png", np.full_like(label, 3) if split == "test" else raw)
            write_image(root / f"{truth}/{name}_{truth}_color.png", image)
    return root


def write_pairs(
    root: pathlib.Path,
    images: str,
    labels: str,
    raw_values: Sequence[int],
    count: int = 2,
    size: tuple[int, int] = (40, 48),
) -> None:
    """Writes `pair("", index)`s of K classes, given the raw value of each class 0..K-1 and then that of 255.

    Args:
      root: the dataset's directory.
      images: path of an image below root, with {index}.
      labels: path of its label.
      raw_values: K + 1 values.
      count: number of pairs.
      size: height and width.
    """
    table = np.zeros(256, np.uint8)
    table[[*range(len(raw_values) - 1), 255]] = raw_values
    for index in range(count):
        image, label = pair("", index, size, len(raw_values) - 1)
        write_image(root / images.format(index=index), image)
        write_image(root / labels.format(index=index), table[label])
