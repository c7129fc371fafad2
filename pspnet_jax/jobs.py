"""The modes of the command line, one function each, which connect config, data, network, training and inference.

Each function takes the parsed arguments (see `main`) and the overrides of the config.
"""

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import psutil
import rich
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, files, losses, models, optimizers, parallel, pretrain, runs, weights
from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw, inputs, video
from pspnet_jax.infer import evaluate as evaluation
from pspnet_jax.infer import predict as prediction
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.report import Report
from pspnet_jax.train import checkpoint
from pspnet_jax.train.step import new_state

logger = logging.getLogger("pspnet_jax")
Evaluation = tuple[Mapping[str, Any], Mapping[str, Any]]  # metrics, and pictures by name
PICTURES = 4  # of the validation split, written in each evaluation
PANELS = 12  # images of each split in the contact sheet of --mode check


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode train: trains a recipe, or resumes the run in its workdir."""
    from pspnet_jax.data import pipeline  # noqa: F401 -- imports TensorFlow, which takes seconds

    logger.info(f"Python and its packages were ready after {time.time() - psutil.Process().create_time():.1f} s")
    with parallel.fail_together("reading the recipe"):
        config = runs.from_recipe(arguments, overrides, jax.device_count())
        workdir = runs.workdir_of(arguments, config.name)
        if arguments.profile and (last := sum(arguments.profile) - 1) > config.total_steps:
            raise UserError(
                f"--profile: step {last} cannot be traced, because total_steps={config.total_steps}; choose earlier steps"
            )
    train_run(config, workdir, arguments.profile)


def train_run(config: ConfigDict, workdir: epath.Path, traced: tuple[int, int] | None = None) -> None:
    """Trains a config that `runs.prepare` has prepared, or resumes its run.

    Args:
      config: fields of its dataset and loss are filled in.
      workdir: directory of the run.
      traced: first step to trace with JAX's profiler, and the number of steps.
    """
    from pspnet_jax.data import overlap, palettes, pipeline, sources  # imports TensorFlow, as does clu.metric_writers after it
    from pspnet_jax.train import loop, profile

    from clu import metric_writers  # isort: skip

    began = time.perf_counter()
    with parallel.fail_together("checking init_from"):
        if config.init_from:
            runs.check_init_from(config, workdir)
        elif not checkpoint.exists(workdir):
            runs.warn_of_random_weights(config)
    parallel.require_same(runs.comparable(config))
    validation_source = sources.open_source(config.dataset, config.eval.split)
    data = pipeline.open_training(config)
    overlap.refuse_inside(workdir, [*data.sources, validation_source])
    overlap.warn_shared(data.sources, validation_source)
    palette = palettes.require_agreement([source.palette for source in (*data.sources, validation_source)])
    config.dataset.palette = tuple((value, *color) for value, (color, _) in sorted(palette.items()))
    config.loss.class_weights = runs.class_weights(config, data.sources)
    data_read = {"training data": data.fingerprint, "validation data": validation_source.fingerprint}
    parallel.require_same({**data_read, **runs.comparable(config)})
    logger.info(f"the data was checked in {time.perf_counter() - began:.1f} s")
    model = models.build(config.model, len(config.dataset.class_names))
    host, hosts = parallel.data_share(parallel.make_mesh(spatial=config.parallel.spatial))

    def batches(start: int) -> Iterable[Mapping[str, Any]]:
        dataset = pipeline.train_dataset(config, start_step=start, host=host, hosts=hosts, data=data)
        return pipeline.as_numpy(dataset)

    loop.fit(
        config,
        model=model,
        loss=losses.build(config),
        optimizer=optimizers.build(config.optimizer, config.total_steps),
        batches=batches,
        evaluate=evaluator(config, model, validation_source),
        workdir=workdir,
        examples_per_epoch=data.examples_per_epoch,
        fingerprint=data.fingerprint,
        writer=metric_writers.SummaryWriter,
        hooks=[profile.hook(workdir / "profile", *traced)] if traced and jax.process_index() == 0 else (),
    )
    logger.info(f"{workdir} has checkpoints/, metrics.jsonl, pictures/ and tensorboard/")


def evaluator(config: ConfigDict, model: nn.Module, source: Any) -> Callable[[Any], Evaluation]:
    """Returns the `evaluate` argument of `fit` for a segmentation model: variables -> (metrics, pictures).

    Args:
      config: the fields eval, normalize, model.align_corners and dataset are used.
      model: with train=False, maps normalized images f32[N, H, W, 3] to logits [N, H, W, K].
      source: the opened split (see `data.sources`).
    """
    info = datasets.describe(config.dataset)
    predictor = _predictor(config, model)
    source = _sort_by_size(predictor, source)

    def evaluate(variables: Any) -> Evaluation:
        report, pictures = _score(Segmenter(predictor, variables, info), config, source)
        logger.info(report)
        return report.to_json() | {"data": source.fingerprint}, pictures

    return evaluate


def check(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode check: reads all images and labels of a recipe, lists problems, and writes pictures of examples."""
    from pspnet_jax.data import overlap, palettes, sources, survey

    config = runs.from_recipe(arguments, overrides)
    info = datasets.describe(config.dataset)
    output = arguments.output or runs.workdir_of(arguments, config.name) / "check"
    problems, pictures, palettes_found, opened = [], {}, [], list[Any]()
    training = list(sources.training_parts(config.dataset))
    parts = training.copy()
    if config.eval.split != config.dataset.train_split:
        parts.append((config.dataset, config.eval.split))
    for number, (dataset, split) in enumerate(parts):
        try:
            found = survey.survey(dataset, split, info.num_classes)
        except UserError as error:  # the other splits are still checked
            problems.append(str(error))
            continue
        problems += found.problems
        palettes_found.append(found.palette)
        opened.append(found.source)
        logger.info(found)
        rich.print(found.table(info))
        name = split if dataset is config.dataset else f"mixture{number}_{split}"
        if examples := survey.samples(found, PANELS):
            pictures[f"{name}_images.png"] = draw.contact_sheet(examples, info)
            pictures[f"{name}_classes.png"] = draw.class_frequencies(found.pixels, info)
    if len(opened) == len(parts):
        overlap.warn_shared(opened[: len(training)], opened[-1] if len(parts) > len(training) else opened[0])
    for step in (lambda: _write_pictures(pictures, output, opened), lambda: palettes.require_agreement(palettes_found)):
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join((*problems, f"{len(problems)} problem(s) found")))


def _write_pictures(pictures: Mapping[str, Any], output: epath.Path, opened: Sequence[Any]) -> None:
    """Writes the pictures of --mode check, but never into the dataset or over the user's files."""
    from pspnet_jax.data import overlap

    overlap.refuse_inside(output, opened)
    with files.writing(output, "the pictures are missing"):
        for name, picture in pictures.items():
            draw.save_replacing_own(picture, output / name)
    logger.info(f"pictures of the labels and of the class frequencies are in {output}")


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode evaluate: scores a checkpoint with its saved config, and writes a new report to WORKDIR/evaluation/."""
    from pspnet_jax.data import palettes, sources

    config, step, variables, workdir, saved = runs.restore(arguments, overrides)
    network, source = segmenter(config, variables), sources.open_source(config.dataset, config.eval.split)
    parallel.require_same({"validation data": source.fingerprint})
    _warn_of_training_images(saved, source)
    palettes.require_agreement([palettes.training_colors(saved.dataset), source.palette])
    source = _sort_by_size(network.predictor, source)
    report, _ = _score(network, config, source)
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the reader of the pipe is gone, as after `| head -1`
            rich.print(report.table())
            print(f"{report}, step {step} of {workdir}", flush=True)
        roots = {field: config.dataset[field] for field in ("root", "extra_root")}
        fields = {"model": config.model.to_dict(), "normalize": config.normalize.to_dict()}
        origin = {"step": step, "checkpoint": str(workdir), **roots, "tfds_name": config.dataset.tfds_name, **fields}
        origin["data"] = source.fingerprint
        logger.info(f"written to {report.save(workdir / 'evaluation', origin)}")


def predict(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode predict: segments an image, a folder, a video, or the images of config.eval.split."""
    if not arguments.output:
        raise UserError(
            "--mode predict needs --output (a directory); without --input (an image or a folder) it predicts config.eval.split"
        )
    if arguments.input and video.is_video(arguments.input):
        return _predict_video(arguments, overrides)
    config, step, variables, workdir, _ = runs.restore(arguments, overrides)
    server_format = arguments.format or ""
    with parallel.fail_together("listing the images"):
        paths = (
            inputs.find_images(arguments.input, bool(server_format), arguments.output)
            if arguments.input
            else _split_images(config)
        )
    network = segmenter(config, variables)
    logger.info(f"predicting {len(paths)} image(s) with step {step} of {workdir} on {network.predictor.device}")
    split = {field: config.dataset[field] for field in ("name", "root")} | {"split": config.eval.split}
    origin = {"checkpoint": str(workdir), "step": step, "input": str(arguments.input) if arguments.input else split}
    prediction.predict(network, paths, arguments.output, server_format, arguments.skip_existing, origin)


def _predict_video(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes OUTPUT/overlay/NAME.mp4."""
    source, target = arguments.input, arguments.output / "overlay" / f"{video.name_of(arguments.input)}.mp4"
    if arguments.format or jax.process_count() > 1:
        raise UserError(f"--input {source}: is a video, which is predicted without --format, and in a single process")
    if arguments.skip_existing and files.is_there(target):
        return logger.info(f"{target} is there already")
    config, step, variables, workdir, _ = runs.restore(arguments, overrides)
    network, began = segmenter(config, variables), time.perf_counter()
    logger.info(f"predicting {source} with step {step} of {workdir} on {network.predictor.device}")
    frames = video.write_overlay(network, source, target)
    logger.info(f"{frames} frames written to {target}, {frames / (time.perf_counter() - began):.3g} frames/s")


def import_weights(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode import: converts third-party weights to a run that the other modes can use."""
    if not (arguments.input and arguments.workdir):
        raise UserError(
            "--mode import needs --input (a weights file, or its name) and --workdir (the directory of the new run)"
        )
    recipe = configs.load_recipe(arguments.config) if arguments.config else None
    workdir = arguments.workdir
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
    config.name, config.dataset.name = f"verify_{epath.Path(arguments.input).stem}", network.dataset
    info = datasets.table(network.dataset)
    config.dataset.class_names, config.dataset.colors = info.class_names, info.colors
    config = runs.override_data(config, overrides)
    variables = runs.load_weights(source, config, info)
    logger.info(f"{source}; recognized as {network}")
    workdir, scores = runs.workdir_of(arguments, config.name), {}
    for title, (fields, _) in network.evaluations().items():
        config.eval.update(fields)
        data, ready = sources.open_source(config.dataset, config.eval.split), segmenter(config, variables)
        report, _ = _score(ready, config, _sort_by_size(ready.predictor, data))
        scores[title] = 100 * report.metrics.mean_iou
        saved = report.save(workdir / "evaluation", {"checkpoint": source.path, "data": data.fingerprint})
        logger.info(f"{title}: {report}\nwritten to {saved}")
    rich.print(published.table(network, scores))
    published.require_agreement(network, scores)


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode export: writes a checkpoint for semseg's code, for the hub, or as a program for another runtime."""
    from pspnet_jax.deploy import export as programs

    formats = (*weights.FORMATS, "hf", *programs.FORMATS)
    if not (arguments.output and arguments.format):
        raise UserError(f"--mode export needs --output (a file or directory to write) and --format ({', '.join(formats)})")
    if arguments.format not in formats:
        raise UserError(f"--format {arguments.format}: expected one of {', '.join(formats)}")
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output}: already exists; choose another name, or delete it")
    for names, users in ((("outputs", "batch", "size"), tuple(programs.FORMATS)), (("license", "input"), ("hf",))):
        for name in names:
            if arguments.format not in users and getattr(arguments, name) is not None:
                raise UserError(f"--{name}: --format {arguments.format} does not use it, only {', '.join(users)}; leave it out")
    restored = runs.restore(arguments, overrides)
    variables = jax.tree.map(parallel.local, restored.variables)
    if arguments.format in programs.FORMATS:
        batch = 1 if arguments.batch is None else arguments.batch
        size = arguments.size or tuple(restored.config.eval.crop)
        program = programs.Program(restored.config, variables, arguments.outputs or "labels", batch, size)
        programs.export(program, arguments.format, arguments.output)
    elif arguments.format == "hf":
        _export_folder(arguments, restored)
    else:
        _export_weights(arguments, restored)
    logger.info(f"step {restored.step} of {restored.workdir} written to {arguments.output}")


def _export_folder(arguments: argparse.Namespace, restored: runs.Restored) -> None:
    """Writes a folder for the hub, with the prediction of --input or a picture of the run."""
    from pspnet_jax.deploy import hub

    config, step, variables, workdir, _ = restored
    picture = hub.example(lambda: segmenter(config, variables), arguments.input, workdir)
    if not picture:
        logger.warning(f"{workdir} has no pictures, so the model card has none; --input IMAGE adds the prediction of an image")
    with contextlib.closing(checkpoint.Checkpoints(workdir, read_only=True)) as checkpoints:
        scores = hub.read_scores(workdir, step, config, checkpoints.score(step))
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


def preflight(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode preflight: compiles a recipe for TPU pods, without a TPU, and shows what it needs there."""
    from pspnet_jax.deploy import chips, preflight_report
    from pspnet_jax.deploy import preflight as preflights

    if not arguments.topology:
        raise UserError("--mode preflight needs --topology, such as v5e:4x4 or v5e:4x4,v6e:16x16; --topology list shows all")
    if arguments.topology == "list":
        return rich.print(chips.table())
    topologies, config = chips.parse(arguments.topology), runs.from_recipe(arguments, overrides)
    if config.loss.class_weighting:  # the compiled programs depend only on whether there are weights
        config.loss.class_weights = (1.0,) * len(config.dataset.class_names)
    rows = list(preflights.preflight(config, topologies, arguments.images_per_chip or 0))
    rich.print(preflight_report.table(rows))
    output = arguments.output or runs.workdir_of(arguments, config.name) / "preflight"
    with files.writing(output, "the results are missing"):
        with files.atomic(output / "preflight.json") as path:
            path.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
        with files.atomic(output / "preflight.png") as path, path.open("wb") as file:
            preflight_report.plot(rows, config.name).savefig(file, dpi=100)
    logger.info(f"written to {output}/preflight.json and preflight.png")


JOBS = {
    "check": check,
    "train": train,
    "pretrain": pretrain.pretrain,
    "evaluate": evaluate,
    "predict": predict,
    "import": import_weights,
    "verify": verify,
    "preflight": preflight,
    "export": export,
}
MULTI_PROCESS_JOBS = ("train", "pretrain", "evaluate", "predict")  # modes that several processes can run together


def _warn_of_training_images(saved: ConfigDict, source: Any) -> None:
    """Warns if the training data, where it is available, contains images that will be evaluated."""
    from pspnet_jax.data import overlap, sources

    with contextlib.suppress(UserError):  # the training data is not available
        parts = list(sources.training_parts(saved.copy_and_resolve_references().dataset))
        if not any("://" in dataset.root for dataset, _ in parts):  # too slow in a bucket
            overlap.warn_shared([sources.open_source(*part, check=False) for part in parts], source)


def _split_images(config: ConfigDict) -> dict[str, str]:
    """Returns {name: path} of the images of config.eval.split, labeled or not."""
    from pspnet_jax.data import layouts

    dataset = config.dataset
    if dataset.name not in layouts.LAYOUTS:
        raise UserError(f"--mode predict needs --input, since the images of dataset.name={dataset.name!r} are not files")
    pairs = layouts.list_pairs(dataset.name, dataset.root, config.eval.split, dataset.extra_root)
    return {pair.name: pair.image for pair in pairs}


def segmenter(config: ConfigDict, variables: Any, devices: Sequence[jax.Device] | None = None) -> Segmenter:
    """Returns the segmenter of the network that a config describes, on these devices of this process, by default all."""
    info = datasets.describe(config.dataset)
    return Segmenter(_predictor(config, models.build(config.model, info.num_classes), devices), variables, info)


def _predictor(config: ConfigDict, model: nn.Module, devices: Sequence[jax.Device] | None = None) -> Predictor:
    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return Predictor(apply, config, datasets.describe(config.dataset).num_classes, devices)


def _sort_by_size(predictor: Predictor, source: Any) -> Any:
    """Returns the source sorted by image size for whole-image inference, otherwise unchanged; logs the number of sizes."""
    if predictor.settings.inference != "whole":
        return source
    from pspnet_jax.data.by_size import BySize

    ordered = BySize(source)
    predictor.log_compilations(ordered.sizes)
    return ordered


def _score(network: Segmenter, config: ConfigDict, source: Any) -> tuple[Report, Mapping[str, Any]]:
    """Evaluates config.eval.split, opened as `source`."""
    from pspnet_jax.data import pipeline

    dataset = pipeline.eval_dataset(config, host=jax.process_index(), hosts=jax.process_count(), source=source)
    return evaluation.evaluate(network, pipeline.as_numpy(dataset), len(source), config.eval.split, pictures=PICTURES)
