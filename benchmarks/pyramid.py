"""What the pyramid is worth on the built-in scenes, class by class, from the runs of the pooling ablation.

python -m pspnet_jax.ablate pooling --dataset scenes
python -m benchmarks.pyramid [--runs runs/ablation_scenes/runs] [--picture docs/quickstart.png] [--seed 2]
"""

import argparse
import itertools

import numpy as np
from etils import epath

import pspnet_jax
from pspnet_jax import datasets
from pspnet_jax.data import scenes
from pspnet_jax.infer.draw import save, side_by_side
from pspnet_jax.train import jsonlines

VARIANTS = {"none": "scenes_bins-none", "1": "scenes_bins-1", "1, 2, 3, 6": "scenes"}  # names of the runs, without the seeds
SHOWN = ("boat", "car", "sheep", "boulder", "pole", "bird")


def scores(workdir: epath.Path) -> dict[str, float]:
    """Returns the mean IoU and the IoU of some classes, in percent, of a run's last evaluation."""
    last = [line for line in jsonlines.read(workdir / "metrics.jsonl") if "mean_iou" in line][-1]
    classes = {line["name"]: 100 * line["iou"] for line in last["classes"]}
    return {"mIoU": 100 * last["mean_iou"]} | {name: classes[name] for name in SHOWN}


def draw(runs: epath.Path, seed: int, path: epath.Path) -> None:
    """Draws scenes that have a boat and a car, with the predictions of the networks without and with the pyramid."""
    examples = (scenes.scene("validation", index) for index in range(200))
    both = (example for example in examples if {scenes.BOAT, scenes.CAR} <= {*np.unique(example[1])})
    images, labels = zip(*itertools.islice(both, 4), strict=True)
    columns = {"ground truth": labels}
    for caption, variant in {"without the pyramid": "none", "with the pyramid": "1, 2, 3, 6"}.items():
        segmenter = pspnet_jax.load(runs / f"{VARIANTS[variant]}_seed{seed}")
        columns[caption] = [result.labels for result in segmenter(images)]
    stacked = {caption: np.vstack(column) for caption, column in columns.items()}
    save(side_by_side(np.vstack(images), stacked, datasets.table("scenes")), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=epath.Path, default=epath.Path("runs/ablation_scenes/runs"))
    parser.add_argument("--picture", type=epath.Path)
    parser.add_argument("--seed", type=int, default=2, help="of the networks in the picture")
    arguments = parser.parse_args()
    print("| levels of the pyramid |", " | ".join(("runs", "mIoU", *SHOWN)), "|")
    print("| --- " * (3 + len(SHOWN)) + "|")
    for variant, name in VARIANTS.items():
        found = [scores(workdir) for workdir in sorted(arguments.runs.glob(f"{name}_seed*"))]
        means = (f"{np.mean([run[key] for run in found]):.1f}" for key in ("mIoU", *SHOWN))
        print(f"| {variant} | {len(found)} |", " | ".join(means), "|")
    if arguments.picture:
        draw(arguments.runs, arguments.seed, arguments.picture)


if __name__ == "__main__":
    main()
