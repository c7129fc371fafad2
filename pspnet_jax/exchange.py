"""The modes that exchange networks with other projects: import, verify and export. `jobs` has the others.

Each function takes the parsed arguments (see `main`) and the overrides of the config.
"""

import argparse
import contextlib
import logging
from collections.abc import Sequence

import jax
import rich

from pspnet_jax import config as configs
from pspnet_jax import datasets, files, models, optimizers, parallel, runs, scoring, weights
from pspnet_jax.errors import MissingFileError, UserError
from pspnet_jax.image_files import RGB8
from pspnet_jax.train import checkpoint
from pspnet_jax.train.step import new_state

logger = logging.getLogger("pspnet_jax")


def import_weights(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode import: converts third-party weights to a run that the other modes can use."""
    if not (arguments.input and arguments.workdir):
        raise UserError(
            "--mode import needs --input (a weights file, or its name) and --workdir (the directory of the new run)"
        )
    recipe = configs.load_recipe(arguments.config) if arguments.config else None
    workdir = arguments.workdir
    checkpoint.require_no_run(workdir)
    config, variables = runs.read_weights(arguments.input, lambda config: configs.override(config, overrides), recipe)
    state = new_state(config, optimizers.build(config.optimizer, config.total_steps), variables)
    checkpoint.create_run(workdir, config, jax.device_put(state, parallel.replicated(parallel.make_mesh())))
    logger.info(f"written to {workdir}; use it in --mode evaluate, predict and export with --workdir {workdir}")


def verify(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode verify: evaluates a published network by the protocol of its publication, and compares the scores."""
    from pspnet_jax.data import sources
    from pspnet_jax.weights import published

    if not arguments.input:
        raise UserError("--mode verify needs --input (a published weights file) and --config.dataset.root (the dataset)")
    source = weights.inspect(arguments.input)
    network, config = published.find(source), configs.base_config()
    weights.configure(config, source)
    config.name, config.dataset.name = f"verify_{weights.stem(arguments.input)}", network.dataset
    info = datasets.table(network.dataset)
    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    config = runs.override_data(config, overrides)
    variables = runs.load_weights(source, config, info)
    logger.info(f"{source}; recognized as {network}")
    workdir, scores = runs.workdir_of(arguments, config.name), {}
    data = sources.open_source(config.dataset, published.SPLITS[network.dataset])
    for title, (fields, _) in network.evaluations().items():
        config.eval.update(fields)
        ready = scoring.segmenter(config, variables)
        report, _ = scoring.score(ready, config, scoring.sort_by_size(ready.predictor, data))
        scores[title] = 100 * report.metrics.mean_iou
        saved = report.save(workdir / "evaluation", {"checkpoint": source.path, "data": data.fingerprint})
        logger.info(f"{title}: {report}\nwritten to {saved}")
    rich.print(published.table(network, scores))
    published.require_agreement(network, scores)


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode export: writes a checkpoint for semseg's code, for the hub, or as a program for another runtime."""
    from pspnet_jax.deploy import export as programs

    batch = 1 if arguments.batch is None else arguments.batch
    _check_export(arguments, batch)
    restored = runs.restore(arguments, overrides)
    variables = jax.tree.map(parallel.local, restored.variables)
    channels, dtype = restored.config.model.channels, restored.config.dataset.image_dtype
    if (channels, dtype) != RGB8:
        raise UserError(
            f"{restored.workdir}: the network takes {dtype} images with {channels} channels, and only networks for 8-bit RGB "
            "can be exported; use --mode predict or pspnet_jax.load"
        )
    if arguments.format in programs.FORMATS:
        size = arguments.size or tuple(restored.config.eval.crop)
        program = programs.Program(restored.config, variables, arguments.outputs or "labels", batch, size)
        programs.export(program, arguments.format, arguments.output)
    elif arguments.format == "hf":
        _export_folder(arguments, restored)
    else:
        _export_weights(arguments, restored)
    logger.info(f"step {restored.step} of {restored.workdir} written to {arguments.output}")


def _check_export(arguments: argparse.Namespace, batch: int) -> None:
    """Refuses an export that cannot succeed, before its checkpoint is read."""
    from pspnet_jax.deploy import export as programs

    formats = (*weights.FORMATS, "hf", *programs.FORMATS)
    if not (arguments.output and arguments.format):
        raise UserError(f"--mode export needs --output (a file or directory to write) and --format ({', '.join(formats)})")
    if arguments.format not in formats:
        raise UserError(f"--format {arguments.format}: expected one of {', '.join(formats)}")
    for names, users in ((("outputs", "batch", "size"), tuple(programs.FORMATS)), (("license", "input"), ("hf",))):
        for name in names:
            if arguments.format not in users and getattr(arguments, name) is not None:
                raise UserError(f"--{name}: --format {arguments.format} does not use it, only {', '.join(users)}; leave it out")
    if arguments.format in programs.FORMATS:
        programs.check(arguments.format, arguments.output, batch, arguments.size)
    elif arguments.format == "hf":
        files.require_new_folder(arguments.output)
        if arguments.input and not files.is_there(files.absolute(arguments.input)):
            raise MissingFileError(f"--input {arguments.input}: no such image")
    else:
        weights.check_output(arguments.output, arguments.format)


def _export_folder(arguments: argparse.Namespace, restored: runs.Restored) -> None:
    """Writes a folder for the hub, with the prediction of --input or a picture of the run."""
    from pspnet_jax.deploy import hub

    config, step, variables, workdir, _ = restored
    picture = hub.example(lambda: scoring.segmenter(config, variables), arguments.input, workdir)
    if not picture:
        logger.warning(f"{workdir} has no pictures, so the model card has none; --input IMAGE adds the prediction of an image")
    with contextlib.closing(checkpoint.Checkpoints(workdir, read_only=True)) as checkpoints:
        scores = hub.read_scores(workdir, step, config, variables, checkpoints.scores.of(step))
    if not scores:
        logger.warning(f"{workdir} has no score of step {step}, so the model card has none; --mode evaluate measures it")
    if not arguments.license:
        logger.warning("the model card says `license: unknown`; choose one with --license, such as --license mit")
    hub.write(config, variables, arguments.output, arguments.license or "unknown", scores, picture)


def _export_weights(arguments: argparse.Namespace, restored: runs.Restored) -> None:
    """Writes the weights of a checkpoint under semseg's parameter names."""
    config, _, variables, workdir, _ = restored
    if config.normalize.to_dict() != (usual := configs.base_config().normalize.to_dict()):
        raise UserError(
            f"{workdir}: the network was trained with normalize={config.normalize.to_dict()}, but the exported file is for "
            f"semseg's code, which uses {usual}; this network cannot be exported"
        )
    model = models.build(config.model, len(config.dataset.class_names))
    weights.save(arguments.output, variables, model, arguments.format)
