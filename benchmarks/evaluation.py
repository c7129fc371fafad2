"""Time and memory of evaluation outside the network, and our predicted labels compared with those of semseg's test code.

python -m benchmarks.evaluation time                                    # share of time spent outside the network
python -m benchmarks.evaluation memory                                  # peak host memory
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.evaluation balance    # share of window slots used
python -m benchmarks.evaluation labels --semseg PATH --images FOLDER    # against tool/test.py of a clone of hszhao/semseg

The last command needs torch, opencv-python and pyyaml.
"""

import argparse
import importlib
import itertools
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.fidelity import random_image, randomize
from pspnet_jax import image_files, models, weights
from pspnet_jax.config import base_config
from pspnet_jax.infer.inputs import find_images
from pspnet_jax.infer.memory import WINDOWS
from pspnet_jax.infer.plan import plan_images
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.protocols import PROTOCOLS

SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# depth; height and width of the image; K; and of config.eval: crop, base_size, and short_size for mmseg
CAMVID = (18, 360, 480, 11, (181, 241), 480, 360)
CITYSCAPES = (50, 1024, 2048, 19, (713, 713), 2048, 1024)
ADE20K_CROP, ADE20K_SIZE, MMSEG_ADE20K = (473, 473), 512, (2048, 512)


def settings(protocol: str, crop: tuple[int, int], base_size: int, short_size: int, **fields: Any) -> ConfigDict:
    config = base_config()
    config.eval.update({"protocol": protocol, "crop": crop, "base_size": base_size, "scales": SIX} | fields)
    config.eval.short_size = short_size if protocol == "mmseg" else 0
    return config


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """Returns the shortest of several runs, after one to compile; other programs can only make a run slower."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def trivial_network(bias: jax.Array, x: jax.Array) -> jax.Array:
    """Computes logits for all classes at the least possible cost."""
    return x[..., :1] + bias


def share_outside(protocol: str, case: tuple, repeat: int) -> None:
    """Prints the seconds spent outside the network and in it, and the share spent outside."""
    depth, height, width, num_classes, crop, base_size, short_size = case
    config = settings(protocol, crop, base_size, short_size)
    config.model.depth = depth
    image = random_image(height, width)
    predictor = Predictor(trivial_network, config, num_classes)
    bias = predictor.place(np.zeros(num_classes, np.float32))
    outside = seconds(lambda: predictor.labels(bias, [image]).block_until_ready(), repeat)

    model = models.build(config.model, num_classes)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False)
    network = jax.jit(model.apply, static_argnames="train")
    inside, calls = 0.0, {}
    for batch in plan_images([image], PROTOCOLS[protocol](config), 1, lambda size: WINDOWS).batches:
        calls[batch.pixels.shape] = calls.get(batch.pixels.shape, 0) + (1 if PROTOCOLS[protocol].flips_views else 2)
    for shape, times in calls.items():
        x = jnp.zeros(shape)
        inside += times * seconds(lambda x=x: network(variables, x, train=False).block_until_ready(), min(repeat, 2))
    share = outside / (outside + inside)
    print(
        f"| R{depth}, {width}x{height}, K = {num_classes} | {protocol} | {outside:.2f} | {inside:.1f} | {share:.1%} |",
        flush=True,
    )


def peak_memory(protocol: str, batch_size: int) -> None:
    """Prints the peak memory of this process, which must be a new one, for 2000x1500 pixels, K = 150, six scales and flip."""
    crop, sizes = ((512, 512), MMSEG_ADE20K) if protocol == "mmseg" else (ADE20K_CROP, (ADE20K_SIZE, 0))
    predictor = Predictor(trivial_network, settings(protocol, crop, *sizes, batch_size=batch_size), 150)
    bias = predictor.place(np.zeros(150, np.float32))
    for _ in range(2):
        predictor.labels(bias, [random_image(1500, 2000)]).block_until_ready()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB to GiB
    print(f"| {protocol} | {batch_size} | {peak:.2f} |", flush=True)


def balance(count: int, protocol: str) -> None:
    """Prints the share of window slots in use for images of ADE20K-like sizes, with a trivial network for two classes."""
    rng = np.random.default_rng(0)
    shorts = rng.integers(448, 577, count)
    longs = np.minimum(2048, shorts * 4 ** rng.uniform(size=count)).astype(int)
    images = [random_image(*rng.permutation(sides)) for sides in zip(shorts, longs, strict=True)]
    sizes = MMSEG_ADE20K if protocol == "mmseg" else (ADE20K_SIZE, 0)
    for scales, windows in itertools.product(((1.0,), SIX), (1, 4, 8)):
        config = settings(protocol, ADE20K_CROP, *sizes, scales=scales, batch_size=windows * jax.device_count())
        predictor = Predictor(trivial_network, config, 2)
        for _, labels, _ in predictor.stream(predictor.place(np.zeros(2, np.float32)), ({"image": image} for image in images)):
            labels.block_until_ready()
        print(
            f"| {protocol} | {len(scales)} | {jax.device_count()} | {windows} | {predictor.windows / predictor.slots:.1%} |",
            flush=True,
        )


class Semseg:
    """The authors' tool/test.py with random weights: PSPNet-50, 11 classes."""

    def __init__(self, path: str, checkpoint: pathlib.Path, image: np.ndarray, config: ConfigDict):
        """Writes random weights to a checkpoint; batch normalization takes its statistics from the image."""
        import torch

        sys.path.insert(0, path)
        torch.Tensor.cuda = lambda tensor: tensor  # the tool requires a GPU
        self._tool, self._config, self._probabilities = importlib.import_module("tool.test"), config, np.zeros(())
        self._tool.logger = importlib.import_module("logging").getLogger("semseg")
        self._network = importlib.import_module("model.pspnet").PSPNet(layers=50, classes=11, pretrained=False).eval()
        pixels = np.array(models.normalize(jnp.asarray(image[:321, :321]), config.normalize))
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        randomize(self._network, self._network, pixels)
        with torch.no_grad():  # no class dominates on average
            self._network.cls[-1].bias -= self._network(pixels).mean((0, 2, 3))
        torch.save({"state_dict": torch.nn.DataParallel(self._network).state_dict()}, checkpoint)
        scale_process = self._tool.scale_process

        def record(*args: Any) -> Any:
            found = scale_process(*args)
            self._probabilities = self._probabilities + found
            return found

        self._tool.scale_process = record

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs `test` unchanged; returns labels [H, W], read from the file it writes, and probabilities [H, W, K]."""
        import torch
        from PIL import Image

        self._probabilities = np.zeros(())
        evaluation, normalize = self._config.eval, self._config.normalize
        statistics = list(normalize.mean), list(normalize.std)
        with tempfile.TemporaryDirectory() as folder:
            gray, color = f"{folder}/gray", f"{folder}/color"
            loader = [(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float(), None)]
            sizes = evaluation.base_size, *evaluation.crop, evaluation.scales
            self._tool.test(loader, [("one.png", "")], self._network, 11, *statistics, *sizes, gray, color, bytes(33))
            with Image.open(f"{gray}/one.png") as file:
                labels = np.asarray(file)
        return labels, self._probabilities / len(evaluation.scales)


def compare_labels(semseg: str, folder: str, count: int, scales: tuple[float, ...]) -> None:
    """Prints the share of pixels with the same class per image, and semseg's largest gap between its best classes elsewhere."""
    paths = list(find_images(folder).values())
    images = [image_files.read(paths[i]) for i in range(0, len(paths), max(1, len(paths) // count))][:count]
    config = settings("semseg", (241, 241), 480, 0, scales=scales)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = pathlib.Path(directory, "random.pth")
        theirs = Semseg(semseg, checkpoint, images[0], config)
        model = models.build(config.model, 11)
        variables = weights.load(checkpoint, model)
    predictor = Predictor(lambda v, x: model.apply(v, x, train=False), config, 11)
    variables = predictor.place(variables)
    print("| image | classes | same class | pixels that differ | their largest gap | largest difference |")
    print("| --- " * 6 + "|")
    shares = []
    for i, image in enumerate(images):
        height, width, _ = image.shape
        labels, probabilities = theirs(image)
        ours = np.asarray(predictor.probabilities(variables, [image]))[0, :height, :width]
        same = ours.argmax(-1) == labels
        gap = np.diff(np.sort(probabilities[~same])[:, -2:]).max(initial=0)
        shares.append(same.mean())
        classes = (np.bincount(labels.ravel(), minlength=11) > 0.01 * labels.size).sum()
        print(
            f"| {i} | {classes} | {same.mean():.4%} | {(~same).sum()} | {gap:.1e} | {abs(ours - probabilities).max():.1e} |",
            flush=True,
        )
    print(f"least {min(shares):.4%}, mean {np.mean(shares):.4%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("time").add_argument("--protocols", nargs="+", default=list(PROTOCOLS))
    used = steps.add_parser("balance")
    used.add_argument("--images", type=int, default=60)
    used.add_argument("--protocol", choices=PROTOCOLS, default="semseg")
    memory = steps.add_parser("memory")
    memory.add_argument("--protocol", choices=PROTOCOLS, help="measure only this one, in this process")
    memory.add_argument("--batch_size", type=int, default=8)
    labels = steps.add_parser("labels")
    labels.add_argument("--semseg", metavar="PATH", required=True)
    labels.add_argument("--images", metavar="FOLDER", required=True)
    labels.add_argument("--count", type=int, default=20)
    labels.add_argument("--scales", type=float, nargs="+", default=SIX)
    arguments = parser.parse_args()
    if arguments.step == "time":
        for case, repeat in ((CAMVID, 5), (CITYSCAPES, 2)):
            for protocol in arguments.protocols:
                share_outside(protocol, case, repeat)
    elif arguments.step == "balance":
        balance(arguments.images, arguments.protocol)
    elif arguments.step == "labels":
        compare_labels(arguments.semseg, arguments.images, arguments.count, tuple(arguments.scales))
    elif arguments.protocol:
        peak_memory(arguments.protocol, arguments.batch_size)
    else:
        command = [sys.executable, "-m", "benchmarks.evaluation", "memory"]
        for protocol in PROTOCOLS:
            for batch_size in (4, 8):
                subprocess.run([*command, "--protocol", protocol, "--batch_size", str(batch_size)], check=True)


if __name__ == "__main__":
    main()
