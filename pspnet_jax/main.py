"""The command line: `python -m pspnet_jax.main --config configs/cityscapes.py`, and what each mode does."""

import argparse
import difflib
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads images here; its start-up notes are noise

import jax
import numpy as np
import rich
from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from pspnet_jax import config as configs
from pspnet_jax import datasets, models, parallel, validation, weights
from pspnet_jax.infer import draw
from pspnet_jax.infer import evaluate as evaluation
from pspnet_jax.infer import predict as prediction
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.train import checkpoint

logger = logging.getLogger("pspnet_jax")
PICTURES = 4  # of the validation split, in each evaluation
PANELS = 12  # of each split, in --mode check


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0, or 1 after one sentence on a user's mistake."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    logger.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        arguments, overrides = _parse(argv)
        if arguments.distributed:
            if arguments.mode not in SHARED_JOBS:
                raise ValueError(f"--mode {arguments.mode} runs in one process: leave --distributed out")
            parallel.start_processes()
            if jax.process_index():
                logger.setLevel(logging.WARNING)  # the first process speaks for all
        JOBS[arguments.mode](arguments, overrides)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if not (_raised_here(error) or getattr(error, "filename", None)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(
        prog="python -m pspnet_jax.main",
        description="Train, evaluate and use PSPNet. Any field of the config can be set: --config.batch_size=8",
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=sorted(JOBS), default="train")
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
    if unknown := [o for o in overrides if o.startswith("-") and not o.startswith("--config.")]:
        parser.error(f"{unknown[0]}: unknown argument; --help lists them, and --config.field=value sets a field of the config")
    return arguments, overrides


def _raised_here(error: BaseException) -> bool:
    """Whether a raise of ours made it, with a sentence for the user; anything else is a bug and keeps its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(pathlib.Path(__file__).parent)) and (last.line or "").startswith("raise")


def _override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies --config.field=value arguments.

    Raises:
      ValueError: a field that does not exist, or a value of the wrong type.
    """
    fields = [field for field, _ in configs.leaves(config)]
    for field in (o.split("=")[0].removeprefix("--config.") for o in overrides if o.startswith("--")):
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=3)
            hint = f"did you mean {' or '.join(close)}" if close else "all fields are in pspnet_jax/config.py"
            raise ValueError(f"--config.{field}: there is no such field; {hint}")
    values, argv = flags.FlagValues(), ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        _, *rest = values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise ValueError(str(error).removeprefix("flag ")) from error
    if rest:
        raise ValueError(f"{rest[0]}: unknown argument; a field of the config is set by --config.field=value")
    return config


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode train: trains the recipe in its workdir, or goes on where it stopped."""
    if not arguments.config:
        raise ValueError("--config is missing: name a recipe, such as --config configs/quickstart.py")
    config = _override(configs.load_recipe(arguments.config), overrides)
    validation.validate(config, jax.device_count())
    workdir = _absolute(arguments.workdir or f"runs/{config.name}")
    for field in ("root", "extra_root"):
        if config.dataset[field]:
            config.dataset[field] = str(_absolute(config.dataset[field]))
    mixture = config.dataset.mixture
    config.dataset.mixture = tuple((name, str(_absolute(root)) if root else "", *rest) for name, root, *rest in mixture)
    if config.init_from:
        config.init_from = str(_absolute(config.init_from))
        if not _absolute(config.init_from).exists():
            raise ValueError(f"init_from={config.init_from}: no such file or directory")
        if _absolute(config.init_from).is_dir():
            checkpoint.Checkpoints(config.init_from, read_only=True).find("latest")
    info = datasets.describe(config.dataset)
    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    from pspnet_jax.data import pipeline, sources  # these import TensorFlow
    from pspnet_jax.train import loop

    sources.open_source(config.dataset, config.eval.split)
    opened = pipeline.open_training(config)
    examples = len(sources.open_source(config.dataset, config.dataset.train_split))
    epoch = round(examples * (1 + sum(weight for *_, weight in config.dataset.mixture)))
    predictor = _predictor(config)

    def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        host, hosts = jax.process_index(), jax.process_count()
        return pipeline.train_batches(config, start_step=start, host=host, hosts=hosts, opened=opened)

    def evaluate(variables: Any) -> evaluation.Report:
        report = _score(predictor, variables, config, info)
        logger.info(report)
        return report

    loop.fit(config, batches, evaluate, workdir, epoch)
    logger.info(f"{workdir} has checkpoints/, metrics.jsonl, pictures/ and tensorboard/")


def check(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode check: looks at all images and labels of a recipe, and pictures them."""
    if not arguments.config:
        raise ValueError("--config is missing: name a recipe, such as --config configs/cityscapes.py")
    config = _override(configs.load_recipe(arguments.config), overrides)
    validation.validate(config)
    info = datasets.describe(config.dataset)
    output = _absolute(arguments.output or f"{arguments.workdir or f'runs/{config.name}'}/check")
    from pspnet_jax.data import pipeline, survey

    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    problems = []
    parts = list(pipeline.training_parts(config.dataset))
    if config.eval.split != config.dataset.train_split:
        parts.append((config.dataset, config.eval.split))
    for number, (dataset, split) in enumerate(parts):
        found = survey.survey(dataset, split, info.num_classes)
        problems += found.problems
        logger.info(found)
        rich.print(found.table(info))
        name = split if dataset is config.dataset else f"mixture{number}_{split}"
        if examples := survey.samples(dataset, found, PANELS):
            draw.save(draw.contact_sheet(examples, info), output / f"{name}_images.png")
            draw.save(draw.class_frequencies(found.pixels, info), output / f"{name}_classes.png")
    logger.info(f"pictures of the labels, and of the classes' frequencies, are in {output}")
    if problems:
        raise ValueError("\n".join((*problems, f"{len(problems)} problem(s) found")))


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode evaluate: scores a checkpoint with its saved config, and writes WORKDIR/evaluation/SPLIT_STEP_PROTOCOL.json."""
    config, step, variables, workdir = _restore(arguments, overrides)
    info = datasets.describe(config.dataset)
    report = _score(_predictor(config), variables, config, info)
    if jax.process_index() == 0:
        how = [config.eval.inference, *map(str, config.eval.scales), *["flip"] * config.eval.flip]
        path = workdir / "evaluation" / f"{config.eval.split}_{step}_{'_'.join(how)}.json"
        report.write(path)
        rich.print(report.table())
        print(report)
        logger.info(f"step {step} of {workdir}; written to {path}")


def predict(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode predict: segments an image, a folder of images, or the images of config.eval.split, with a checkpoint."""
    if not arguments.output:
        raise ValueError(
            "--mode predict needs --output (a directory), and --input (an image or a folder) unless it is a split's"
        )
    config, _, variables, _ = _restore(arguments, overrides)
    info = datasets.describe(config.dataset)
    form = arguments.format or ""
    paths = prediction.find_images(arguments.input, bool(form)) if arguments.input else _images(config)
    prediction.predict(_predictor(config), variables, paths, arguments.output, info, form)
    what = f"the {form} server's form" if form else "index/, color/ and overlay/"
    logger.info(f"{len(paths)} images segmented: {what} in {arguments.output}")


def _images(config: ConfigDict) -> dict[str, str]:
    """The images of config.eval.split, with or without labels, by name."""
    from pspnet_jax.data import layouts

    dataset = config.dataset
    if dataset.name not in layouts.LAYOUTS:
        raise ValueError(f"--mode predict needs --input: the images of dataset.name={dataset.name!r} are no files")
    root, extra_root = (str(_absolute(path)) if path else "" for path in (dataset.root, dataset.extra_root))
    pairs = layouts.list_pairs(dataset.name, root, config.eval.split, extra_root)
    return {pair.name: pair.image for pair in pairs}


def import_weights(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode import: turns a file of others' weights into a run that the other modes take as it is."""
    if not (arguments.input and arguments.workdir):
        raise ValueError("--mode import needs --input (a file of weights) and --workdir (a directory to make the run in)")
    config = configs.load_recipe(arguments.config) if arguments.config else configs.base_config()
    recipe = config.copy_and_resolve_references()
    source = weights.inspect(_absolute(arguments.input))
    weights.configure(config, source)
    config.name = _absolute(arguments.input).stem
    if arguments.config:  # the recipe knows better what the weights are for
        config.name, config.dataset, config.eval = recipe.name, recipe.dataset, recipe.eval
    config = _override(config, overrides)
    validation.validate(config)
    info = datasets.describe(config.dataset)
    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    workdir = _absolute(arguments.workdir)
    model = models.build(config.model, info.num_classes)
    checkpoint.write_weights(workdir, config, weights.load(source.path, model), parallel.make_mesh())
    logger.info(f"{source}\nwritten to {workdir}; --mode evaluate, predict and export take it with --workdir {workdir}")


def export_weights(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode export: writes a checkpoint's weights under semseg's names."""
    if not (arguments.output and arguments.format):
        raise ValueError("--mode export needs --output (a file to write) and --format (torch or safetensors)")
    config, step, variables, workdir = _restore(arguments, overrides)
    if config.normalize.to_dict() != (usual := configs.base_config().normalize.to_dict()):
        raise ValueError(
            f"{workdir}: its network was trained on images normalized by {config.normalize.to_dict()}, but semseg's code, for "
            f"which --mode export writes, has {usual}"
        )
    model = models.build(config.model, len(config.dataset.class_names))
    weights.save(_absolute(arguments.output), variables, model, arguments.format)
    logger.info(f"step {step} of {workdir} written to {arguments.output}, under semseg's names")


def _restore(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[ConfigDict, int, Any, epath.Path]:
    """The checkpoint's config with the command line's overrides, its step, its variables, and the workdir."""
    if not (arguments.workdir or arguments.config):
        raise ValueError("--workdir is missing: name the directory of a training run")
    workdir = _absolute(arguments.workdir or f"runs/{configs.load_recipe(arguments.config).name}")
    saved, step, variables = checkpoint.load(workdir, arguments.checkpoint, parallel.make_mesh())
    config = _override(saved.copy_and_resolve_references(), overrides)
    validation.validate(config)
    if changed := [c for c in checkpoint.differences(saved, config) if c.startswith("model.")]:
        raise ValueError(f"{'; '.join(changed)}: the network is the one that was trained; leave --config.model out")
    return config, step, variables, workdir


def _absolute(path: str) -> epath.Path:
    return epath.Path(path).expanduser().resolve()


def _predictor(config: ConfigDict) -> Predictor:
    model = models.build(config.model, len(config.dataset.class_names))

    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return Predictor(apply, config, model.num_classes)


def _score(predictor: Predictor, variables: Any, config: ConfigDict, info: datasets.DatasetInfo) -> evaluation.Report:
    from pspnet_jax.data import pipeline, sources

    split = config.eval.split
    examples = pipeline.examples(config, split, host=jax.process_index(), hosts=jax.process_count())
    count = len(sources.open_source(config.dataset, split))
    return evaluation.evaluate(predictor, variables, examples, info, count, split, pictures=PICTURES)


JOBS = {
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "import": import_weights,
    "export": export_weights,
}
SHARED_JOBS = ("train", "evaluate")  # those that several processes can do together

if __name__ == "__main__":
    sys.exit(main())
