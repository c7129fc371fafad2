"""--mode report: scores a run as --mode evaluate does and, in the same pass, collects why it fails; compares two runs."""

import argparse
import collections
import datetime
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

import pspnet_jax
from pspnet_jax import datasets, files, runs, scoring
from pspnet_jax.analysis import cooccurrence, curves, document, fiftyone, image, page, pictures, tables
from pspnet_jax.analysis.cooccurrence import Cooccurrence
from pspnet_jax.analysis.document import Scored
from pspnet_jax.analysis.totals import Totals
from pspnet_jax.data import overlap
from pspnet_jax.errors import UserError
from pspnet_jax.infer.predictor import Example
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.report import describe_protocol

logger = logging.getLogger("pspnet_jax")
FILE = "report.json"
OTHER = "other_"  # begins the names of the other run's pictures
THREADS = os.cpu_count() or 1
MAX_PIXELS = 2**25  # of the images that are analyzed at a time, unless it is a single one


class Run(NamedTuple):
    """A run, the split to report on, and the run's name in the report."""

    restored: runs.Restored
    source: Any
    title: str


def report(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes the folder of a report, see docs/report.md.

    Raises:
      UserError: the runs cannot be compared, or the folder exists and is not a report.
    """
    if arguments.format not in (None, "fiftyone"):
        raise UserError(f"--format {arguments.format}: --mode report has only fiftyone")
    overrides = [*overrides, *([f"--config.eval.split={arguments.split}"] if arguments.split else [])]
    run, other = open_run(arguments, overrides), None
    if arguments.against:
        of_other = {**vars(arguments), "workdir": arguments.against, "config": None}
        other = open_run(argparse.Namespace(**of_other), overrides)
        _require_comparable(run, other)
        run, other = _with_different_titles(run, other)
    default = "report" if other is None else f"report_against_{other.restored.workdir.name}"
    output = arguments.output or run.restored.workdir / default
    files.require_new_folder(output, FILE)
    overlap.refuse_inside(output, [run.source])
    with files.new_folder(output, FILE) as folder:
        _write(folder, run, other, arguments.format == "fiftyone")
    logger.info(f"written to {output}: open {output}/index.html in a browser")


def open_run(arguments: argparse.Namespace, overrides: Sequence[str]) -> Run:
    """Opens the run and the split that the command line names."""
    restored = runs.restore(arguments, overrides)
    return Run(restored, scoring.open_split(restored.config, restored.saved), restored.workdir.name)


def _with_different_titles(*compared: Run) -> list[Run]:
    """Returns runs whose titles are as much of the ends of their paths as tells them apart."""
    paths = [run.restored.workdir.parts for run in compared]
    length = next((n for n in range(1, max(map(len, paths))) if len({path[-n:] for path in paths}) == len(paths)), 1)
    return [run._replace(title="/".join(path[-length:])) for run, path in zip(compared, paths, strict=True)]


def _require_comparable(run: Run, other: Run) -> None:
    """Raises UserError unless two runs have the same classes and images."""
    theirs, ours = (one.restored.config.dataset.class_names for one in (other, run))
    for label, their, our in datasets.differing_classes(theirs, ours):
        raise UserError(
            f"--against {other.restored.workdir}: its class {label} is {their or 'missing'!r}, but that of the run is "
            f"{our or 'missing'!r}; only runs with the same classes can be compared"
        )
    one, two = ((sorted(s.names), s.fingerprint, s.reading) for s in (run.source, other.source))
    if one != two:
        raise UserError(
            f"--against {other.restored.workdir}: its images and labels ({len(other.source)}) are not those of the run "
            f"({len(run.source)}); set --config.dataset.root and the other fields of the dataset for both"
        )


def _write(folder: pathlib.Path, run: Run, other: Run | None, for_fiftyone: bool) -> None:
    """Writes all files of a report to a folder."""
    (folder / "pictures").mkdir()
    if for_fiftyone:
        fiftyone.make_folders(folder)
    training, reason = training_classes(run)
    scored = analyze(run, _network(run), folder, "", training, for_fiftyone)
    logger.info(scored.report)
    found = {
        "schema": document.SCHEMA,
        **_describe_run(run, scored),
        "dataset": _describe_dataset(scored, training),
        "mismatched_reason": reason,
        "curves": curves.read(run.restored.workdir),
        **document.describe(scored, training),
        "against": None,
    }
    for index, row in enumerate(found["images"]):
        row["pictures"] = pictures.paths(index)
    if other:
        others = analyze(other, _network(other), folder, OTHER, None)
        logger.info(others.report)
        if others.report.protocol != scored.report.protocol:
            logger.warning("the two runs are evaluated by different protocols; fields of --config.eval apply to both")
        found["against"] = {**_describe_run(other, others), **document.compare(scored, others)}
        for index, row in enumerate(found["against"]["images"]):
            row["pictures"] = pictures.paths(index, OTHER)
    (folder / FILE).write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    tables.write(found, folder / "tables")
    if for_fiftyone:
        fiftyone.write_samples(folder, found)
    page.write(found, epath.Path(folder))


def training_classes(run: Run) -> tuple[Cooccurrence | None, str | None]:
    """Returns the counts of the training images, or None and why there are none."""
    config, _, _, workdir, saved = run.restored
    known = [saved, config] if saved.dataset.name == config.dataset.name else [saved]
    try:
        return cooccurrence.of_training(known, workdir), None
    except UserError as error:
        reason = f"the training data cannot be read ({error}), so it is not known which classes occur together"
        logger.warning(reason)
        return None, reason


def analyze(
    run: Run, network: Segmenter, folder: pathlib.Path, prefix: str, training: Cooccurrence | None, for_fiftyone: bool = False
) -> Scored:
    """Scores a run as --mode evaluate does, and collects the statistics of its images in the same pass.

    Pictures are written to the folder of the report. The prefix of their names is "" for the run that the report is about.
    """
    source = scoring.sort_by_size(network.predictor, run.source)
    indices = {name: index for index, name in enumerate(sorted(source.names))}
    totals = Totals(network.info.num_classes, len(source))
    scores = None if training is None else training.scores

    def work(index: int, example: Example, prediction: np.ndarray, confidence: np.ndarray) -> image.Statistics:
        arrays = example["image"], example["label"], prediction, confidence
        pictures.write(folder, pictures.paths(index, prefix), *arrays, network.info)
        if for_fiftyone:
            fiftyone.write_image(folder, index, *arrays)
        return image.analyze(example["name"], *arrays[1:], totals.num_classes, scores)

    waiting: collections.deque[tuple[int, int, Future[image.Statistics]]] = collections.deque()

    def finish_first() -> None:
        index, _, future = waiting.popleft()
        totals.add(index, future.result())

    def observe(example: Example, prediction: np.ndarray, confidence: np.ndarray) -> None:
        index = indices[example["name"]]
        waiting.append((index, prediction.size, pool.submit(work, index, example, prediction, confidence)))
        while len(waiting) > 2 * THREADS or (len(waiting) > 1 and sum(size for _, size, _ in waiting) > MAX_PIXELS):
            finish_first()

    with ThreadPoolExecutor(THREADS) as pool:
        report, _ = scoring.score(network, run.restored.config, source, 0, observe)
        while waiting:
            finish_first()
    return Scored(report, totals)


def _network(run: Run) -> Segmenter:
    return scoring.segmenter(run.restored.config, run.restored.variables)


def _describe_run(run: Run, scored: Scored) -> dict[str, Any]:
    """Returns the parts of the document on the run itself: "title", "run" and "protocol"."""
    report = scored.report
    origin = {
        "workdir": str(run.restored.workdir),
        "step": run.restored.step,
        "version": pspnet_jax.__version__,
        "device": report.device,
        "created": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "images_per_second": report.images_per_second,
        **{name: report.to_json()[name] for name in ("classes_in_mean_iou", "classes_in_mean_accuracy")},
    }
    return {"title": run.title, "run": origin, "protocol": {**report.protocol, "text": describe_protocol(report.protocol)}}


def _describe_dataset(scored: Scored, training: Cooccurrence | None) -> dict[str, Any]:
    info = scored.report.info
    classes = zip(info.class_names, info.colors, strict=True)
    return {
        "name": info.name,
        "split": scored.report.protocol["split"],
        "images": scored.report.images,
        "training_images": None if training is None else training.images,
        "classes": [{"name": name, "color": list(color)} for name, color in classes],
    }
