"""Cost of --mode report over --mode evaluate: python -m benchmarks.report WORKDIR [--config.FIELD=VALUE ...]

Both read, predict and score the same images with the same network, in turns; the report also collects the images' statistics
and writes their pictures.
"""

import argparse
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax import scoring
from pspnet_jax.analysis import report


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Returns the time that a call takes and the CPU time of all threads, in seconds."""
    began = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def peak_memory() -> float:
    """Returns the largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=epath.Path)
    parser.add_argument("--repeat", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    run = report.open_run(argparse.Namespace(workdir=arguments.workdir, config=None, checkpoint=None), overrides)
    training, _ = report.training_classes(run)
    network = scoring.segmenter(run.restored.config, run.restored.variables)
    source = scoring.sort_by_size(network.predictor, run.source)

    def evaluate() -> None:
        scoring.score(network, run.restored.config, source)

    def analyze() -> None:
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "pictures").mkdir()
            report.analyze(run, network, pathlib.Path(folder), "", training)

    evaluate()  # compiles
    before, ratios = peak_memory(), []
    for _ in range(arguments.repeat):
        (wall, cpu), (wall_of_report, cpu_of_report) = seconds(evaluate), seconds(analyze)
        ratios.append((wall_of_report / wall, cpu_of_report / cpu))
        print(f"evaluate {wall:.2f} s, CPU {cpu:.2f} s; report {wall_of_report:.2f} s, CPU {cpu_of_report:.2f} s", flush=True)
    print("report / evaluate, median: wall {:.3f}, CPU {:.3f}".format(*np.median(ratios, 0)))
    print(f"peak memory: evaluate {before:.2f} GiB, report {peak_memory():.2f} GiB")


if __name__ == "__main__":
    main()
