"""Where the time of a step goes: a table and a picture of its parts.

python -m benchmarks.breakdown --config configs/ade20k.py --jobs train --dtype float32 --batch 2 --output cpu.json
python -m benchmarks.breakdown --hlo FILE --images 4 --output tpu.json    # memory traffic per image of a compiled program
python -m benchmarks.breakdown --draw cpu.json tpu.json --output breakdown.png

The first command takes the options of benchmarks.model. It sums up JAX's trace of one step, all threads together. The second
reads the optimized HLO text of a program for a TPU.
"""

import argparse
import collections
import glob
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence

import jax
from matplotlib.figure import Figure

from benchmarks import model
from benchmarks.candidates import make_task, ours
from pspnet_jax import datasets, files, hlo, parallel

PARTS = {  # name -> pattern in the paths of its operations; the first that is found counts
    "losses": r"/while/|jit\(train_step\)/(transpose\()?jvp\(\)",
    "stem": r"/stem_conv|/backbone/(jit\(_pad\)/)?\w+$",  # what the backbone itself does is max-pooling
    "layer1": r"/layer1_",
    "layer2": r"/layer2_",
    "layer3": r"/layer3_",
    "layer4": r"/layer4_",
    "pyramid and head": r"/(pyramid|head|classifier)/",
    "auxiliary head": r"/auxiliary",
}
OTHER = "other"  # upsampling in inference, the optimizer, and what XLA gives no path


def part_of(path: str) -> str:
    network = re.sub(r"(?<=conv)/cond/branch_0_fun.*", "", path)  # Winograd's convolutions have loops of their own
    return next((part for part, pattern in PARTS.items() if re.search(pattern, network)), OTHER)


def by_part(amounts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Adds up amounts, given with the paths of their operations, by part of the network."""
    total: collections.Counter[str] = collections.Counter(dict.fromkeys([*PARTS, OTHER], 0))
    for path, amount in amounts:
        total[part_of(path)] += amount
    return dict(total)


def measure(argv: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of each part, for each job and dtype that the options of benchmarks.model choose."""
    arguments, config = model.parse(argv)
    classes, found = datasets.describe(config.dataset).num_classes, {}
    for job in arguments.jobs:
        for dtype in arguments.dtype:
            task = make_task(config, classes, job, arguments.batch[0], dtype, parallel.make_mesh())
            candidate = ours(task, arguments.head[0])
            candidate.time(2)
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    candidate.time(1)
                (trace,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
                events = json.loads(gzip.decompress(pathlib.Path(trace).read_bytes()))["traceEvents"]
            paths = {name: i.path for c in hlo.parse(candidate.program)[0].values() for name, i in c.items()}
            operations = [(event["args"]["hlo_op"], event["dur"]) for event in events if "hlo_op" in event.get("args", {})]
            title = f"{jax.devices()[0].platform.upper()}, {job}, {dtype}, batch {arguments.batch[0]}: milliseconds"
            found[title] = by_part((paths.get(name, ""), us / 1000) for name, us in operations)
    return found


def draw(charts: dict[str, dict[str, float]], path: str) -> None:
    """Draws one bar chart per entry, side by side."""
    figure = Figure(figsize=(4.5 * len(charts), 3.2), layout="constrained")
    for axes, (title, amounts) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts.items(), strict=True):
        total = sum(amounts.values())
        bars = axes.barh(list(amounts), list(amounts.values()))
        axes.bar_label(bars, [f" {amount / total:.0%}" for amount in amounts.values()])
        axes.set_title(title, fontsize=9)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--images", type=int, default=1, help="images per device in the program of --hlo")
    parser.add_argument("--draw", nargs="+", type=pathlib.Path, metavar="FILE", help="outputs of this program")
    parser.add_argument("--output", required=True, metavar="FILE")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.draw:
        return draw({k: v for file in arguments.draw for k, v in json.loads(file.read_text()).items()}, arguments.output)
    if arguments.hlo:
        traffic = hlo.hbm_traffic(arguments.hlo.read_text())
        charts = {"TPU: MB of memory traffic per image": by_part((k, n / arguments.images / 1e6) for k, n in traffic.items())}
    else:
        charts = measure(rest)
    for title, amounts in charts.items():
        print(f"{title}, {sum(amounts.values()):,.0f} in all")
        for part, amount in amounts.items():
            print(f"| {part} | {amount:,.0f} | {amount / sum(amounts.values()):.1%} |")
    with files.atomic(files.absolute(arguments.output)) as path:
        path.write_text(json.dumps(charts, indent=1) + "\n")


if __name__ == "__main__":
    main()
