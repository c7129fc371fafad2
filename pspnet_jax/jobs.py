"""The modes of the command line, one function each, which connect config, data, network, training and inference.

Those of other modes are in `checking`, `exchange`, `pretrain` and `analysis.report`. Each function takes the parsed arguments
(see `main`) and the overrides of the config.
"""

import argparse
import contextlib
import functools
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

from pspnet_jax import (
    checking,
    datasets,
    exchange,
    figures,
    files,
    losses,
    optimizers,
    parallel,
    pretrain,
    runs,
    scoring,
)
from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw, inputs, video
from pspnet_jax.infer import predict as prediction
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.report import Report
from pspnet_jax.train import checkpoint, tracking

logger = logging.getLogger("pspnet_jax")
Evaluation = tuple[Mapping[str, Any], Mapping[str, Any]]  # metrics, and pictures by name


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode train: trains a recipe, or resumes the run in its workdir."""
    with parallel.fail_together("reading the recipe"):
        config = runs.from_recipe(arguments, overrides, jax.device_count())
        workdir = runs.workdir_of(arguments, config.name)
        if arguments.profile and (last := sum(arguments.profile) - 1) > config.total_steps:
            raise UserError(
                f"--profile: step {last} cannot be traced, because total_steps={config.total_steps}; choose earlier steps"
            )
    from pspnet_jax.data import pipeline  # noqa: F401 -- imports TensorFlow, which takes seconds

    logger.info(f"Python and its packages were ready after {time.time() - psutil.Process().create_time():.1f} s")
    reports = train_run(config, workdir, arguments.profile)
    if reports and jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the reader of the pipe is gone, as after `| head -1`
            rich.print(reports[-1].table())


def train_run(config: ConfigDict, workdir: epath.Path, traced: tuple[int, int] | None = None) -> list[Report]:
    """Trains a config that `runs.prepare` has prepared, or resumes its run, and returns the reports of its evaluations.

    Fields of its dataset and loss are filled in. `traced` is the first step to trace with JAX's profiler, and their number.
    """
    from pspnet_jax.data import overlap, palettes, pipeline, sources  # imports TensorFlow, as does clu.metric_writers after it
    from pspnet_jax.train import loop, profile

    from clu import metric_writers  # isort: skip

    began = time.perf_counter()
    with parallel.fail_together("checking track and init_from"):
        tracking.require(config.track)
        if config.init_from:
            runs.check_init_from(config, workdir)
        elif not checkpoint.saved_steps(workdir):
            runs.warn_of_random_weights(config)
    parallel.require_same(runs.comparable(config))
    validation_source = sources.open_source(config.dataset, config.eval.split, channels=config.model.channels)
    data = pipeline.open_training(config)
    overlap.refuse_inside(workdir, [*data.sources, validation_source])
    overlap.warn_shared(data.sources, validation_source)
    palette = palettes.require_agreement([source.palette for source in (*data.sources, validation_source)])
    config.dataset.palette = tuple((value, *color) for value, (color, _) in sorted(palette.items()))
    config.loss.class_weights = runs.class_weights(config, data.sources)
    data_read = {"training data": data.fingerprint, "validation data": validation_source.fingerprint}
    parallel.require_same({**data_read, **runs.comparable(config)})
    logger.info(f"the data was checked in {time.perf_counter() - began:.1f} s")
    model = runs.build_model(config, len(config.dataset.class_names))
    host, hosts = parallel.data_share(parallel.make_mesh(spatial=config.parallel.spatial))
    reports: list[Report] = []

    def batches(start: int) -> Iterable[Mapping[str, Any]]:
        dataset = pipeline.train_dataset(config, start_step=start, host=host, hosts=hosts, data=data)
        return pipeline.as_numpy(dataset)

    loop.fit(
        config,
        model=model,
        loss=losses.build(config),
        optimizer=optimizers.build(config.optimizer, config.total_steps),
        batches=batches,
        evaluate=evaluator(config, model, validation_source, reports),
        workdir=workdir,
        examples_per_epoch=data.examples_per_epoch,
        fingerprint=data.fingerprint,
        writer=metric_writers.SummaryWriter,
        hooks=[profile.hook(workdir / "profile", *traced)] if traced and jax.process_index() == 0 else (),
    )
    logger.info(f"{workdir} has checkpoints/, metrics.jsonl, curves.png, pictures/ and tensorboard/")
    return reports


def evaluator(
    config: ConfigDict, model: nn.Module, source: Any, reports: list[Report] | None = None
) -> Callable[[Any], Evaluation]:
    """Returns the `evaluate` argument of `fit` for a segmentation model: variables -> (metrics, pictures).

    Args:
      config: the fields eval, normalize, model.align_corners and dataset are used.
      model: with train=False, maps normalized images f32[N, H, W, 3] to logits [N, H, W, K].
      source: the opened split (see `data.sources`).
      reports: the report of each evaluation is appended to it.
    """
    info = datasets.describe(config.dataset)
    predictor = scoring.build_predictor(config, model)
    source = scoring.sort_by_size(predictor, source)

    def evaluate(variables: Any) -> Evaluation:
        report, pictures = scoring.score(Segmenter(predictor, variables, info), config, source)
        logger.info(report)
        if reports is not None:
            reports.append(report)
        matrix = functools.partial(figures.confusion_matrix, report.matrix, info.class_names)
        named = {name.replace("/", "_"): picture for name, picture in pictures.items()}  # as files of one directory
        return report.to_json() | {"data": source.fingerprint}, {**named, "confusion_matrix": matrix}

    return evaluate


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode evaluate: scores a checkpoint with its saved config, and writes a new report to WORKDIR/evaluation/."""
    config, step, variables, workdir, saved = runs.restore(arguments, overrides)
    network = scoring.segmenter(config, variables)
    source = scoring.sort_by_size(network.predictor, scoring.open_split(config, saved))
    report, _ = scoring.score(network, config, source)
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the reader of the pipe is gone, as after `| head -1`
            rich.print(report.table())
            print(f"{report}, step {step} of {workdir}", flush=True)
        origin = {"step": step, "checkpoint": str(workdir), "weights": parallel.checksum(variables)}
        origin |= {field: config.dataset[field] for field in ("root", "extra_root", "tfds_name")}
        origin |= {field: config[field].to_dict() for field in ("model", "normalize")} | {"data": source.fingerprint}
        path = report.save(workdir / "evaluation", origin)
        picture = figures.confusion_matrix(report.matrix, report.info.class_names)
        draw.save(picture, path.with_name(f"{path.stem}_confusion.png"))
        logger.info(f"written to {path}, and the confusion matrix to {path.stem}_confusion.csv and .png beside it")


def report(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode report: shows why a network fails, in a folder of pages, pictures and tables."""
    from pspnet_jax.analysis import report as analysis  # imports SciPy and TensorFlow

    analysis.report(arguments, overrides)


def predict(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """--mode predict: segments an image, a folder, a video, or the images of config.eval.split."""
    if not arguments.output:
        raise UserError(
            "--mode predict needs --output (a directory); without --input (an image, a folder or a video), it predicts "
            "config.eval.split"
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
    network = scoring.segmenter(config, variables)
    logger.info(f"predicting {len(paths)} image(s) with step {step} of {workdir} on {network.predictor.device}")
    split = {field: config.dataset[field] for field in ("name", "root")} | {"split": config.eval.split}
    origin = {"checkpoint": str(workdir), "step": step, "input": str(arguments.input) if arguments.input else split}
    prediction.predict(network, paths, arguments.output, server_format, arguments.skip_existing, origin, arguments.maps)


def _predict_video(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes OUTPUT/overlay/NAME.mp4, and in it how it was made."""
    source, target = arguments.input, arguments.output / "overlay" / f"{video.name_of(arguments.input)}.mp4"
    shown = video.shown(source)  # cameras have passwords
    if arguments.format or arguments.maps or jax.process_count() > 1:
        raise UserError(f"--input {shown}: is a video, which is predicted without --format and --maps, in a single process")
    if arguments.output.suffix == ".mp4":
        raise UserError(
            f"--output {arguments.output}: is a directory, in which overlay/{target.name} is written; leave out .mp4"
        )
    video.check_output(source, target)
    config, step, variables, workdir, _ = runs.restore(arguments, overrides)
    network = scoring.segmenter(config, variables)
    origin = {"input": shown, "checkpoint": str(workdir), "step": step, **network.predictor.description}
    if files.is_there(target):
        found = _origin_of(target)
        if arguments.skip_existing and found == origin:
            return logger.info(f"{target} is there already")
        if arguments.skip_existing or found.get("input") != origin["input"]:
            raise UserError(
                f"{target}: was made from another video or with other settings; delete it, or choose another --output"
            )
    logger.info(f"predicting {shown} with step {step} of {workdir} on {network.predictor.device}")
    began = time.perf_counter()
    frames = video.write_overlay(network, source, target, comment=json.dumps(origin))
    logger.info(f"{frames} frames written to {target}, {frames / (time.perf_counter() - began):.3g} frames/s")


def _origin_of(path: epath.Path) -> dict[str, Any]:
    """Returns what `_predict_video` has written about a video; empty if it did not write it."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(video.comment_of(path)), dict):
            return found
    return {}


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
    output, rows = arguments.output or runs.workdir_of(arguments, config.name) / "preflight", []
    for row in preflights.preflight(config, topologies, arguments.images_per_chip or 0):
        rows.append(row)
        _write_preflight(rows, config.name, output)  # a later topology may not fit
    rich.print(preflight_report.table(rows))
    logger.info(f"written to {output}/preflight.json and preflight.png")


def _write_preflight(rows: Sequence[Any], name: str, output: epath.Path) -> None:
    from pspnet_jax.deploy import preflight_report

    with files.writing(output, "the results are missing"):
        files.write_atomic(output / "preflight.json", json.dumps([row.to_json() for row in rows], indent=1) + "\n")
        with files.atomic(output / "preflight.png") as path, path.open("wb") as file:
            preflight_report.plot(rows, name).savefig(file, dpi=100)


JOBS = {
    "check": checking.check,
    "train": train,
    "pretrain": pretrain.pretrain,
    "evaluate": evaluate,
    "report": report,
    "predict": predict,
    "import": exchange.import_weights,
    "verify": exchange.verify,
    "preflight": preflight,
    "export": exchange.export,
}
MULTI_PROCESS_JOBS = ("train", "pretrain", "evaluate", "predict")  # modes that several processes can run together


def _split_images(config: ConfigDict) -> dict[str, str]:
    """Returns {name: path} of the images of config.eval.split, labeled or not."""
    from pspnet_jax.data import layouts

    dataset = config.dataset
    if dataset.name not in layouts.LAYOUTS:
        raise UserError(f"--mode predict needs --input, since the images of dataset.name={dataset.name!r} are not files")
    pairs = layouts.list_pairs(dataset, config.eval.split)
    return {pair.name: pair.image for pair in pairs}
