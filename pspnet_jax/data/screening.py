"""Which pairs of files cannot be used: looked for once for each set of files, and decided alike by all processes of a job."""

import concurrent.futures
import itertools
import json
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from pspnet_jax.data import checks, stamps
from pspnet_jax.data.layouts import Pair
from pspnet_jax.errors import UserError
from pspnet_jax.progress import progress

logger = logging.getLogger(__name__)
CHECK_ALL = 5000  # up to this many pairs, every pixel of every label is looked at before training starts
CHECK_SOME = 1000  # of a larger folder, about this many, evenly spread; the others are looked at when they are loaded
VERSION = 1  # of what is checked: the findings of another version do not count
TOLD = 5  # sentences about skipped pairs
WAIT = 24 * 3600 * 1000  # ms for the slowest process; that one has died is noticed far earlier
_exchanges = itertools.count()  # for names of barriers, which are alike in all processes


class Problem(NamedTuple):
    """What is wrong with a pair."""

    pair: int  # its index
    wrong_values: bool  # see `checks.WrongValues`
    sentence: str


class Findings(NamedTuple):
    """What a process knows about a split."""

    names: str  # digest of the pairs' names
    pairs: int
    problems: list[Problem]
    error: str  # why the split cannot be listed


def screen(list_pairs: Callable[[], list[Pair]], dataset: ConfigDict, num_classes: int, what: str) -> list[Pair]:
    """Lists pairs of files, checks them, and returns those to use, which are the same in all processes of the job.

    What is wrong with a pair on one host counts on all of them. Of several processes, each has to make this call.

    Args:
      list_pairs: lists the split.
      dataset: config.dataset; its on_error says whether wrong pairs are left out, and cache_dir keeps what is found.
      num_classes: K.
      what: the split, for messages.

    Raises:
      UserError: the split cannot be listed, or the hosts have different images; about the first wrong pair, and how many more
        there are; with on_error="skip", when most are wrong, or a label's values are, which is no damage.
    """
    start, skip = time.monotonic(), dataset.on_error == "skip"
    try:
        pairs = list_pairs()
        mine = Findings(stamps.digest([pair.name for pair in pairs]), len(pairs), [], "")
        mine = mine._replace(problems=_problems(pairs, dataset, num_classes, what))
    except UserError as error:
        if jax.process_count() == 1:
            raise
        mine = Findings("", 0, [], str(error))
    problems = _agreed(_exchange(mine), what)
    problems.sort(key=lambda problem: not problem.wrong_values)
    if problems and not (skip and len(problems) <= len(pairs) // 2 and not problems[0].wrong_values):
        more = f" ({len(problems) - 1} more pairs are wrong, too)" if problems[1:] else ""
        raise UserError(problems[0].sentence + more)
    logger.info(f"{what}: {len(pairs) - len(problems)} pairs of files checked in {time.monotonic() - start:.1f} s")
    for problem in problems[:TOLD]:
        logger.warning("skipped: %s", problem.sentence)
    if len(problems) > TOLD:
        logger.warning("skipped %s pairs in all", len(problems))
    wrong = {problem.pair for problem in problems}
    return [pair for index, pair in enumerate(pairs) if index not in wrong]


def _problems(pairs: list[Pair], dataset: ConfigDict, num_classes: int, what: str) -> list[Problem]:
    """Returns what is wrong with this host's copy of the files, in the order of the pairs."""
    stride = 1 if dataset.on_error == "skip" or len(pairs) <= CHECK_ALL else len(pairs) // CHECK_SOME

    def problem(index: int) -> Problem | None:
        _, image, label, raw = pairs[index]
        try:
            checks.check_pair(image, label, num_classes, index % stride == 0, dataset.name if raw else None)
        except UserError as error:
            return Problem(index, isinstance(error, checks.WrongValues), str(error))
        return None

    def check() -> bytes:
        found = []
        with concurrent.futures.ThreadPoolExecutor(32) as pool, progress(f"checking {what}", len(pairs)) as advance:
            for result in pool.map(problem, range(len(pairs))):
                found += [result] if result else []
                advance(1)
        return json.dumps(found).encode()

    files = [file for pair in pairs for file in (pair.image, pair.label)]
    kept = stamps.once(dataset.cache_dir, "checked", files, (VERSION, stride, dataset.name, num_classes, pairs), check)
    suspects = [problem(index) for index, *_ in json.loads(kept)]  # once more: a read may have failed by chance
    return [suspect for suspect in suspects if suspect]


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
    return [Findings(names, pairs, [Problem(*each) for each in found], error) for names, pairs, found, error in decoded]


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
    union = {problem.pair: problem for found in reversed(findings) for problem in found.problems}
    return [union[index] for index in sorted(union)]
