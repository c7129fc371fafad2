"""Finds unusable pairs of files, with the same result in all processes of a job, and caches it until a file changes."""

import concurrent.futures
import functools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import datasets, parallel
from pspnet_jax.data import checks, label_files, stamps
from pspnet_jax.data.layouts import Pair
from pspnet_jax.data.palettes import Palettes, ValueColors
from pspnet_jax.data.totals import Totals
from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import PixelFormat
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHECK_ALL = 5000  # up to this many pairs, all pixels of all labels are checked before training starts
CHECK_SOME = 1000  # size of the random sample checked in a larger folder; the rest is checked as it is loaded
VERSION = 6  # of the checks; cached findings of another version are not used
LINES = "void|ignore|unlabel|background|bound|border|edge|contour|outline|line"  # in names of a class 0 that may be thin
ATTEMPTS = 3  # if reads fail temporarily
MAX_WARNINGS = 5  # about skipped pairs


class Problem(NamedTuple):
    """A pair that cannot be used."""

    pair: int  # index
    wrong_values: bool  # see `checks.WrongValues`
    sentence: str


class Findings(NamedTuple):
    """One process's findings about a split. Dictionary keys are strings because of JSON.

    Attributes:
      names: digest of the pairs' names.
      fingerprint: digest of the names and the files' sizes.
      pairs: number of pairs.
      problems: the pairs that cannot be used.
      orientations: {pair index: EXIF orientation} of the images that are not upright.
      counted: number of labels whose pixels were counted.
      pixels: int[256], number of pixels of each class and of 255 in these labels.
      contradiction, remarks, seen: see `Palettes`.
      outlines: whether label value 0 occurs, but only in lines, see `checks.CheckedPair`.
      error: why the split cannot be listed, or "".
    """

    names: str = ""
    fingerprint: str = ""
    pairs: int = 0
    problems: Sequence[Problem] = ()
    orientations: Mapping[str, int] = {}
    counted: int = 0
    pixels: Sequence[int] = (0,) * 256
    contradiction: str = ""
    outlines: bool = False
    remarks: Sequence[str] = ()
    seen: Mapping[str, tuple[Sequence[int], str]] = {}
    error: str = ""


class Screened(NamedTuple):
    """The usable pairs of a split, the size in bytes and the orientation of each image, the labels' totals and colors (see
    `Palettes.seen`), and the files' fingerprint."""

    pairs: list[Pair]
    sizes: list[int]
    orientations: list[int]
    totals: Totals
    palette: ValueColors
    fingerprint: str


def screen(list_pairs: Callable[[], list[Pair]], dataset: ConfigDict, split: str, pixel_format: PixelFormat) -> Screened:
    """Lists and checks pairs of files, and returns the usable ones, which are the same in all processes of the job.

    If a pair is wrong on one host, no host uses it. Every process of a job must call this function.

    Args:
      list_pairs: lists the split.
      dataset: config.dataset; its on_error decides whether wrong pairs are skipped, and cache_dir keeps the findings.
      split: name of the split, for messages.
      pixel_format: of the images.

    Raises:
      UserError: the split cannot be listed; hosts have different files; a pair is wrong (with on_error="skip": more than half
        of them are, or a label has wrong values); palettes contradict each other; or nothing can be learned from the labels.
    """
    start, names = time.monotonic(), datasets.describe(dataset).class_names
    sizes: list[int] = []
    try:
        pairs = list_pairs()
        mine, sizes = _check_files(pairs, dataset, names, split, pixel_format)
    except UserError as error:
        if jax.process_count() == 1:
            raise
        mine = Findings(error=str(error))
    all_findings = {name: Findings(*found) for name, found in parallel.exchange(mine).items()}  # in process order
    problems, first = _merge_problems(all_findings, split), next(iter(all_findings.values()))
    _skip_or_raise(problems, len(pairs), dataset.on_error == "skip")
    totals = Totals(split, first.counted, len(pairs) - len(problems), np.array(first.pixels))
    shift = shift_problem(split, names) if first.outlines else None
    if sentence := first.contradiction or shift or totals.problem(names, train=False):
        raise UserError(sentence)
    logger.info(f"{split}: checked {totals.total} pairs of files in {time.monotonic() - start:.1f} s")
    warn(totals, names, [pairs[int(index)].image for index in first.orientations], first.remarks)
    wrong = {problem.pair for problem in problems}
    used = [index for index in range(len(pairs)) if index not in wrong]
    if len({found.fingerprint for found in all_findings.values()}) > 1:
        _require_same_sizes([file for index in used for file in (pairs[index].image, pairs[index].label)], split)
    orientations = [mine.orientations.get(str(index), 1) for index in used]
    seen = {} if dataset.label_map else first.seen  # with a map, the colors of stored values, which are no classes
    palette: ValueColors = {int(value): (tuple(color), file) for value, (color, file) in seen.items()}
    return Screened([pairs[i] for i in used], [sizes[i] for i in used], orientations, totals, palette, first.fingerprint)


def _skip_or_raise(problems: list[Problem], pairs: int, skip: bool) -> None:
    """Logs the first problems if the pairs may be skipped; otherwise raises the first, preferably wrong label values."""
    problems.sort(key=lambda problem: not problem.wrong_values)
    if problems and not (skip and len(problems) <= pairs // 2 and not problems[0].wrong_values):
        more = f" (and {len(problems) - 1} more wrong pairs)" if problems[1:] else ""
        raise UserError(problems[0].sentence + more)
    for problem in problems[:MAX_WARNINGS]:
        logger.warning("skipped: %s", problem.sentence)
    if len(problems) > MAX_WARNINGS:
        logger.warning("skipped %s pairs in total", len(problems))


def shift_problem(split: str, names: Sequence[str]) -> str | None:
    """Returns a question about labels in which 0 is only in lines, unless class 0 has a name of such lines or other areas."""
    if len(names) < 3 or re.search(LINES, names[0].lower()):
        return None
    void, _ = datasets.shift_maps(len(names))
    _, named = datasets.shift_maps(len(names) - 1)
    return (
        f"{split}: label value 0 occurs only in thin lines between other values, like a boundary, but class 0 is {names[0]!r}; "
        f'if 0 is void and the classes count from 1, set dataset.label_map="{void}"; otherwise, set it to "{named}"'
    )


def warn(totals: Totals, names: Sequence[str], turned: Sequence[str], remarks: Sequence[str]) -> None:
    """Warns about suspicious properties of a split: classes that never occur, rotated images, and `Palettes.remarks`."""
    totals.warn(names)
    if turned:
        logger.warning(
            f"{totals.split}: {len(turned)} images are turned upright by their EXIF orientation, the first is {turned[0]}; "
            "their labels must be upright already"
        )
    for remark in remarks:
        logger.warning(remark)


def _check_files(
    pairs: list[Pair], dataset: ConfigDict, names: Sequence[str], split: str, pixel_format: PixelFormat
) -> tuple[Findings, list[int]]:
    """Returns the findings about this host's copy of the files, and the size of each image file in bytes."""
    files = [file for pair in pairs for file in (pair.image, pair.label)]
    stats = stamps.stats(files)
    sizes = stamps.sizes(stats)
    all_names, colors = [pair.name for pair in pairs], datasets.file_colors(dataset)
    reader = label_files.reader(dataset, names, [pair.label for pair in pairs])
    reading = (reader.classes,) if reader else ()
    mine = Findings(stamps.digest(all_names), stamps.digest((all_names, sizes, *reading)), len(pairs))

    def check(index: int, chosen: Container[int]) -> checks.CheckedPair | Problem:
        _, image, label, raw = pairs[index]
        try:
            benchmark = dataset.name if raw else None
            return checks.check_pair(image, label, len(names), index in chosen, benchmark, reader, pixel_format)
        except UserError as error:
            return Problem(index, isinstance(error, checks.WrongValues), str(error))

    def find(count: int) -> Findings:
        every = range(len(pairs))  # a sample is random, as evenly spaced files may all come from one of several sources
        chosen = every if count == len(pairs) else set(np.random.default_rng(0).choice(len(pairs), count, replace=False))
        check_chosen = functools.partial(check, chosen=chosen)
        for attempt in range(ATTEMPTS):
            key = (VERSION, count, pixel_format, dataset.name, len(names), colors, pairs, attempt, *reading)
            compute = functools.partial(_check_pairs, pairs, check_chosen, Palettes(colors, len(names)), split)
            found = mine._replace(**json.loads(stamps.compute_once(dataset.cache_dir, "checked", files, key, compute, stats)))
            if all(isinstance(check_chosen(index), Problem) for index, *_ in found.problems):
                break  # if a pair passes now, its first read failed temporarily; the findings lack its pixels and orientation
        return found

    found = find(len(pairs) if dataset.on_error == "skip" or len(pairs) <= CHECK_ALL else CHECK_SOME)
    if found.counted < len(pairs) and Totals(split, found.counted, len(pairs), np.array(found.pixels)).problem(names):
        found = find(len(pairs))  # a sample is not enough to reject the whole split
    return found, sizes[::2]


def _check_pairs(
    pairs: list[Pair], check: Callable[[int], checks.CheckedPair | Problem], palettes: Palettes, split: str
) -> bytes:
    """Checks all pairs, and returns fields of `Findings` as JSON."""
    problems, orientations, pixels, counted, empty = [], {}, np.zeros(256, np.int64), 0, list[str]()
    outlines = set[bool | None]()
    with concurrent.futures.ThreadPoolExecutor(32) as pool, progress(f"checking {split}", len(pairs)) as advance:
        for index, found in enumerate(pool.map(check, range(len(pairs)))):
            advance(1)
            if isinstance(found, Problem):
                problems.append(found)
                continue
            if found.orientation != 1:
                orientations[index] = found.orientation
            if found.pixels is not None:
                counted, pixels = counted + 1, pixels + found.pixels
                palettes.add(pairs[index].label, found.pixels, found.palette)
                outlines.add(found.outlines)
                empty += [] if found.pixels[:IGNORE].any() else [pairs[index].label]
    remarks = palettes.remarks
    if empty:
        remarks.append(f"{len(empty)} of {counted} labels have no labeled pixel (all are {IGNORE}), the first is {empty[0]}")
    return json.dumps(
        {
            "problems": problems,
            "orientations": orientations,
            "counted": counted,
            "pixels": pixels.tolist(),
            "contradiction": palettes.contradiction,
            "outlines": outlines - {None} == {True},
            "remarks": remarks,
            "seen": palettes.seen,
        }
    ).encode()


def _merge_problems(findings: Mapping[str, Findings], split: str) -> list[Problem]:
    """Returns the problems that any process found, in the order of the pairs.

    Raises:
      UserError: a process cannot list the split, or has pairs of other names.
    """
    (first, expected), *_ = findings.items()
    for process, (name, found) in enumerate(findings.items()):
        if found.error:
            raise UserError(f"{name}: {found.error}" if process != jax.process_index() else found.error)
        if found.names != expected.names:
            raise UserError(
                f"{split}: {name} has other images ({found.pairs:,}) than {first} ({expected.pairs:,}); every host needs the "
                "same files"
            )
    union = {problem[0]: Problem(*problem) for found in reversed([*findings.values()]) for problem in found.problems}
    return [union[index] for index in sorted(union)]


def _require_same_sizes(files: list[str], split: str) -> None:
    """Raises UserError if a file differs in size between processes. Exchanges digests of blocks, then one block's sizes."""
    sizes = stamps.sizes(stamps.stats(files))
    step = math.isqrt(len(files)) + 1
    starts = range(0, len(files), step)
    digests = parallel.exchange([stamps.digest(sizes[start : start + step]) for start in starts]).values()
    differing = (start for start, *found in zip(starts, *digests, strict=True) if len(set(found)) > 1)
    if (start := next(differing, None)) is None:
        return
    (first, expected), *others = parallel.exchange(sizes[start : start + step]).items()
    index, name, found = next((i, n, f) for n, f in others for i in range(len(f)) if f[i] != expected[i])
    raise UserError(
        f"{split}: {files[start + index]} has {found[index]:,} bytes in {name}, but {expected[index]:,} in {first}; every host "
        "needs the same files"
    )
