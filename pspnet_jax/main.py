"""The command line: `python -m pspnet_jax.main --config configs/cityscapes.py`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import logging as absl_logging

from pspnet_jax import config as configs
from pspnet_jax import jobs, parallel
from pspnet_jax.errors import UserError

logger = logging.getLogger("pspnet_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0, or 1 after one sentence on a user's mistake."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        arguments, overrides = _parse(argv)
        if arguments.distributed:
            if arguments.mode not in jobs.SHARED_JOBS:
                raise UserError(f"--mode {arguments.mode} runs in one process: leave --distributed out")
            parallel.start_processes()
            if jax.process_index():
                logger.setLevel(logging.WARNING)  # the first process speaks for all
        jobs.JOBS[arguments.mode](arguments, overrides)
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.filename is None:
            raise  # not about a file of the user's
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def format_help(self) -> str:
        return f"{super().format_help()}\nfields of the config, with their defaults:\n{configs.describe_fields()}\n"


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(
        prog="python -m pspnet_jax.main",
        description="Train, evaluate and use PSPNet. Any field of the config can be set: --config.batch_size=8",
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=sorted(jobs.JOBS), default="train")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a recipe, such as configs/cityscapes.py")
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives; default: runs/<recipe name>")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="WHICH", help="evaluate, predict, export: latest, best or a step"
    )
    parser.add_argument("--input", metavar="PATH", help="predict: an image or a folder; import: a checkpoint file")
    parser.add_argument("--output", metavar="PATH", help="predict, check: where the results go; export: the file to write")
    parser.add_argument("--format", help="predict: cityscapes, ade20k or voc, for that server; export: torch or safetensors")
    parser.add_argument("--distributed", action="store_true", help="join the other processes of this job (see launch/)")
    arguments, overrides = parser.parse_known_args(argv)
    if unknown := [o for o in overrides if o.startswith("--") and not o.startswith(("--config.", "--noconfig."))]:
        parser.error(f"{unknown[0]}: unknown argument; --help lists them, and --config.field=value sets a field of the config")
    return arguments, overrides


if __name__ == "__main__":
    sys.exit(main())
