"""The command line of ablations: `python -m pspnet_jax.ablate pooling --dataset scenes`."""

import argparse
import contextlib
import logging
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from pspnet_jax import errors, files
from pspnet_jax.ablate import report, runs, tables
from pspnet_jax.progress import progress

logger = logging.getLogger("pspnet_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and compares the rows of tables. Returns the exit status: 1 after an error, 130 after Ctrl-C."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%m-%d %H:%M:%S", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # if the reader of a pipe is gone

    def program() -> None:
        if failures := _ablate(*_parse(argv)):
            listed = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
            raise errors.UserError(f"{len(failures)} run(s) failed; the same command tries them again\n{listed}")

    return errors.exit_status(program)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m pspnet_jax.ablate",
        description="Train all rows of tables with several seeds, and compare them. Finished runs are skipped, and interrupted "
        "ones resumed. Any field of the config can be set for all rows, as in --config.dataset.root=DIR; in its value, {depth} "
        "is replaced by the depth of the row's network, as in --config.init_from=runs/imagenet_{depth}",
        allow_abbrev=False,
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="pooling, auxiliary, depth, components, variants or a file")
    parser.add_argument("--dataset", help="whose recipe the rows change: scenes, camvid or (the default) ade20k")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--output", metavar="DIR", help="for the runs and the results; default: runs/ablation_DATASET")
    parser.add_argument(
        "--devices",
        type=_devices,
        default=[""],
        metavar="I,J,...",
        help="GPUs or TPU chips of this machine, each for one run at a time; on CPUs, as many runs at a time; by default, one "
        "run has all devices",
    )
    parser.add_argument("--list", action="store_true", help="only print the commands that are left, to start them elsewhere")
    arguments, overrides = parser.parse_known_args(argv)
    arguments.seeds = [*dict.fromkeys(arguments.seeds)]  # once each
    if unknown := [o for o in overrides if o.startswith("-") and not o.startswith(("--config.", "--noconfig."))]:
        parser.error(f"{unknown[0]}: unknown argument; --config.field=value sets a field of all configs")
    if any(re.match("--config.seed(=|$)", override) for override in overrides):
        parser.error("--config.seed: is what --seeds sets; leave it out")
    return arguments, overrides


def _devices(given: str) -> list[str]:
    """Returns the devices of --devices; on GPUs, these are any that CUDA_VISIBLE_DEVICES allows, such as a UUID."""
    devices = given.split(",")
    if not all(re.fullmatch(r"[\w-]+", device) for device in devices) or len({*devices}) < len(devices):
        raise argparse.ArgumentTypeError(f"{given!r}: expected different numbers with commas between them, such as 0,1")
    return devices


def _ablate(arguments: argparse.Namespace, overrides: Sequence[str]) -> dict[str, str]:
    """Does what the command line asks for, and returns the errors of the runs that failed, by name."""
    found = {name: tables.load(name) for name in arguments.tables}
    dataset = arguments.dataset or next(iter(next(iter(found.values())).bases))
    try:
        found = {name: table.of_dataset(dataset) for name, table in found.items()}
    except ValueError as error:
        raise errors.UserError(f"--dataset {dataset}: {error}") from error
    output = files.user_path(arguments.output or f"runs/ablation_{dataset}")
    cells = runs.plan(found, dataset, arguments.seeds, overrides, output / "runs")
    distinct = {run.workdir: run for run, _ in cells.values()}.values()
    todo = [run for seed in arguments.seeds for run in distinct if run.config.seed == seed and any(run.missing())]
    if arguments.list:
        commands = [shlex.join(["python", "-m", "pspnet_jax.main", *command]) for run in todo for command in run.missing()]
        _print("\n".join(commands))
        return {}
    stem = output / "_".join(["ablation", *(pathlib.PurePath(name).stem for name in found)])
    settings = {"dataset": dataset, "seeds": arguments.seeds, "settings": " ".join(overrides) or "those of the recipes"}

    def write() -> str:
        scores = {key: score for key, cell in cells.items() if (score := cell.run.score(cell.changes))}
        summaries = [
            report.summarize(name, table, {key[1:]: score for key, score in scores.items() if key[0] == name})
            for name, table in found.items()
        ]
        return report.write(stem, summaries, settings, arguments.seeds)

    failures = _train(todo, arguments.devices, output, write)
    _print(write())
    logger.info(f"{stem}.md, .json, .csv and .png are written; the runs are in {output / 'runs'}")
    return failures


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader of the pipe is gone, as after `| head -1`
        print(text, flush=True)


def _train(todo: Sequence[runs.Run], devices: Sequence[str], output: epath.Path, write: Callable[[], object]) -> dict[str, str]:
    """Trains the runs, writes the results after each, and returns the errors by name."""
    if todo and files.is_remote(output):
        raise errors.UserError(
            f"--output {output}: {len(todo)} run(s) are left, which this program starts only in a local directory; start them "
            "with the commands that --list prints, then repeat this one"
        )
    failures: dict[str, str] = {}
    logger.info(f"{len(todo)} run(s) to do; their output is in {output / 'logs'}")
    with progress("ablation", len(todo), "runs", every_process=True) as advance:

        def done(run: runs.Run, error: str) -> None:
            name, score = run.workdir.name, run.score({})
            if error:
                failures[name] = error
            logger.info(f"{name}: {error or score}")
            advance(1)
            write()

        runs.train(todo, devices, output / "logs", done)
    return failures


def command() -> NoReturn:
    """The program: SIGTERM ends it as Ctrl-C does, once the running processes have saved their state."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())


if __name__ == "__main__":
    command()
