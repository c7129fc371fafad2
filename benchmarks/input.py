"""Speed of the input pipeline: decoding alone, the whole pipeline, and hszhao/semseg's loader on the same files.

python -m benchmarks.input [--semseg DIR] [--base DIR] [--repeats 12] [--seconds 8]
python -m benchmarks.input --python

Every measurement runs in its own process and excludes the first batches. Each repeat measures every method once. A ratio is the
median of the ratios within each repeat, so that it is still valid if the speed of the machine changes over time.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

BATCH, COUNT, REGIONS = 16, 16, 19
MEAN, STD = (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
WARM_UP = 4  # batches


@dataclasses.dataclass(frozen=True)
class Kind:
    """Synthetic training images like a benchmark's, in its layout and with its raw labels; the crop is that of its recipe."""

    size: tuple[int, int]  # height, width
    crop: int
    noise: float  # standard deviation, gray levels
    image: str
    label: str


KINDS = {
    "cityscapes": Kind(
        (1024, 2048),
        713,
        0.8,
        "leftImg8bit/train/aachen/aachen_{:06}_000019_leftImg8bit.png",
        "gtFine/train/aachen/aachen_{:06}_000019_gtFine_labelIds.png",
    ),
    "ade20k": Kind((512, 683), 473, 2.5, "images/training/ADE_train_{:08}.jpg", "annotations/training/ADE_train_{:08}.png"),
}


def write_images(root: pathlib.Path, kind: Kind) -> None:
    """Writes COUNT pairs that resemble photos: regions with outlines, shading and noise."""
    for index in range(COUNT):
        rng = np.random.default_rng(index)
        label = np.argmax([_smooth(rng, *kind.size, cells=7) for _ in range(REGIONS)], axis=0).astype(np.uint8)
        color = rng.uniform(30, 220, (REGIONS, 3))[label]
        for cells, strength in ((6, 25), (40, 12), (100, 5)):
            color += strength * np.stack([_smooth(rng, *kind.size, cells)] * 3, axis=-1)
        color += kind.noise * rng.standard_normal((*kind.size, 3))
        for name, array in ((kind.image, color), (kind.label, label)):
            path = root / name.format(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).save(path, quality=90)


def _smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    coarse = rng.standard_normal((cells, 2 * cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def decoding(name: str, root: pathlib.Path) -> Iterable[object]:
    """Yields batches of BATCH pairs that are only read and decoded, by TensorFlow."""
    from pspnet_jax.data import tf

    pairs = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*_files(name, root), strict=True)))).repeat()

    def decode(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.io.decode_jpeg(tf.io.read_file(image), channels=3, dct_method="INTEGER_ACCURATE")  # decodes PNGs too
        return pixels, tf.io.decode_png(tf.io.read_file(label), channels=1)

    singles = pairs.map(decode, num_parallel_calls=os.cpu_count()).prefetch(2).as_numpy_iterator()
    return iter(lambda: [next(singles) for _ in range(BATCH)], None)


def ours(name: str, root: pathlib.Path, **augment: object) -> Iterable[object]:
    """Yields this project's training batches with its default augmentation, including blur and rotation."""
    from pspnet_jax.config import base_config
    from pspnet_jax.data import pipeline

    config = base_config()
    config.dataset.name, config.dataset.root = name, str(root)
    config.batch_size, config.augment.crop, config.total_steps = BATCH, (KINDS[name].crop,) * 2, 10**9
    config.augment.update(augment)
    return pipeline.as_numpy(pipeline.train_dataset(config))


def colors(name: str, root: pathlib.Path) -> Iterable[object]:
    """Yields the same batches with the brightness, contrast, saturation and hue of mmsegmentation's recipes."""
    return ours(name, root, brightness=32.0, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18)


def python_milliseconds(name: str, root: pathlib.Path) -> float:
    """Returns the CPU time of a tiny example: an upper bound of the time for which an example holds the GIL.

    Decoders, OpenCV and NumPy's loops over pixels release the GIL, and take hardly any time for a tiny example.
    """
    from pspnet_jax.config import base_config
    from pspnet_jax.data import augment, pipeline
    from pspnet_jax.data.order import AUGMENT, generator

    write_images(root, dataclasses.replace(KINDS[name], size=(32, 32)))
    config = base_config()
    config.dataset.name, config.dataset.root, config.augment.crop = name, str(root), (33, 33)
    data, times = pipeline.open_training(config), []
    for position in range(2000):
        start = time.thread_time()
        dataset, index = data.order[position]
        params = augment.sample_augmentation(generator(config.seed, AUGMENT, position), config.augment)
        augment.apply_augmentation(*data.readers[dataset](index), params, config.augment.crop, config.normalize.mean)
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


def semseg(name: str, root: pathlib.Path) -> Iterable[object]:
    """Yields batches from the loader of semseg's tool/train.py with 2 workers: normalized float32 images.

    The loader does not map labels to classes: its users do that beforehand.
    """
    collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]  # semseg was written for Python before 3.10
    import cv2
    import torch
    from util import dataset, transform

    cv2.ocl.setUseOpenCL(False)
    cv2.setNumThreads(0)
    crop = KINDS[name].crop
    steps = [
        transform.RandScale([0.5, 2.0]),
        transform.RandRotate([-10, 10], padding=list(MEAN), ignore_label=255),
        transform.RandomGaussianBlur(),
        transform.RandomHorizontalFlip(),
        transform.Crop([crop, crop], crop_type="rand", padding=list(MEAN), ignore_label=255),
        transform.ToTensor(),
        transform.Normalize(mean=MEAN, std=STD),
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pairs:
        pairs.writelines(f"{image} {label}\n" for image, label in 200 * _files(name, root))
        pairs.flush()
        data = dataset.SemData("train", str(root), pairs.name, transform.Compose(steps))
    return iter(torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=2, drop_last=True))


def _files(name: str, root: pathlib.Path) -> list[tuple[str, str]]:
    kind = KINDS[name]
    return [(str(root / kind.image.format(index)), str(root / kind.label.format(index))) for index in range(COUNT)]


METHODS: dict[str, Callable[[str, pathlib.Path], Iterable[object]]] = {
    "decoding": decoding,
    "ours": ours,
    "colors": colors,
    "semseg": semseg,
}


def measure(method: str, name: str, root: pathlib.Path, seconds: float) -> dict[str, float]:
    """Returns images per second, CPU ms per image, and the peak memory in MB, of this process and its workers."""
    batches = iter(METHODS[method](name, root))
    for _ in itertools.islice(batches, WARM_UP):
        pass
    start, cpu_start, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        images += BATCH
    rate = images / (time.perf_counter() - start)
    return {"rate": rate, "cpu": 1e3 * (_cpu_seconds() - cpu_start) / images, "memory": _peak_megabytes()}


def _cpu_seconds() -> float:
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _peak_megabytes() -> float:
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for child in multiprocessing.active_children():
        status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
        total += int(status.split("VmHWM:")[1].split()[0]) / 1024
    return total


def compare(name: str, root: pathlib.Path, arguments: argparse.Namespace) -> None:
    """Measures all methods on the same images, and prints a table and the ratios of ours to the others."""
    methods = [method for method in METHODS if method != "semseg" or arguments.semseg] + ["base"] * bool(arguments.base)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _, method in itertools.product(range(arguments.repeats), methods):
        command = [sys.executable, "-m", "benchmarks.input", "--way", "ours" if method == "base" else method]
        command += ["--kind", name, "--root", str(root)]
        command += ["--seconds", str(arguments.seconds), "--semseg", arguments.semseg]
        where = arguments.base if method == "base" else None
        environment = os.environ | {"PYTHONPATH": where} if where else None
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=where, env=environment)
        found[method].append(json.loads(done.stdout.splitlines()[-1]))
    sizes = (np.mean([os.path.getsize(file) / 1e3 for file in files]) for files in zip(*_files(name, root), strict=True))
    print(
        "\n{}-like: images of {:.0f} kB, labels of {:.0f} kB".format(name, *sizes),
        f"crop {KINDS[name].crop}, batch {BATCH}\n",
        sep=", ",
    )
    print("| | images/s, median | least | most | CPU ms per image, median | peak MB |\n| --- | --- | --- | --- | --- | --- |")
    for method, runs in found.items():
        rates, m = [run["rate"] for run in runs], {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        print(f"| {method} | {m['rate']:.1f} | {min(rates):.1f} | {max(rates):.1f} | {m['cpu']:.1f} | {m['memory']:.0f} |")
    for other in (method for method in methods if method != "ours"):
        pairs = list(zip(found["ours"], found[other], strict=True))
        rate, cpu = (statistics.median(one[k] / two[k] for one, two in pairs) for k in ("rate", "cpu"))
        print(f"\nours has {rate:.2f} times the images/s of {other}, and takes {cpu:.2f} times its CPU time per image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--semseg", default="", help="a checkout of hszhao/semseg")
    parser.add_argument("--base", default="", help="an earlier checkout of this project to compare with")
    parser.add_argument("--python", action="store_true", help="measure only the time for which an example holds the GIL")
    parser.add_argument("--kind", choices=KINDS, help="measure only with these images")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument(
        "--way", dest="method", choices=METHODS, help="measure only this, once, on the images in --root, as JSON"
    )
    parser.add_argument("--root", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.method:
        sys.path.append(arguments.semseg)
        print(json.dumps(measure(arguments.method, arguments.kind, arguments.root, arguments.seconds)), flush=True)
        os._exit(0)  # do not wait for pending batches
    for name in [arguments.kind] if arguments.kind else KINDS:
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            if arguments.python:
                share = python_milliseconds(name, root)
                print(f"{name}-like: {share:.2f} ms of Python per example, so at most {1e3 / share:.0f} images/s per process")
                continue
            write_images(root, KINDS[name])
            compare(name, root, arguments)


if __name__ == "__main__":
    main()
