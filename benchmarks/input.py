"""How fast training examples are made: decoding alone, the whole pipeline, and hszhao/semseg's loader on the same files.

python -m benchmarks.input [--semseg DIR] [--base DIR] [--repeats 12] [--seconds 8]
python -m benchmarks.input --python

Every measurement is a process of its own, which leaves out its first batches; the repeats go round all of them in turn,
and a ratio is the median of the ratios within each round, so that it holds where the machine's speed drifts.
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
    """Made-up training images like a benchmark's, in its layout and with its raw labels; the crop is that of its recipe."""

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
    """Writes COUNT pairs as a camera might see them: regions with outlines, shading within, and noise."""
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
    """Pairs read and decoded by TensorFlow and nothing else, BATCH of them at a time."""
    from pspnet_jax.data import tf

    pairs = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*_files(name, root), strict=True)))).repeat()

    def decode(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.io.decode_jpeg(tf.io.read_file(image), channels=3, dct_method="INTEGER_ACCURATE")  # PNGs as well
        return pixels, tf.io.decode_png(tf.io.read_file(label), channels=1)

    singles = pairs.map(decode, num_parallel_calls=os.cpu_count()).prefetch(2).as_numpy_iterator()
    return iter(lambda: [next(singles) for _ in range(BATCH)], None)


def ours(name: str, root: pathlib.Path) -> Iterable[object]:
    """This project's training batches with its default augmentation, blur and rotation included."""
    from pspnet_jax.config import base_config
    from pspnet_jax.data import pipeline

    config = base_config()
    config.dataset.name, config.dataset.root = name, str(root)
    config.batch_size, config.augment.crop, config.total_steps = BATCH, (KINDS[name].crop,) * 2, 10**9
    return pipeline.as_numpy(pipeline.train_dataset(config))


def python_milliseconds(name: str, root: pathlib.Path) -> float:
    """Returns the CPU time of an example of hardly any pixels: for no longer does an example hold Python's lock.

    Decoders, OpenCV and NumPy's loops over pixels run without the lock, and take next to no time here.
    """
    from pspnet_jax.config import base_config
    from pspnet_jax.data import augment, pipeline
    from pspnet_jax.data.order import AUGMENT, generator

    write_images(root, dataclasses.replace(KINDS[name], size=(32, 32)))
    config = base_config()
    config.dataset.name, config.dataset.root, config.augment.crop = name, str(root), (33, 33)
    data, times = pipeline.open_training(config), []
    for position in range(2000):
        began = time.thread_time()
        dataset, index = data.order[position]
        params = augment.sample_augmentation(generator(config.seed, AUGMENT, position), config.augment)
        augment.apply_augmentation(*data.reads[dataset](index), params, config.augment.crop, config.normalize.mean)
        times.append(time.thread_time() - began)
    return 1e3 * statistics.median(times)


def semseg(name: str, root: pathlib.Path) -> Iterable[object]:
    """The loader of semseg's tool/train.py with 2 workers, normalized float32 on the host as it makes them.

    It takes labels as they are: its users map them to classes beforehand.
    """
    collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]  # it was written for Python before 3.10
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


WAYS: dict[str, Callable[[str, pathlib.Path], Iterable[object]]] = {"decoding": decoding, "ours": ours, "semseg": semseg}


def measure(way: str, name: str, root: pathlib.Path, seconds: float) -> dict[str, float]:
    """Returns images a second, CPU milliseconds an image, and the most memory held, in MB, of this process and its workers."""
    batches = iter(WAYS[way](name, root))
    for _ in itertools.islice(batches, WARM_UP):
        pass
    began, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        images += BATCH
    rate = images / (time.perf_counter() - began)
    return {"rate": rate, "cpu": 1e3 * (_cpu_seconds() - cpu) / images, "memory": _peak_megabytes()}


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
    """Measures all ways on the same images, prints a table, and how ours compares with the others."""
    ways = [way for way in WAYS if way != "semseg" or arguments.semseg] + ["base"] * bool(arguments.base)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _, way in itertools.product(range(arguments.repeats), ways):
        command = [sys.executable, "-m", "benchmarks.input", "--way", "ours" if way == "base" else way]
        command += ["--kind", name, "--root", str(root)]
        command += ["--seconds", str(arguments.seconds), "--semseg", arguments.semseg]
        where = arguments.base if way == "base" else None
        environment = os.environ | {"PYTHONPATH": where} if where else None
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=where, env=environment)
        found[way].append(json.loads(done.stdout.splitlines()[-1]))
    sizes = (np.mean([os.path.getsize(file) / 1e3 for file in files]) for files in zip(*_files(name, root), strict=True))
    print(
        "\n{}-like: images of {:.0f} kB, labels of {:.0f} kB".format(name, *sizes),
        f"crop {KINDS[name].crop}, batch {BATCH}\n",
        sep=", ",
    )
    print("| | images/s, median | least | most | CPU ms an image, median | peak MB |\n| --- | --- | --- | --- | --- | --- |")
    for way, runs in found.items():
        rates, m = [run["rate"] for run in runs], {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        print(f"| {way} | {m['rate']:.1f} | {min(rates):.1f} | {max(rates):.1f} | {m['cpu']:.1f} | {m['memory']:.0f} |")
    for other in (way for way in ways if way != "ours"):
        pairs = list(zip(found["ours"], found[other], strict=True))
        rate, cpu = (statistics.median(one[k] / two[k] for one, two in pairs) for k in ("rate", "cpu"))
        print(f"\nours has {rate:.2f} times the images/s of {other}, and takes {cpu:.2f} times its CPU time an image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--semseg", default="", help="a checkout of hszhao/semseg")
    parser.add_argument("--base", default="", help="a checkout of this project in an earlier state, to compare with")
    parser.add_argument("--python", action="store_true", help="only Python's share of an example")
    parser.add_argument("--kind", choices=KINDS, help="only these images")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--way", choices=WAYS, help="only this one, once, as JSON, on the images at --root")
    parser.add_argument("--root", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.way:
        sys.path.append(arguments.semseg)
        print(json.dumps(measure(arguments.way, arguments.kind, arguments.root, arguments.seconds)), flush=True)
        os._exit(0)  # without the batches that are still under way
    for name in [arguments.kind] if arguments.kind else KINDS:
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            if arguments.python:
                share = python_milliseconds(name, root)
                print(f"{name}-like: {share:.2f} ms of Python an example, so at most {1e3 / share:.0f} images/s in a process")
                continue
            write_images(root, KINDS[name])
            compare(name, root, arguments)


if __name__ == "__main__":
    main()
