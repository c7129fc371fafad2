"""The command line: `pspnet --config cityscapes` or, without installing it, `python -m pspnet_jax.main --config cityscapes`."""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import logging as absl_logging
from etils import epath

import pspnet_jax
from pspnet_jax import clusters, errors, files, jobs, parallel, peers, programs, weights
from pspnet_jax import config as configs
from pspnet_jax.infer import video
from pspnet_jax.infer.predict import MAPS

logger = logging.getLogger("pspnet_jax")


def _nonempty(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("is empty; perhaps a shell variable is not set")
    return given


def _path(given: str) -> epath.Path:
    try:
        return files.user_path(_nonempty(given))
    except errors.UserError as error:  # argparse would drop the message, since UserError is a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


def _input(given: str) -> epath.PathLike:
    return given if video.is_live(given) or weights.is_name(given) else _path(given)


def _steps(given: str) -> tuple[int, int]:
    step, _, count = given.partition(":")
    if not (step.isdecimal() and count.isdecimal() and int(step) > 1 and int(count) > 0):
        raise argparse.ArgumentTypeError(f"{given!r}: expected STEP:COUNT, such as 20:5 for steps 20 to 24, from step 2 on")
    return int(step), int(count)


def _size(given: str) -> tuple[int, int]:
    if given == "any":
        return 0, 0
    height, _, width = given.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{given!r}: expected HEIGHTxWIDTH in pixels, such as 473x473, or any")
    return int(height), int(width)


def _maps(given: str) -> tuple[str, ...]:
    if unknown := [name for name in given.split(",") if name not in MAPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected {' or '.join(MAPS)}, or both with a comma between them")
    return tuple(name for name in MAPS if name in given.split(","))


def _number(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given!r}: expected a whole number")
    return int(given)


OPTIONS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {  # argument: the modes that use it, and how it is parsed
    "config": (
        [mode for mode in jobs.JOBS if mode != "verify"],
        {"metavar": "RECIPE[:ARG]", "help": "a recipe, such as camvid or configs/mine.py, or a run's config.json"},
    ),
    "workdir": ([*jobs.JOBS], {"type": _path, "metavar": "DIR", "help": "directory of the run; default: runs/<recipe name>"}),
    "checkpoint": (
        ["evaluate", "report", "predict", "export"],
        {"type": _nonempty, "metavar": "WHICH", "help": "latest (the default), best or a step number"},
    ),
    "split": (
        ["report"],
        {"type": _nonempty, "metavar": "NAME", "help": "split of the dataset to report on; default: config.eval.split"},
    ),
    "against": (["report"], {"type": _path, "metavar": "DIR", "help": "directory of another run to compare with"}),
    "input": (
        ["predict", "check", "import", "verify", "export"],
        {
            "type": _input,
            "metavar": "PATH",
            "help": "an image, a folder, a video, a URL or a camera (/dev/video0) to predict; weights to import or verify; "
            "export: an image to show in the model card; check: a folder of images and labels, to write a recipe",
        },
    ),
    "output": (
        ["predict", "report", "check", "export", "preflight"],
        {
            "type": _path,
            "metavar": "PATH",
            "help": "directory for the results; export: the file or directory to write; check with --input: the recipe",
        },
    ),
    "format": (
        ["predict", "report", "export"],
        {
            "type": _nonempty,
            "help": "format of a benchmark server: cityscapes, ade20k or voc; report: fiftyone, to add a dataset for FiftyOne; "
            "export: torch, safetensors, hf, stablehlo, savedmodel, onnx or tflite",
        },
    ),
    "outputs": (["export"], {"choices": ("labels", "probabilities"), "help": "of a program; default: labels"}),
    "batch": (
        ["export"],
        {"type": _number, "metavar": "N", "help": "images that a program takes at once; 0: any number; default: 1"},
    ),
    "size": (
        ["export"],
        {"type": _size, "metavar": "HEIGHTxWIDTH", "help": "of a program's images, or any; default: config.eval.crop"},
    ),
    "license": (["export"], {"type": _nonempty, "metavar": "ID", "help": "of the weights, in the model card of --format hf"}),
    "profile": (
        ["train"],
        {"type": _steps, "metavar": "STEP:COUNT", "help": "trace COUNT steps from step STEP on into WORKDIR/profile"},
    ),
    "topology": (
        ["preflight"],
        {"type": _nonempty, "metavar": "NAME[,NAME...]", "help": "TPU pods to compile for, such as v5e:4x4; list shows all"},
    ),
    "images_per_chip": (
        ["preflight"],
        {
            "type": _number,
            "metavar": "N",
            "help": "sets batch_size to N images per chip (or parallel.spatial chips) of each pod",
        },
    ),
    "maps": (
        ["predict"],
        {
            "type": _maps,
            "metavar": "NAME[,NAME]",
            "default": (),
            "help": "confidence: 16-bit PNGs, the probability of the predicted class times 65535; probabilities: .npy, float16 "
            "[H, W, K], 2 K bytes per pixel",
        },
    ),
    "skip_existing": (
        ["predict"],
        {"action": "store_true", "help": "keep existing results, to continue an interrupted job"},
    ),
    "write_statistics": (
        ["check"],
        {"action": "store_true", "help": "measure normalize.mean and normalize.std in the training data"},
    ),
    "coordinator": (
        [*jobs.JOBS],
        {"type": _nonempty, "metavar": "HOST:PORT", "help": "address of the first process of this job; detected on clusters"},
    ),
    "processes": (
        [*jobs.JOBS],
        {"type": _number, "metavar": "N", "help": "number of processes of this job; 1: only this one, even on a cluster"},
    ),
    "process_id": ([*jobs.JOBS], {"type": _number, "metavar": "I", "help": "number of this process, from 0"}),
    "start_timeout": (
        [*jobs.JOBS],
        {"type": _number, "metavar": "SECONDS", "default": 300, "help": "limit for all processes to start; default: 300"},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit status: 0 for success, 1 after an error message for the user, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%m-%d %H:%M:%S", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.raiseExceptions = False  # if the reader of a pipe is gone, as after `| head -1`, the job goes on

    def program() -> None:
        arguments, overrides = _parse(argv)
        if arguments.mode == "preflight":
            jax.config.update("jax_platforms", "cpu")  # on a TPU machine, the compiler works while the TPU is busy
        _start_processes(arguments)
        _start_jax()
        if arguments.mode != "predict":  # in which each process computes for itself
            parallel.require_same({"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"})
        if jax.process_index():
            logger.setLevel(logging.WARNING)  # only the first process logs progress
        with _interruptible():
            jobs.JOBS[arguments.mode](arguments, overrides)

    return errors.exit_status(program)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Sends Ctrl-C again where Python ignores it: in a destructor, or in JAX's garbage-collection callback."""
    hook = sys.unraisablehook

    def resend(ignored: Any) -> None:
        if ignored.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(ignored)

    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _start_processes(arguments: argparse.Namespace) -> None:
    """Connects the processes of this job, if there are several (see `clusters`)."""
    given = arguments.coordinator, arguments.processes, arguments.process_id
    if (place := clusters.find_place(*given, arguments.start_timeout)) is None:
        return
    if arguments.mode not in jobs.MULTI_PROCESS_JOBS:
        raise errors.UserError(
            f"--mode {arguments.mode} runs in a single process, and this is process {place.process_id} of {place.processes}; "
            "start it once, with --processes 1 (on a host of a TPU pod, also set JAX_PLATFORMS=cpu)"
        )
    # With several processes, JAX catches SIGTERM, for training, which saves its state; the other modes end at once.
    jax.config.update("jax_enable_preemption_service", arguments.mode in ("train", "pretrain"))
    parallel.start_processes(place, {"--mode": arguments.mode}, arguments.start_timeout)


def _start_jax() -> None:
    """Makes JAX find its devices before anything else happens. Raises UserError if it finds none of JAX_PLATFORMS."""
    if jax.config.read("jax_enable_x64"):
        logger.warning("JAX_ENABLE_X64 is set; this program computes in float32 and int32, so it is turned off")
        jax.config.update("jax_enable_x64", False)
    programs.keep()
    programs.skip_tpu_compiler()
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if a known platform has no plugin
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise errors.UserError(
            f"JAX finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}{reason}; install the JAX build "
            "for it (pip install 'pspnet_jax[cuda13]'), or unset JAX_PLATFORMS"
        ) from error


def _without_traceback(record: logging.LogRecord) -> bool:
    """Logging filter that shortens a traceback about a failed plugin to one line; JAX continues without the plugin."""
    if record.exc_info and record.exc_info[1]:
        reason = str(record.exc_info[1]).strip() or type(record.exc_info[1]).__name__
        record.msg, record.args = f"{record.getMessage()}: {reason.splitlines()[0]}; its devices will not be used", ()
        record.exc_info = None
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise errors.UserError(message)

    def format_help(self) -> str:
        return f"{super().format_help()}\nfields of the config, with their defaults:\n{configs.describe_fields()}\n"


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(
        prog="pspnet",
        description="Train, evaluate and use PSPNet. Any field of the config can be set, as in --config.batch_size=8",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=pspnet_jax.__version__)
    parser.add_argument("--mode", choices=sorted(jobs.JOBS), default="train")
    parser.add_argument("--distributed", action="store_true", help=argparse.SUPPRESS)  # no longer needed
    for name, (modes, settings) in OPTIONS.items():
        used_by = "" if len(modes) == len(jobs.JOBS) else f"{', '.join(modes)}: "
        parser.add_argument(f"--{name}", **settings | {"help": used_by + settings["help"]})
    arguments, overrides = parser.parse_known_args(argv)
    if unknown := [o for o in overrides if o.startswith("--") and not o.startswith(("--config.", "--noconfig."))]:
        parser.error(f"{unknown[0]}: unknown argument; --help lists all, and --config.field=value sets a field of the config")
    for name, (modes, _) in OPTIONS.items():
        if getattr(arguments, name) != parser.get_default(name) and arguments.mode not in modes:
            parser.error(f"--{name}: --mode {arguments.mode} does not use it, only {', '.join(modes)}; leave it out")
    if arguments.mode in ("predict", "export") and str(arguments.input).startswith("hf://"):
        parser.error(
            f"--input {arguments.input}: is a name of weights, but --mode {arguments.mode} takes images there; --mode import "
            "makes a run of the weights, for --workdir"
        )
    return arguments, overrides


def command() -> NoReturn:
    """The console script `pspnet`."""
    peers.run(main)


if __name__ == "__main__":
    command()
