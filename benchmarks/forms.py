"""Cost of label maps, 16 bits and color augmentation: examples per second of CPU time, relative to the plain form.

python -m benchmarks.forms [--kind ade20k] [--rounds 4]

Each example is loaded and augmented in one process, in all forms in turn, so that ratios stay valid while the machine's speed
changes. The images are those of benchmarks/input.py: JPEGs like ADE20K's, or PNGs like those of Cityscapes.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.input import COUNT, KINDS, REGIONS, write_images
from pspnet_jax.config import base_config
from pspnet_jax.data import augment, sources
from pspnet_jax.data.order import AUGMENT, generator

COLORS = [tuple(color) for color in np.random.default_rng(0).integers(0, 256, (REGIONS, 3)).tolist()]
MAPS = {
    "labels": {},
    "labels, with a map": {value: value for value in range(REGIONS)},
    "palette, with a map of colors": {color: index for index, color in enumerate(COLORS)},
    "RGB labels": {color: index for index, color in enumerate(COLORS)},
    "TIFF labels": {value: value for value in range(REGIONS)},
}
FOLDERS = {"labels": "gray", "labels, with a map": "gray", "palette, with a map of colors": "palette"}
FOLDERS |= {"RGB labels": "rgb", "TIFF labels": "tiff"}


def write_forms(root: pathlib.Path, kind: str) -> None:
    """Writes the same examples in every form: ROOT/FORM/train/NAME."""
    write_images(root / "plain", KINDS[kind])
    for number in range(COUNT):
        image_file, label_file = (root / "plain" / name.format(number) for name in (KINDS[kind].image, KINDS[kind].label))
        image, label = np.asarray(Image.open(image_file)), np.asarray(Image.open(label_file))
        wide = image.astype(np.uint16) * 257 + np.random.default_rng(number).integers(0, 256, image.shape, dtype=np.uint16) // 2
        palette = Image.fromarray(label, mode="P")
        palette.putpalette([channel for color in COLORS for channel in color])
        files = {
            f"gray/train/{number}.png": label,
            f"rgb/train/{number}.png": np.array(COLORS, np.uint8)[label][..., ::-1],
            f"tiff/train/{number}.tif": label,
            f"PNG 8/train/{number}.png": image[..., ::-1],
            f"PNG 16/train/{number}.png": wide[..., ::-1],
            f"TIFF 8/train/{number}.tif": image[..., ::-1],
            f"TIFF 16/train/{number}.tif": wide[..., ::-1],
        }
        for name, pixels in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            uncompressed = [cv2.IMWRITE_TIFF_COMPRESSION, 1] if name.endswith(".tif") else []
            cv2.imwrite(str(root / name), pixels, uncompressed)
        (root / "palette/train").mkdir(parents=True, exist_ok=True)
        palette.save(root / f"palette/train/{number}.png")
        (root / "original/train").mkdir(parents=True, exist_ok=True)
        os.link(image_file, root / f"original/train/{number}{image_file.suffix}")


def recipes(root: pathlib.Path, kind: str) -> dict[str, dict[str, ConfigDict]]:
    """Returns {title: {form: config}}; the first form of each is the plain one."""

    def recipe(images: str = "original", form: str = "labels", **fields: object) -> ConfigDict:
        config = base_config()
        config.dataset.root, config.dataset.class_names = str(root), tuple(f"c{index}" for index in range(REGIONS))
        config.dataset.images = f"{images}/{{split}}/{{name}}.*"
        config.dataset.labels = f"{FOLDERS[form]}/{{split}}/{{name}}.*"
        config.dataset.label_map = repr(MAPS[form]) if MAPS[form] else ""
        config.augment.crop = (KINDS[kind].crop, KINDS[kind].crop)
        config.update_from_flattened_dict(fields)
        if images.endswith("16"):
            config.dataset.image_dtype = "uint16"
        return config

    mmseg = {"augment.brightness": 32.0, "augment.contrast": (0.5, 1.5), "augment.saturation": (0.5, 1.5), "augment.hue": 18}
    return {
        "labels": {form: recipe(form=form) for form in MAPS},
        "PNG images": {"8 bits": recipe("PNG 8"), "16 bits": recipe("PNG 16")},
        "uncompressed TIFF images": {"8 bits": recipe("TIFF 8"), "16 bits": recipe("TIFF 16")},
        "colors": {"as they are": recipe(), "mmsegmentation's augmentation": recipe(**mmseg)},
    }


def measure(configs: dict[str, ConfigDict], rounds: int) -> dict[str, float]:
    """Returns the median CPU time in ms of loading and augmenting an example, by form; the first round is not counted."""
    opened = {form: sources.open_source(config.dataset, "train", check=False) for form, config in configs.items()}
    times: dict[str, list[float]] = {form: [] for form in configs}
    for number in range((rounds + 1) * len(next(iter(opened.values())))):
        for form, source in opened.items():
            config, began = configs[form], time.process_time()
            image, label = source.load(number % len(source))
            params = augment.sample_augmentation(generator(0, AUGMENT, number), config.augment)
            augment.apply_augmentation(image, label, params, config.augment.crop, config.normalize.mean)
            if number >= len(source):
                times[form].append(1e3 * (time.process_time() - began))
    return {form: statistics.median(values) for form, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="ade20k")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_forms(root, arguments.kind)
        print("| | CPU ms per example | rate relative to the first |\n| --- | --- | --- |")
        for title, configs in recipes(root, arguments.kind).items():
            times = measure(configs, arguments.rounds)
            first = next(iter(times.values()))
            for form, value in times.items():
                print(f"| {title}: {form} | {value:.1f} | {first / value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
