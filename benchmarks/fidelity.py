"""Compares our network with the original implementations, on their checkpoint files with random weights and the same image.

python -m benchmarks.fidelity peer --semseg PATH --out DIR   # with torch; PATH is a clone of hszhao/semseg
python -m benchmarks.fidelity peer --mmseg --out DIR         # with mmsegmentation, mmcv-lite and mmengine
python -m benchmarks.fidelity ours DIR                       # with pspnet_jax and torch

The step `peer` writes NAME.pth, and NAME.npz with the image, the peer's logits, and its logits computed in float64. The steps
can run in different environments: `peer` does not import our code, and `ours` does not import theirs.
"""

import argparse
import logging
import pathlib
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import numpy as np

SEMSEG = ((50, 150, 473), (50, 19, 713), (101, 21, 473), (101, 19, 713))  # depth, classes, crop
MMSEG_CONFIG = "pspnet/pspnet_r{variant}-d8_4xb2-80k_cityscapes-{height}x{width}.py"
MMSEG = (("18", 512, 1024), ("18", 769, 769), ("50", 512, 1024), ("50", 769, 769), ("50b", 512, 1024))


def random_image(height: int, width: int) -> np.ndarray:
    """Returns uint8[height, width, 3], RGB: a smooth field plus noise with standard deviation 20."""
    rng = np.random.default_rng(0)
    rows, columns = (np.maximum(0, 1 - abs(np.linspace(0, 8, n)[:, None] - np.arange(9))) for n in (height, width))
    smooth = np.einsum("yi,xj,ijc->yxc", rows, columns, rng.uniform(0, 255, (9, 9, 3)))
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def randomize(network: Any, predict: Callable, images: Any) -> None:
    """Sets the kernels of a torch network to He-normal values and its batch normalization to random ones, in a forward pass.

    Running statistics are close to those of the actual inputs, so that the activations of all layers have about unit scale and
    vary over the image. The constant part of the variance is for the 1x1 level, whose variance over one position is 0. Blocks
    are scaled to 0.2 before they are added to their shortcuts: at 1, ResNet-101 would amplify PyTorch's own rounding to 1e-3
    standard deviations of the logits, which would hide smaller differences.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(deviation: float, like: Any) -> Any:
        return deviation * torch.randn(like.shape, generator=generator)

    def uniform(low: float, high: float, like: Any) -> Any:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    def randomize_norm(norm: Any, inputs: tuple) -> None:
        mean, square = inputs[0].mean((0, 2, 3)), inputs[0].square().mean()
        variance = inputs[0].var((0, 2, 3), correction=0) + 0.01 * square
        norm.running_mean.copy_(mean + variance.sqrt() * normal(0.3, mean))
        norm.running_var.copy_(variance * uniform(0.5, 2, variance))
        scale = 0.2 if norm in block_ends else 1.0
        norm.weight.copy_(scale * uniform(0.5, 1.5, mean))
        norm.bias.copy_(scale * normal(0.3, mean))

    block_ends = [getattr(module, "bn3", module.bn2) for module in network.modules() if hasattr(module, "bn2")]
    hooks = []
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_(normal((2 / module.weight[0].numel()) ** 0.5, module.weight))
                if module.bias is not None:
                    module.bias.copy_(normal(0.3, module.bias))
            elif hasattr(module, "running_var"):  # mmengine has its own class
                hooks.append(module.register_forward_pre_hook(randomize_norm))
        predict(images)
    for hook in hooks:
        hook.remove()


def record(file: pathlib.Path, image: np.ndarray, network: Any, predict: Callable, images: Any) -> None:
    """Writes the image, the peer's logits f32[H, W, K], and the logits of the same network computed in float64."""
    import torch

    with torch.no_grad():
        logits = predict(images)
        network.double()
        exact = predict(images.double())
    arrays = {k: v[0].permute(1, 2, 0).float().numpy() for k, v in {"logits": logits, "exact": exact}.items()}
    np.savez(file, image=image, **arrays)
    print(f"{file.name}: logits {arrays['logits'].shape}, standard deviation {arrays['logits'].std():.2f}", flush=True)


def semseg(path: str, out: pathlib.Path) -> None:
    """Runs the authors' PyTorch code, which normalizes like its tool/test.py and saves like its tool/train.py."""
    import torch

    sys.path.insert(0, path)
    from model.pspnet import PSPNet

    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for depth, classes, size in SEMSEG:
        network = PSPNet(layers=depth, classes=classes, pretrained=False).eval()
        image = random_image(size, size)
        images = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - mean) / std
        randomize(network, network, images)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        parallel = torch.nn.DataParallel(network)  # prefixes the names with "module."
        saved = {"epoch": 100, "state_dict": parallel.state_dict(), "optimizer": optimizer.state_dict()}
        name = f"semseg-{depth}-{size}"
        torch.save(saved, out / f"{name}.pth")
        record(out / f"{name}.npz", image, network, network, images)


def mmsegmentation(out: pathlib.Path) -> None:
    """Runs mmsegmentation with its own config files; its trainer writes the checkpoint after two steps."""

    class Absent(types.ModuleType):  # mmcv-lite lacks the compiled operators that mmseg imports and PSPNet does not use
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules["mmcv.ops"] = Absent("mmcv.ops")
    import mmseg
    import torch
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    logging.disable(logging.INFO)
    register_all_modules()
    for variant, height, width in MMSEG:
        config_file = MMSEG_CONFIG.format(variant=variant, height=height, width=width)
        config = Config.fromfile(pathlib.Path(mmseg.__file__).with_name(".mim") / "configs" / config_file)
        config.model.pretrained = None
        network = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        network.init_weights()  # else the trainer would overwrite our weights
        image = random_image(height, width)
        bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)  # the channel order of mmseg's image reader
        images = network.data_preprocessor({"inputs": [bgr]}, training=False)["inputs"]

        def predict(images: Any, network: Any = network) -> Any:
            return torch.stack([sample.seg_logits.data for sample in network.predict(images)])

        randomize(network, predict, images)
        name = f"mmseg-{variant}-{height}x{width}"
        train_and_save(network, config, out / f"{name}.pth")
        record(out / f"{name}.npz", image, network.eval(), predict, images)


def train_and_save(network: Any, config: Any, file: pathlib.Path) -> None:
    """Trains two steps with a negligible learning rate, so that the file holds everything that mmengine's training saves."""
    import torch
    from mmengine.runner import Runner
    from mmengine.structures import PixelData
    from mmseg.datasets import CityscapesDataset
    from mmseg.structures import SegDataSample

    class Images(list):
        metainfo = CityscapesDataset(lazy_init=True).metainfo

    label = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 129, 129, dtype=torch.long)))
    image = torch.from_numpy(random_image(129, 129)).permute(2, 0, 1)
    images = Images([{"inputs": image, "data_samples": label}] * 4)
    network.data_preprocessor.size = (129, 129)
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(
            network,
            work_dir=directory,
            train_dataloader={"dataset": images, "batch_size": 2, "sampler": {"type": "InfiniteSampler"}},
            train_cfg={"by_epoch": False, "max_iters": 2},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 1e-6, "momentum": 0.9}},
            default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
            randomness={"seed": 0},
            cfg=config,
            default_scope="mmseg",
            experiment_name=file.stem,
        )
        runner.train()
        shutil.move(pathlib.Path(directory, "iter_2.pth"), file)


def our_logits(checkpoint: pathlib.Path, image: np.ndarray) -> np.ndarray:
    """Imports a checkpoint as a user would, with its config inferred, and returns its logits f32[H, W, K]."""
    import jax
    import jax.numpy as jnp

    from pspnet_jax import models, weights
    from pspnet_jax.config import base_config

    source, config = weights.inspect(checkpoint), base_config()
    weights.configure(config, source)
    network = models.build(config.model, source.num_classes)
    images = models.normalize(jnp.asarray(image)[None], config.normalize)
    variables = weights.load(checkpoint, network)
    return np.asarray(jax.jit(network.apply, static_argnames="train")(variables, images, train=False)[0])


def ours(directory: pathlib.Path) -> None:
    """Prints the table of fidelity.md; all differences are in standard deviations of the float64 logits."""
    print("| network | size, classes | max | median | same class | gap elsewhere | theirs to float64 | ours to float64 |")
    print("| --- " * 8 + "|")
    for file in sorted(directory.glob("*.npz")):
        case = np.load(file)
        theirs, exact = case["logits"], case["exact"]
        logits = our_logits(file.with_suffix(".pth"), case["image"])
        deviation = exact.std(dtype=np.float64)
        pairs = ((logits, theirs), (theirs, exact), (logits, exact))
        difference, theirs_off, ours_off = (abs(a - b) / deviation for a, b in pairs)
        same = logits.argmax(-1) == theirs.argmax(-1)
        best = np.sort(exact[~same], axis=-1)[:, -2:] / deviation
        gap = np.diff(best).max(initial=0)  # between the two best classes
        figures = f"{difference.max():.1e} | {np.median(difference):.1e} | {same.mean():.4%} | {gap:.1e}"
        height, width, classes = logits.shape
        size = f"{height}x{width}, {classes}"
        print(f"| {file.stem} | {size} | {figures} | {theirs_off.max():.1e} | {ours_off.max():.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    peer = steps.add_parser("peer")
    source = peer.add_mutually_exclusive_group(required=True)
    source.add_argument("--semseg", metavar="PATH")
    source.add_argument("--mmseg", action="store_true")
    peer.add_argument("--out", type=pathlib.Path, required=True)
    steps.add_parser("ours").add_argument("directory", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.step == "ours":
        ours(arguments.directory)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.mmseg:
        mmsegmentation(arguments.out)
    else:
        semseg(arguments.semseg, arguments.out)


if __name__ == "__main__":
    main()
