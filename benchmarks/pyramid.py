"""What the pyramid is worth on the built-in scenes: the quickstart without it, with 1x1, and with 1, 2, 3, 6, at one budget.

python -m benchmarks.pyramid [--seeds 0 1 2] [--workdir DIR] [--picture docs/quickstart.png]
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np

import pspnet_jax
from pspnet_jax import datasets
from pspnet_jax.data import scenes
from pspnet_jax.infer.draw import save, side_by_side

VARIANTS = ("none", "1", "1236")
SHOWN = ("boat", "car", "sheep", "boulder", "pole", "bird")


def train(variant: str, seed: int, workdir: pathlib.Path) -> dict[str, float]:
    """Trains one variant (or finds it trained) and returns its last evaluation, in percent."""
    recipe = f"configs/quickstart.py:{variant}"
    command = [sys.executable, "-m", "pspnet_jax.main", "--config", recipe, "--workdir", str(workdir), f"--config.seed={seed}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    classes = {c["name"]: 100 * c["iou"] for c in last["classes"]}
    return {"mIoU": 100 * last["mean_iou"]} | {name: classes[name] for name in SHOWN}


def draw(workdir: pathlib.Path, seed: int, path: pathlib.Path) -> None:
    """Draws scenes that have a boat and a car, with their predictions without and with the pyramid."""
    examples = (scenes.scene("validation", index) for index in range(200))
    both = (example for example in examples if {scenes.BOAT, scenes.CAR} <= {*np.unique(example[1])})
    images, labels = zip(*itertools.islice(both, 4), strict=True)
    columns = {"ground truth": labels}
    for caption, variant in {"without the pyramid": "none", "with the pyramid": "1236"}.items():
        segmenter = pspnet_jax.load(workdir / f"{variant}_{seed}")
        columns[caption] = [result.labels for result in segmenter(images)]
    stacked = {caption: np.vstack(column) for caption, column in columns.items()}
    save(side_by_side(np.vstack(images), stacked, datasets.table("scenes")), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/pyramid"))
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    print(f"| pyramid | mIoU, by seed {arguments.seeds} | mean | std | {' | '.join(SHOWN)} |")
    print("| --- " * (4 + len(SHOWN)) + "|")
    for variant in VARIANTS:
        scores = [train(variant, seed, arguments.workdir / f"{variant}_{seed}") for seed in arguments.seeds]
        mean = {key: np.mean([s[key] for s in scores]) for key in scores[0]}
        each, miou = ", ".join(f"{s['mIoU']:.1f}" for s in scores), mean.pop("mIoU")
        std = np.std([s["mIoU"] for s in scores])
        classes = " | ".join(f"{value:.1f}" for value in mean.values())
        print(f"| {variant} | {each} | {miou:.1f} | {std:.1f} | {classes} |", flush=True)
    if arguments.picture:
        draw(arguments.workdir, arguments.seeds[0], arguments.picture)


if __name__ == "__main__":
    main()
