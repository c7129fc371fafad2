"""The command line: `python -m pspnet_jax.main --config configs/cityscapes.py`."""

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
from pspnet_jax import config as configs
from pspnet_jax import errors, files, jobs, parallel

logger = logging.getLogger("pspnet_jax")


def _text(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("is empty; a variable of the shell may not be set")
    return given


def _path(given: str) -> epath.Path:
    try:
        return files.user_path(_text(given))
    except errors.UserError as error:  # argparse would take it for a wrong value alone
        raise argparse.ArgumentTypeError(str(error)) from error


OPTIONS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {  # argument: the modes that read it, and how it is parsed
    "config": (
        [*jobs.JOBS],
        {"metavar": "FILE[:ARG]", "help": "a recipe, such as configs/camvid.py; or a run's config.json"},
    ),
    "workdir": ([*jobs.JOBS], {"type": _path, "metavar": "DIR", "help": "where the run lives; default: runs/<recipe name>"}),
    "checkpoint": (
        ["evaluate", "predict", "export"],
        {"type": _text, "metavar": "WHICH", "help": "latest (the default), best or a step"},
    ),
    "input": (
        ["predict", "import"],
        {"type": _path, "metavar": "PATH", "help": "an image or a folder to predict; a file to import"},
    ),
    "output": (
        ["predict", "check", "export"],
        {"type": _path, "metavar": "PATH", "help": "where the results go; export: the file to write"},
    ),
    "format": (
        ["predict", "export"],
        {"type": _text, "help": "cityscapes, ade20k or voc, for that server; export: torch or safetensors"},
    ),
    "skip_existing": (
        ["predict"],
        {"action": "store_true", "help": "keep the results that are there, to go on with a long job"},
    ),
    "distributed": (jobs.SHARED_JOBS, {"action": "store_true", "help": "join the other processes of this job (see launch/)"}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0, or 1 after one sentence on what the user has to change."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.raiseExceptions = False  # where nobody reads any more, as after `| head -1`, the job goes on
    try:
        arguments, overrides = _parse(argv)
        if arguments.distributed:
            parallel.start_processes()
        _start_jax()
        if jax.process_index():
            logger.setLevel(logging.WARNING)  # the first process speaks for all
        with _interruptible():
            jobs.JOBS[arguments.mode](arguments, overrides)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (sentence := errors.user_message(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within, Ctrl-C comes again where Python has dropped it: in a destructor, or in JAX's callback on garbage collection."""
    hook = sys.unraisablehook

    def again(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _start_jax() -> None:
    """Lets JAX find its devices before anything is read, so that what is wrong with them is said in one sentence.

    Raises:
      UserError: JAX_PLATFORMS names devices that JAX does not find.
    """
    if jax.config.read("jax_enable_x64"):
        logger.warning("JAX_ENABLE_X64 is set; this program computes in float32 and int32, and leaves it off")
        jax.config.update("jax_enable_x64", False)
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a known platform has no plugin
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise errors.UserError(
            f"JAX finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}{reason}; install the build for it "
            "(pip install -e '.[cuda]'), or unset JAX_PLATFORMS"
        ) from error


def _without_traceback(record: logging.LogRecord) -> bool:
    """A logging filter that makes one sentence of what JAX logs about a plugin that fails; JAX then goes on without it."""
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
        prog="python -m pspnet_jax.main",
        description="Train, evaluate and use PSPNet. Any field of the config can be set: --config.batch_size=8",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=pspnet_jax.__version__)
    parser.add_argument("--mode", choices=sorted(jobs.JOBS), default="train")
    for name, (modes, settings) in OPTIONS.items():
        readers = "" if len(modes) == len(jobs.JOBS) else f"{', '.join(modes)}: "
        parser.add_argument(f"--{name}", **settings | {"help": readers + settings["help"]})
    arguments, overrides = parser.parse_known_args(argv)
    if unknown := [o for o in overrides if o.startswith("--") and not o.startswith(("--config.", "--noconfig."))]:
        parser.error(f"{unknown[0]}: unknown argument; --help lists them, and --config.field=value sets a field of the config")
    for name, (modes, _) in OPTIONS.items():
        if getattr(arguments, name) and arguments.mode not in modes:
            parser.error(f"--{name}: --mode {arguments.mode} does not read it, only {', '.join(modes)}; leave it out")
    return arguments, overrides


if __name__ == "__main__":
    sys.exit(main())
