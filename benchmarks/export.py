"""Exported networks: agreement with ours, file sizes, and latencies.

python -m benchmarks.export agreement              # each stem, bins and align_corners, on small networks
python -m benchmarks.export speed [--rounds 10]    # PSPNet-50, 150 classes, one image of 473x473

Needs onnx, onnxruntime and TensorFlow. All weights are random. In `speed`, each round runs every program once.
"""

import argparse
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from pspnet_jax.deploy import export
from tests.deploy import networks

STANDARD = (1, 2, 3, 6)
NETWORKS = (("deep", STANDARD), ("deep", ()), ("deep", (1, 2, 4, 8)), ("deep32", STANDARD), ("conv7", STANDARD))  # stem, bins
Run = Callable[[np.ndarray], np.ndarray]


def load(fmt: str, path: epath.Path, output: str) -> Run:
    """Returns a function of images that runs an exported program in its own runtime."""
    if fmt == "stablehlo":
        program = jax.jit(jax.export.deserialize(path.read_bytes()).call)
        return lambda images: np.asarray(program(images))
    if fmt == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: session.run([output], {"image": images})[0]
    import tensorflow as tf

    if fmt == "savedmodel":
        saved = tf.saved_model.load(str(path))  # the function does not keep it alive
        return lambda images: saved.signatures["serving_default"](image=tf.constant(images))[output].numpy()
    interpreter = tf.lite.Interpreter(str(path), num_threads=2)
    return lambda images: interpreter.get_signature_runner()(image=images)[output]


def exported(program: export.Program, folder: str) -> Iterator[tuple[str, epath.Path]]:
    """Yields each format, and the path of a program in it."""
    for fmt, kind in export.FORMATS.items():
        path = epath.Path(folder) / f"{program.outputs}_{fmt}{kind.ending}"
        export.export(program, fmt, path)
        yield fmt, path


def compare(config: Any, variables: Any, images: np.ndarray) -> dict[str, str]:
    """Returns for each format how much probabilities differ at most, and how many labels differ where the best two do."""
    size = images.shape[1:3]
    programs = {out: export.Program(config, variables, out, len(images), size) for out in export.OUTPUTS}
    expected = {out: np.asarray(jax.jit(program.__call__)(images)) for out, program in programs.items()}
    best = np.sort(expected["probabilities"], -1)
    tied = best[..., -1] - best[..., -2] < 1e-5
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for fmt, path in exported(programs["probabilities"], folder):
            found[fmt] = f"{np.abs(load(fmt, path, 'probabilities')(images) - expected['probabilities']).max():.1e}"
        for fmt, path in exported(programs["labels"], folder):
            differing = load(fmt, path, "labels")(images) != expected["labels"]
            found[fmt] += f", {np.count_nonzero(differing)} ({np.count_nonzero(differing & ~tied)})"
    return found


def agreement() -> None:
    """Prints a table of `compare` for small networks."""
    print(f"| stem, bins, align_corners | {' | '.join(export.FORMATS)} |", flush=True)
    images = networks.random_images(2, 97, 113)
    for (stem, bins), align_corners in itertools.product(NETWORKS, (True, False)):
        config = networks.make_config(21, depth=50, width=16, stem=stem, bins=bins, align_corners=align_corners)
        found = compare(config, networks.random_variables(config, images), images)
        print(f"| {stem}, {bins}, {align_corners} | {' | '.join(found.values())} |", flush=True)


def speed(rounds: int) -> None:
    """Prints file sizes, load times, latencies and agreement of PSPNet-50 in each format."""
    config, images = networks.make_config(150), networks.random_images(1, 473, 473)
    variables = networks.random_variables(config, networks.random_images(2, 233, 233))
    program = export.Program(config, variables, "labels", 1, (473, 473))
    ours = jax.jit(program.__call__)
    rows: dict[str, list[str]] = {"ours": ["", ""]}
    runs: dict[str, Run] = {"ours": lambda images: np.asarray(ours(images))}
    with tempfile.TemporaryDirectory() as folder:
        for fmt, path in exported(program, folder):
            parts = pathlib.Path(path).rglob("*") if path.is_dir() else [pathlib.Path(path)]
            began = time.perf_counter()
            runs[fmt] = load(fmt, path, "labels")
            runs[fmt](images)
            rows[fmt] = [f"{sum(p.stat().st_size for p in parts) / 1e6:.0f} MB", f"{time.perf_counter() - began:.0f} s"]
        expected = runs["ours"](images)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        differing = {name: np.count_nonzero(run(images) != expected) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                began = time.perf_counter()
                run(images)
                seconds[name].append(time.perf_counter() - began)
    print("| program | size | load and first image | median | range | ratio to ours | labels that differ |")
    for name, row in rows.items():
        times = np.array(seconds[name])
        ratio = np.median(times / seconds["ours"])
        cells = [name, *row, f"{np.median(times):.2f} s", f"{times.min():.2f} to {times.max():.2f} s", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} | {differing[name]} of {expected.size} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agreement", "speed"))
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.what == "agreement":
        agreement()
    else:
        speed(arguments.rounds)
