"""Speed and memory of inference and training steps for any recipe and device, optionally compared with semseg's PyTorch code.

python -m benchmarks.model --config configs/ade20k.py --batch 16 32 --dtype float32 bfloat16 [--config.field=value ...]
python -m benchmarks.model --config configs/ade20k.py --semseg PATH    # also times a clone of hszhao/semseg; needs torch
python -m benchmarks.model --config configs/ade20k.py --check          # compares one train step with the same step on the CPU

Needs neither TensorFlow nor data: images and labels are random and stay on the device.
"""

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else PyTorch gets only a quarter of the GPU's memory

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.candidates import DTYPES, HEADS, JOBS, Candidate, Task, count_flops, functions_and_data, make_task, ours, semseg
from pspnet_jax import datasets, parallel, programs
from pspnet_jax.config import load_recipe

# Dense FLOP/s by prefix of JAX's device_kind, from the vendors' data sheets, at JAX's default precision: float32 products use
# TF32 on GPUs that have it, and one bfloat16 pass on TPUs. Volta and Turing have neither.
PEAK = {
    "NVIDIA H100 PCIe": {"float32": 378e12, "bfloat16": 756e12},
    "NVIDIA H100": {"float32": 494e12, "bfloat16": 989e12},
    "NVIDIA H200": {"float32": 494e12, "bfloat16": 989e12},
    "NVIDIA A100": {"float32": 156e12, "bfloat16": 312e12},
    "Tesla V100": {"float32": 15.7e12},
    "Tesla T4": {"float32": 8.1e12},
    "TPU v4": {"float32": 275e12, "bfloat16": 275e12},
    "TPU v5 lite": {"float32": 197e12, "bfloat16": 197e12},
    "TPU v5e": {"float32": 197e12, "bfloat16": 197e12},
    "TPU v5": {"float32": 459e12, "bfloat16": 459e12},
    "TPU v6 lite": {"float32": 918e12, "bfloat16": 918e12},
}
# field of a row -> heading, factor, format
COLUMNS = {
    "job": ("job", 1, ""),
    "dtype": ("dtype", 1, ""),
    "batch": ("batch", 1, ""),
    "head": ("head", 1, ""),
    "network": ("network", 1, ""),
    "compile_seconds": ("compile, s", 1, ".1f"),
    "median_seconds": ("step, s", 1, ".4g"),
    "spread": ("spread", 1, ".0%"),
    "median_cpu_seconds": ("CPU, s", 1, ".4g"),
    "images_per_second": ("images/s", 1, ".4g"),
    "flops_per_second": ("TFLOP/s", 1e-12, ".3f"),
    "share_of_peak": ("of peak", 1, ".1%"),
    "program_bytes": ("program, GiB", 2**-30, ".2f"),
    "measured_bytes": ("measured, GiB", 2**-30, ".2f"),
    "error": ("error", 1, ""),
    "of": ("of", 1, ""),
    "absolute": ("largest difference", 1, ".1e"),
    "relative": ("largest of an array, relative", 1, ".1e"),
    "array": ("array", 1, ""),
}


def builders(task: Task, heads: Sequence[str], semseg_path: str | None) -> dict[str, Callable[[], Candidate]]:
    """Returns functions that build the candidates of a task, by name."""
    build: dict[str, Callable[[], Candidate]] = {f"ours, {head}": functools.partial(ours, task, head) for head in heads}
    if semseg_path:
        theirs = functools.partial(semseg, task, semseg_path)
        build |= {"semseg": theirs, "semseg, channels_last": functools.partial(theirs, channels_last=True)}
        if task.mesh.devices.flat[0].platform == "gpu":
            build["semseg, channels_last, torch.compile"] = functools.partial(theirs, channels_last=True, compiled=True)
    return build


def first_step(candidate: Candidate) -> int | None:
    """Runs one step; returns its peak memory in bytes beyond the memory in use before, or None if it cannot be measured.

    On the CPU, this is resident memory, whose peak Linux can reset; on a GPU, it is PyTorch's own count.
    """
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda and cuda.is_available():
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        candidate.time(1)
        return (cuda.max_memory_allocated() - before) or None
    reset = pathlib.Path("/proc/self/clear_refs")
    if jax.default_backend() != "cpu" or not reset.exists():
        candidate.time(1)
        return None
    reset.write_text("5")
    before = _resident_bytes("VmRSS")
    candidate.time(1)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(build: dict[str, Callable[[], Candidate]], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Builds all candidates, then times them in turn. If one lacks memory or a kernel, its row has the error."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in build}
    ready = {}
    for name, make in build.items():
        try:
            candidate = make()
            measured = first_step(candidate)
        except RuntimeError as error:  # of JAX or PyTorch
            rows[name]["error"] = first_line(error)
            continue
        ready[name] = candidate
        rows[name] = {"compile_seconds": candidate.compile_seconds, "seconds": [], "cpu_seconds": []}
        rows[name] |= {"program_bytes": candidate.program_bytes, "measured_bytes": measured}
    for _ in range(rounds):
        for name, candidate in ready.items():
            candidate.time(1)  # the memory of this candidate has been idle during the turns of the others
            seconds, cpu_seconds = candidate.time(steps)
            rows[name]["seconds"].append(seconds)
            rows[name]["cpu_seconds"].append(cpu_seconds)
    return rows


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the FLOP/s of one device from PEAK, or None if the device or dtype is not in the table."""
    return next((peak.get(dtype) for kind, peak in PEAK.items() if device_kind.startswith(kind)), None)


def summarize(row: dict[str, Any], images: int, flops: float, peak: float | None) -> dict[str, Any]:
    """Adds medians, the rates that follow from them, and the spread: (largest - least) / median."""
    seconds = statistics.median(row["seconds"])
    return row | {
        "median_seconds": seconds,
        "median_cpu_seconds": statistics.median(row["cpu_seconds"]),
        "spread": (max(row["seconds"]) - min(row["seconds"])) / seconds,
        "images_per_second": images / seconds,
        "flops_per_second": flops / seconds,
        "share_of_peak": flops / seconds / peak if peak else None,
    }


def benchmark(arguments: argparse.Namespace, config: ConfigDict, num_classes: int) -> list[dict[str, Any]]:
    """Measures and prints all jobs, batch sizes and dtypes; returns one row per candidate."""
    mesh = parallel.make_mesh(jax.devices()[:1] if arguments.semseg else None)
    rows = []
    for job, size, dtype in itertools.product(arguments.jobs, arguments.batch, arguments.dtype):
        task = make_task(config, num_classes, job, size, dtype, mesh)
        build = builders(task, arguments.head, arguments.semseg)
        flops, peak = count_flops(task), peak_flops(mesh.devices.flat[0].device_kind, dtype)
        for name, row in measure(build, arguments.rounds, arguments.steps).items():
            row = {"job": job, "batch": size, "dtype": dtype, "network": name} | row
            rows.append(row if "error" in row else summarize(row, size, flops, peak and peak * mesh.size))
        show(rows[-len(build) :])
    return rows


def largest_differences(value: Any, expected: Any) -> dict[str, Any]:
    """Returns the largest absolute difference of two trees, and the largest ||a - b|| / ||b|| of an array, with its path."""
    pairs = [(jax.tree_util.keystr(path), b) for path, b in jax.tree_util.tree_leaves_with_path(expected)]
    absolute, relative, name = 0.0, 0.0, ""
    for a, (path, b) in zip(jax.tree.leaves(value), pairs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        absolute = max(absolute, float(abs(a - b).max(initial=0)))
        norm = float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))
        if norm > relative:
            relative, name = norm, path
    return {"absolute": absolute, "relative": relative, "array": name}


def one_step(task: Task, head: str, state: Any) -> dict[str, Any]:
    """Returns loss, parameters and optimizer state after one train step from a state on the host, as host arrays."""
    function, _, batch = functions_and_data(task, head)
    state = jax.device_put(jax.tree.map(np.array, state), parallel.replicated(task.mesh))  # a copy, since the step donates it
    state, metrics = function(state, jax.device_put(batch, parallel.batch_sharding(task.mesh)))
    found = {"loss": metrics["loss"].compute(), "optimizer state": state.opt_state, "parameters": state.params}
    return jax.tree.map(np.asarray, found)


def check(arguments: argparse.Namespace, config: ConfigDict, num_classes: int) -> list[dict[str, Any]]:
    """Compares one train step, for each head and dtype, with the same step on one CPU device in float32 at highest precision.

    After the first step, SGD's momentum is the gradient plus weight decay.
    """
    size, cpu, rows = arguments.batch[0], parallel.make_mesh(jax.devices("cpu")[:1]), []
    for head in arguments.head:
        exact = make_task(config, num_classes, "train", size, "float32", cpu)
        state = jax.tree.map(np.asarray, functions_and_data(exact, head)[1]())
        with jax.default_matmul_precision("highest"):
            expected = one_step(exact, head, state)
        for dtype in arguments.dtype:
            row = {"head": head, "dtype": dtype, "batch": size}
            try:
                found = one_step(make_task(config, num_classes, "train", size, dtype, parallel.make_mesh()), head, state)
            except RuntimeError as error:
                rows.append(row | {"error": first_line(error)})
                continue
            rows += [row | {"of": name} | largest_differences(found[name], expected[name]) for name in expected]
    show(rows)
    return rows


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a Markdown table."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    table = Table(*(COLUMNS[column][0] for column in columns), box=box.MARKDOWN)
    for row in rows:
        table.add_row(*("" if row.get(c) is None else format(row[c] * COLUMNS[c][1], COLUMNS[c][2]) for c in columns))
    Console(width=250).print(table)


def describe_run() -> dict[str, Any]:
    """Returns date, command, machine and versions."""
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    return {
        "date": datetime.date.today().isoformat(),
        "command": sys.argv,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | versions,
        "device_peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help="a recipe; --config.field=value sets a field")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="images per step; default: the recipe's batch_size")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="default: the recipe's augment.crop")
    parser.add_argument("--head", nargs="+", choices=HEADS, help="default: as in model.factored_head")
    parser.add_argument("--rounds", type=int, default=5, help="timings per candidate; the median is reported")
    parser.add_argument("--steps", type=int, default=1, help="steps per timing; use 10 or more on an accelerator")
    parser.add_argument("--semseg", metavar="PATH", help="also measure the PSPNet of this clone of hszhao/semseg")
    parser.add_argument("--check", action="store_true", help="compare one train step with that on the CPU instead of timing")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="write the results as JSON")
    arguments, overrides = parser.parse_known_args(argv)
    config, argv = load_recipe(arguments.config), ["", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        if rest := values(argv)[1:]:
            parser.error(f"{rest[0]}: unknown argument")
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))
    config.augment.crop = tuple(arguments.crop or config.augment.crop)
    arguments.batch = arguments.batch or [config.batch_size]
    arguments.head = arguments.head or [name for name, factored in HEADS.items() if factored == config.model.factored_head]
    if arguments.semseg and config.model.depth not in (50, 101, 152):
        parser.error(f"--semseg: its PSPNet has depth 50, 101 or 152, not {config.model.depth}")
    if arguments.semseg and any(size % 8 != 1 for size in config.augment.crop):
        parser.error(f"--semseg: its PSPNet takes crops of 8k+1 pixels, not {config.augment.crop}")
    return arguments, config


def main(argv: Sequence[str] | None = None) -> None:
    programs.skip_tpu_compiler()
    arguments, config = parse(argv)
    num_classes = datasets.describe(config.dataset).num_classes
    rows = (check if arguments.check else benchmark)(arguments, config, num_classes)
    if arguments.output:
        arguments.output.write_text(json.dumps(describe_run() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
