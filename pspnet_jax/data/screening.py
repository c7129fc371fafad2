"""Which pairs of files cannot be used: looked for once for each set of files, and decided alike by all processes of a job."""

import concurrent.futures
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from pspnet_jax import datasets
from pspnet_jax.data import checks, stamps
from pspnet_jax.data.layouts import Pair
from pspnet_jax.data.palettes import Known, Palettes
from pspnet_jax.data.totals import Totals
from pspnet_jax.errors import UserError
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHECK_ALL = 5000  # up to this many pairs, every pixel of every label is looked at before training starts
CHECK_SOME = 1000  # of a larger folder, this many, drawn at random; the others are looked at when they are loaded
VERSION = 4  # of what is checked: the findings of another version do not count
ATTEMPTS = 3  # at a check in which a read fails by chance
TOLD = 5  # sentences about skipped pairs
WAIT = 24 * 3600 * 1000  # ms for the slowest process; that one has died is noticed far earlier
_exchanges = itertools.count()  # for names of barriers, which are alike in all processes


class Problem(NamedTuple):
    """What is wrong with a pair."""

    pair: int  # its index
    wrong_values: bool  # see `checks.WrongValues`
    sentence: str


class Findings(NamedTuple):
    """What a process knows about a split.

    Attributes:
      names: digest of the pairs' names.
      fingerprint: digest of the names and the files' sizes.
      pairs: how many there are.
      problems: what is wrong with some.
      orientations: of the images that are not upright, by the number of the pair, as text, which JSON wants.
      looked_at: the number of labels whose pixels were counted.
      values: their pixels of each class and of 255.
      contradiction, remarks, seen: see `Palettes`; seen's values as text.
      error: why the split cannot be listed.
    """

    names: str = ""
    fingerprint: str = ""
    pairs: int = 0
    problems: Sequence[Problem] = ()
    orientations: Mapping[str, int] = {}
    looked_at: int = 0
    values: Sequence[int] = (0,) * 256
    contradiction: str = ""
    remarks: Sequence[str] = ()
    seen: Mapping[str, tuple[Sequence[int], str]] = {}
    error: str = ""


class Screened(NamedTuple):
    """The pairs to use, the size in bytes and the orientation of each image, the labels' totals and colors (see
    `Palettes.seen`), and the files' fingerprint."""

    pairs: list[Pair]
    sizes: list[int]
    orientations: list[int]
    totals: Totals
    palette: Known
    fingerprint: str


def screen(list_pairs: Callable[[], list[Pair]], dataset: ConfigDict, names: Sequence[str], what: str) -> Screened:
    """Lists pairs of files, checks them, and returns those to use, which are the same in all processes of the job.

    What is wrong with a pair on one host counts on all of them. Of several processes, each has to make this call.

    Args:
      list_pairs: lists the split.
      dataset: config.dataset; its on_error says whether wrong pairs are left out, and cache_dir keeps what is found.
      names: of the K classes.
      what: the split, for messages.

    Raises:
      UserError: the split cannot be listed, or the hosts have different images; about the first wrong pair, and how many more
        there are; with on_error="skip", when most are wrong, or a label's values are, which is no damage; palettes contradict
        each other; or nothing can be learned from the labels.
    """
    start = time.monotonic()
    sizes: list[int] = []
    try:
        pairs = list_pairs()
        mine, sizes = _find(pairs, dataset, names, what)
    except UserError as error:
        if jax.process_count() == 1:
            raise
        mine = Findings(error=str(error))
    all_findings = _exchange(mine)
    problems, first = _agreed(all_findings, what), all_findings[0]
    _tell(problems, len(pairs), dataset.on_error == "skip")
    totals = Totals(what, first.looked_at, len(pairs) - len(problems), np.array(first.values))
    if sentence := first.contradiction or totals.problem(names, train=False):
        raise UserError(sentence)
    logger.info(f"{what}: {totals.of} pairs of files checked in {time.monotonic() - start:.1f} s")
    warn(totals, names, [pairs[int(index)].image for index in first.orientations], first.remarks)
    if any(found.fingerprint != first.fingerprint for found in all_findings):
        logger.warning(f"{what}: the hosts have files of the same names, but of other sizes; every host needs the same files")
    wrong = {problem.pair for problem in problems}
    used = [index for index in range(len(pairs)) if index not in wrong]
    orientations = [mine.orientations.get(str(index), 1) for index in used]
    palette: Known = {int(value): (tuple(color), file) for value, (color, file) in first.seen.items()}
    return Screened([pairs[i] for i in used], [sizes[i] for i in used], orientations, totals, palette, first.fingerprint)


def _tell(problems: list[Problem], pairs: int, skip: bool) -> None:
    """Raises the first problem, wrong values before others, unless the pairs may be skipped; then lists some."""
    problems.sort(key=lambda problem: not problem.wrong_values)
    if problems and not (skip and len(problems) <= pairs // 2 and not problems[0].wrong_values):
        more = f" ({len(problems) - 1} more pairs are wrong, too)" if problems[1:] else ""
        raise UserError(problems[0].sentence + more)
    for problem in problems[:TOLD]:
        logger.warning("skipped: %s", problem.sentence)
    if len(problems) > TOLD:
        logger.warning("skipped %s pairs in all", len(problems))


def warn(totals: Totals, names: Sequence[str], turned: Sequence[str], remarks: Sequence[str]) -> None:
    """Says what is odd about a split, but may be right: classes without a pixel, images to be turned, differing files."""
    totals.warn(names)
    if turned:
        logger.warning(
            f"{totals.what}: {len(turned)} images are turned upright, as their EXIF orientation asks for, the first of them "
            f"{turned[0]}; their labels have to be upright, too"
        )
    for remark in remarks:
        logger.warning(remark)


def _find(pairs: list[Pair], dataset: ConfigDict, names: Sequence[str], what: str) -> tuple[Findings, list[int]]:
    """Returns what is found in this host's copy of the files, and the size of each image in bytes."""
    files = [file for pair in pairs for file in (pair.image, pair.label)]
    stats = stamps.stats(files)
    sizes = [known[0] if known else 0 for known in stats]
    all_names, colors = [pair.name for pair in pairs], datasets.file_colors(dataset)
    mine = Findings(stamps.digest(all_names), stamps.digest((all_names, sizes)), len(pairs))

    def look_at(index: int, chosen: Container[int]) -> checks.Look | Problem:
        _, image, label, raw = pairs[index]
        try:
            return checks.check_pair(image, label, len(names), index in chosen, dataset.name if raw else None)
        except UserError as error:
            return Problem(index, isinstance(error, checks.WrongValues), str(error))

    def find(count: int) -> Findings:
        everywhere = range(len(pairs))  # a sample is drawn, as evenly spread files may all be of one kind
        chosen = everywhere if count == len(pairs) else set(np.random.default_rng(0).choice(len(pairs), count, replace=False))
        look = functools.partial(look_at, chosen=chosen)
        for attempt in range(ATTEMPTS):
            depends = (VERSION, count, dataset.name, len(names), colors, pairs, attempt)
            compute = functools.partial(_look, pairs, look, Palettes(colors, len(names)), what)
            found = mine._replace(**json.loads(stamps.once(dataset.cache_dir, "checked", files, depends, compute, stats)))
            if all(isinstance(look(index), Problem) for index, *_ in found.problems):
                break  # else a read has failed by chance, and what it would have told is missing from what was found
        return found

    found = find(len(pairs) if dataset.on_error == "skip" or len(pairs) <= CHECK_ALL else CHECK_SOME)
    if found.looked_at < len(pairs) and Totals(what, found.looked_at, len(pairs), np.array(found.values)).problem(names):
        found = find(len(pairs))  # what would be too much to say after a look at some
    return found, sizes[::2]


def _look(pairs: list[Pair], look: Callable[[int], checks.Look | Problem], palettes: Palettes, what: str) -> bytes:
    """Looks at all pairs; returns fields of `Findings` as JSON."""
    problems, orientations, values, looked_at = [], {}, np.zeros(256, np.int64), 0
    with concurrent.futures.ThreadPoolExecutor(32) as pool, progress(f"checking {what}", len(pairs)) as advance:
        for index, found in enumerate(pool.map(look, range(len(pairs)))):
            advance(1)
            if isinstance(found, Problem):
                problems.append(found)
                continue
            if found.orientation != 1:
                orientations[index] = found.orientation
            if found.values is not None:
                looked_at, values = looked_at + 1, values + found.values
                palettes.add(pairs[index].label, found.values, found.palette)
    return json.dumps(
        {
            "problems": problems,
            "orientations": orientations,
            "looked_at": looked_at,
            "values": values.tolist(),
            "contradiction": palettes.contradiction,
            "remarks": palettes.remarks,
            "seen": palettes.seen,
        }
    ).encode()


def _exchange(mine: Findings) -> list[Findings]:
    """Returns the findings of all processes of the job, in their order."""
    if jax.process_count() == 1:
        return [mine]
    # JAX's first collective fails where a process comes half a minute late, and to check files can take longer.
    multihost.get_barrier_sync_fn()(key=f"files of {next(_exchanges)}", timeout_ms=WAIT)
    message = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(message))))
    padded = np.pad(message, (0, sizes.max() - len(message)))
    messages = np.asarray(multihost_utils.process_allgather(padded))
    decoded = [json.loads(row[:size].tobytes()) for row, size in zip(messages, sizes, strict=True)]
    return [Findings(*each) for each in decoded]


def _agreed(findings: list[Findings], what: str) -> list[Problem]:
    """Returns the problems that any process has found, in the order of the pairs.

    Raises:
      UserError: a process cannot open the split, or has pairs of other names.
    """
    for process, found in enumerate(findings):
        if found.error:
            raise UserError(f"process {process}: {found.error}" if process != jax.process_index() else found.error)
        if found.names != findings[0].names:
            raise UserError(
                f"{what}: process {process} has other images than process 0 ({found.pairs:,}, there {findings[0].pairs:,}); "
                "every host needs the same files"
            )
    union = {problem[0]: Problem(*problem) for found in reversed(findings) for problem in found.problems}
    return [union[index] for index in sorted(union)]
