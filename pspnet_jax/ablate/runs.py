"""The training runs of tables: what they need, what is done already, and a process for each of them."""

import dataclasses
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, runs, weights
from pspnet_jax.ablate.tables import Table, find
from pspnet_jax.errors import UserError
from pspnet_jax.train import jsonlines, resume

PROGRAM = (sys.executable, "-m", "pspnet_jax.main")
# Fields that may differ from those of a run that is there already, since they do not change its scores.
FREE = ("dataset.palette", "dataset.root", "dataset.extra_root", "dataset.cache", "every.", "track", "eval.batch_size")


class Score(NamedTuple):
    """Mean IoU and pixel accuracy of a network, in percent."""

    mean_iou: float
    pixel_accuracy: float

    def __str__(self) -> str:
        return f"mIoU {self.mean_iou:.2f}%, pixel accuracy {self.pixel_accuracy:.2f}%"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, and evaluations of its network with other settings than the run's own."""

    options: tuple[str, ...]  # of the command line of `pspnet_jax.main`, without the workdir
    config: ConfigDict  # what they amount to
    workdir: epath.Path  # directory of the run
    evaluations: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)  # fields of config.eval that each changes

    def score(self, changes: Mapping[str, Any]) -> Score | None:
        """Returns the score after the last step, evaluated with changed fields of config.eval, or None if it is not there."""
        expected = {**self.config.eval, **{field.removeprefix("eval."): value for field, value in changes.items()}}
        free = ("batch_size", "best_metric", *(("crop", "stride") if expected["inference"] == "whole" else ()))
        expected = {field: value for field, value in expected.items() if field not in free}
        expected = json.loads(json.dumps({"step": self.config.total_steps, **expected}))  # lists, not tuples
        lines = jsonlines.read(self.workdir / "metrics.jsonl")
        data = {line.get("data") for line in lines if line.get("kind") == "eval"}  # on which the run was evaluated
        for report in (*lines, *map(files.read_json, self.workdir.glob("evaluation/*.json"))):
            if data and report.get("data") not in data:
                continue  # --mode evaluate with other data
            if expected.items() <= {field: report.get(field) for field in expected}.items():
                return Score(100 * report["mean_iou"], 100 * report["pixel_accuracy"])
        return None

    def missing(self) -> Iterator[list[str]]:
        """Yields the commands, options of `pspnet_jax.main`, that the scores still need; each once the one before is done."""
        workdir, trained = f"--workdir={self.workdir}", self.workdir / f"checkpoints/{self.config.total_steps}"
        for changes in ({}, *self.evaluations):
            if self.score(changes) is not None:
                continue
            if not changes and not trained.exists():
                yield [*self.options, workdir]
            else:  # the data may have moved since the training
                fields = configs.by_field(self.options[1:])  # after --config=RECIPE
                data = [fields[field] for field in fields if field.startswith(("dataset.", "eval."))]
                yield ["--mode=evaluate", workdir, *itertools.chain(*data), *map(_option, changes.items())]


class Cell(NamedTuple):
    """Where the score of a row and a seed comes from: a run, and what its evaluation changes."""

    run: Run
    changes: Mapping[str, Any]


def _option(change: tuple[str, Any]) -> str:
    field, value = change
    return f"--config.{field}={','.join(map(str, value)) if isinstance(value, tuple | list) else value}"


def plan(
    tables: Mapping[str, Table], dataset: str, seeds: Sequence[int], overrides: Sequence[str], folder: epath.Path
) -> dict[tuple[str, str, int], Cell]:
    """Returns what each row and seed of the tables needs, by (table, row, seed). Rows with the same config share a run.

    The tables, by name, have only the rows of the dataset. Overrides are options --config.field=value for all runs; {depth} in
    a value is replaced by the depth of the row's network. The folder is that of the runs' workdirs.

    Raises:
      UserError: a config is wrong, an override sets what a table varies, a workdir holds a run with other settings, or two
        tables with different base recipes need the same workdir.
    """
    found, named, cells = dict[epath.Path, Run](), dict[str, tuple[str, ConfigDict]](), {}
    for name, table in tables.items():
        for row, details in table.rows.items():
            recipe = f"{find(name)}:{details.network or row},{dataset}"
            evaluated = details.changes if details.network else {}
            config = configs.load_recipe(recipe)
            changed = configs.override(config.copy_and_resolve_references(), overrides)
            options = [option.replace("{depth}", str(changed.model.depth)) for option in overrides]
            before, after = (dict(configs.leaves(one)) for one in (config, changed))
            if lost := [field for field in sorted(table.varied) if before[field] != after[field]]:
                raise UserError(f"--config.{lost[0]}: is what table {name} varies; leave it out")
            first, same = named.setdefault(config.name, (recipe, changed))
            if other := resume.differences(same, changed):
                raise UserError(
                    f"{first} and {recipe} would share the runs {config.name}, but differ ({'; '.join(other)}): their base "
                    "recipes are different; compare one table at a time, each with an --output of its own"
                )
            for seed in seeds:
                workdir = folder / f"{config.name}_seed{seed}"
                run = found[workdir] = found.get(workdir) or _open(recipe, options, seed, workdir)
                if evaluated and evaluated not in run.evaluations:
                    run.evaluations.append(evaluated)
                cells[name, row, seed] = Cell(run, evaluated)
    return cells


def _open(recipe: str, overrides: Sequence[str], seed: int, workdir: epath.Path) -> Run:
    """Returns a run, after checking its config, and that its workdir does not hold another one."""
    options = (f"--config={recipe}", *overrides, f"--config.seed={seed}")
    config = runs.prepare(configs.override(configs.load_recipe(recipe), options[1:]))
    if config.patience:
        raise UserError(f"patience={config.patience}: runs are compared after their last step, so none may stop early; set 0")
    if config.init_from and not weights.is_name(config.init_from):
        config.init_from = str(files.user_path(config.init_from))  # as the run saves it
    if not config.dataset.root and config.dataset.name not in ("scenes", "tfds"):
        raise UserError(f"--config.dataset.root is missing: {recipe} needs the directory of its images and labels")
    if saved := files.read_json(workdir / "config.json"):
        changed = resume.differences(configs.from_dict(saved), config)
        computed = ("loss.class_weights:",) if config.loss.class_weighting else ()
        if other := [change for change in changed if not change.startswith((*FREE, *computed))]:
            raise UserError(f"{workdir}: holds a run with other settings ({'; '.join(other)}); choose another --output")
    return Run(options, config, workdir)


def train(todo: Sequence[Run], devices: Sequence[str], logs: epath.Path, done: Callable[[Run, str], None]) -> None:
    """Makes what the runs miss, one run at a time on each device.

    On Ctrl-C or SystemExit, the running processes are told to save their state, and are waited for.

    Args:
      todo: the runs.
      devices: numbers of the GPUs or TPU chips, or "" for all devices. On CPUs they only count the runs at a time.
      logs: directory for the output of each run, which is appended to NAME.txt.
      done: called with each run that ends, and its error; "" if it has succeeded.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    processes = Processes()
    for device in devices:
        free.put(device)

    def complete(run: Run) -> str:
        device = free.get()
        try:
            for command in run.missing():
                if error := _call(command, device, logs / f"{run.workdir.name}.txt", processes):
                    return error
            return "" if run.score({}) else f"it has no evaluation after its last step, {run.config.total_steps}"
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = {pool.submit(complete, run): run for run in todo}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.terminate()
            raise


class Processes:
    """The processes that were started."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []
        self._terminated = threading.Event()

    def run(self, command: Sequence[str], **settings: Any) -> int:
        """Runs a command, and returns its exit status."""
        self._started.append(process := subprocess.Popen(command, **settings))
        if self._terminated.is_set():  # since a thread has decided to start it
            process.terminate()
        return process.wait()

    def terminate(self) -> None:
        """Tells those that are running, and those that a thread still starts, to save their state and end."""
        self._terminated.set()
        for process in self._started:
            process.terminate()


def _call(options: Sequence[str], device: str, log: epath.Path, processes: Processes) -> str:
    """Runs `pspnet_jax.main` in a process of its own, and returns its error, or "" if it has succeeded."""
    command = [*PROGRAM, *options, "--processes=1"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        settings = os.environ | device_variables(device)
        status = processes.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=settings)
    if not status:
        return ""
    text = log.read_bytes()[start:].decode(errors="replace").strip()
    reason = re.findall(r"^error: (.*)", text, re.MULTILINE) or text.splitlines() or ["no output"]
    return f"{reason[-1]} (exit status {status}; see {log})"


def device_variables(device: str) -> dict[str, str]:
    """Returns the environment variables that show a process only one GPU or TPU chip; none for ""."""
    if not device:
        return {}
    alone = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    return {"CUDA_VISIBLE_DEVICES": device, "TPU_VISIBLE_CHIPS": device, **alone}
