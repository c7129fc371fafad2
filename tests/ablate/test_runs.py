"""Training the rows of a table, mostly with a program that stands in for pspnet_jax.main."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pspnet_jax.main
from pspnet_jax import config as configs
from pspnet_jax import models
from pspnet_jax.ablate import runs
from pspnet_jax.ablate.__main__ import main
from pspnet_jax.runs import prepare
from tests import fakes
from tests.test_main import SMALL, recipe
from tests.train import OneLayer

ROOT = Path(__file__).parents[2]
TABLE = """'''Three rows.

More about them.
'''
from pspnet_jax.ablate import Row, Table

TABLE = Table(
    rows={
        "none": Row({"model.bins": ()}, (37.0, 78.0)),
        "one": Row({"model.bins": (1,)}, (40.0, 79.0)),
        "both": Row({"eval.scales": (0.5, 1.0)}, network="one"),
    },
    reference="none",
    order=(("one", "none"), ("both", "one")),
    bases={"scenes": "quickstart"},
)
get_config = TABLE.get_config
"""
# Writes what a finished run writes: the mIoU is 0.5 plus 0.1 per bin, 0.01 per scale and 0.002 per seed.
PROGRAM = """
import json, os, pathlib, sys, time
options = dict(option.removeprefix("--").split("=", 1) for option in sys.argv[1:])
workdir = pathlib.Path(options["workdir"])
with (workdir.parents[1] / "calls.txt").open("a") as calls:
    print(workdir.name, "evaluate" if "mode" in options else "train", os.environ.get("CUDA_VISIBLE_DEVICES"), file=calls)
scales = [*map(float, options.get("config.eval.scales", "1.0").split(","))]
iou = 0.5 + 0.1 * ("bins-1" in workdir.name) + 0.01 * len(scales) + 0.002 * int(workdir.name[-1])
report = dict(split="validation", inference="whole", protocol="semseg", base_size=0, short_size=0, scales=scales, flip=True)
report |= dict(kind="eval", data="x", step=160, mean_iou=iou, pixel_accuracy=0.9)
if (workdir.parents[1] / "break").exists() and "bins-1" in workdir.name:
    print("error: the disk is full", file=sys.stderr)
    sys.exit(1)
file = workdir / ("evaluation/a.json" if "mode" in options else "metrics.jsonl")
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(report) + "\\n")
"""


@pytest.fixture
def table(tmp_path, monkeypatch) -> tuple[str, ...]:
    """The options for the table above with two seeds, trained by the program above."""
    (tmp_path / "mine.py").write_text(TABLE)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(runs, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    return (str(tmp_path / "mine.py"), f"--output={tmp_path / 'out'}", "--seeds", "0", "1")


def calls(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "out/calls.txt").read_text().splitlines()
    (tmp_path / "out/calls.txt").unlink()
    return lines


def test_each_network_is_trained_once_and_evaluated_as_its_rows_say(table, tmp_path, capsys):
    assert main(table) == 0
    assert calls(tmp_path) == [
        "scenes_bins-none_seed0 train None",
        "scenes_bins-1_seed0 train None",
        "scenes_bins-1_seed0 evaluate None",
        "scenes_bins-none_seed1 train None",
        "scenes_bins-1_seed1 train None",
        "scenes_bins-1_seed1 evaluate None",
    ]
    printed = capsys.readouterr().out
    assert "Three rows.\n" in printed
    assert "| none | 37.00 / 78.00 | 51.00, 51.20 | 51.10 | 0.14 | 90.00 | - | - |" in printed
    assert "| both | - | 62.00, 62.20 | 62.10 | 0.14 | 90.00 | +11.00 |" in printed
    assert "one is better than none: agrees (measured +10.00 points" in printed
    assert main(table) == 0
    assert not (tmp_path / "out/calls.txt").exists()


def test_only_what_is_missing_is_done_again(table, tmp_path):
    assert main(table) == 0
    calls(tmp_path)
    metrics = tmp_path / "out/runs/scenes_bins-none_seed1/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 160', '"step": 80') + "half a li")
    (tmp_path / "out/runs/scenes_bins-1_seed0/evaluation/a.json").unlink()
    assert main(table) == 0
    assert calls(tmp_path) == ["scenes_bins-1_seed0 evaluate None", "scenes_bins-none_seed1 train None"]


def test_a_failing_row_does_not_stop_the_others(table, tmp_path, capsys):
    (tmp_path / "out/break").touch()
    assert main([*table, "--devices=0,1"]) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[0] == "error: 2 run(s) failed; the same command tries them again"
    log = tmp_path / "out/logs/scenes_bins-1_seed0.txt"
    assert f"scenes_bins-1_seed0: the disk is full (exit status 1; see {log})" in output.err
    assert "| none | 37.00 / 78.00 | 51.00, 51.20 | 51.10 |" in output.out
    assert "| one | 40.00 / 79.00 | -, - |" in output.out
    assert "one is better than none: not measured" in output.out
    (tmp_path / "out/break").unlink()
    calls(tmp_path)
    assert main(table) == 0
    assert {line.split()[0] for line in calls(tmp_path)} == {"scenes_bins-1_seed0", "scenes_bins-1_seed1"}


def test_runs_share_the_devices_one_at_a_time(table, tmp_path):
    """Each run holds its device for 0.3 s: a file that must not be there yet."""
    (tmp_path / "program.py").write_text(
        PROGRAM + "held = workdir.parents[1] / os.environ['TPU_VISIBLE_CHIPS']\nheld.touch(exist_ok=False)\n"
        "time.sleep(0.3)\nheld.unlink()\n"
    )
    assert main([*table, "--devices=4,5"]) == 0
    assert {line.split()[-1] for line in calls(tmp_path)} == {"4", "5"}


def test_a_workdir_of_another_config_is_refused(table, tmp_path, capsys):
    workdir = tmp_path / "out/runs/scenes_bins-1_seed1"
    workdir.mkdir(parents=True)
    config = prepare(configs.load_recipe(f"{table[0]}:one"))
    config.total_steps, config.every.eval, config.seed = 80, 7, 1
    (workdir / "config.json").write_text(configs.to_json(config))
    assert main(table) == 1
    problem = "holds a run with other settings (total_steps: 80 -> 160); choose another --output"
    assert capsys.readouterr().err == f"error: {workdir}: {problem}\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--config.model.bins=1,2"], "--config.model.bins: is what table "),
        (["--config.eval.scales=0.5"], "--config.eval.scales: is what table "),
        (["--config.patience=2"], "patience=2: runs are compared after their last step"),
        (["--dataset=camvid"], "--dataset camvid: no dataset 'camvid': expected one of scenes"),
        (["--config.dataset.name=ade20k"], "--config.dataset.root is missing: "),
        (["--config.model.dept=3"], "did you mean model.depth"),
    ],
)
def test_wrong_options(table, options, problem, capsys):
    assert main([*table, *options]) == 1
    assert problem in capsys.readouterr().err


def test_the_list_shows_the_commands_and_runs_nothing(table, tmp_path, capsys):
    assert main([*table, "--list", "--config.init_from=resnet{depth}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    workdir = f"--workdir={tmp_path}/out/runs/scenes_bins-1_seed0"
    recipe = f"--config={table[0]}:one,scenes --config.init_from=resnet18 --config.seed=0"
    assert lines[1:3] == [
        f"python -m pspnet_jax.main {recipe} {workdir}",
        f"python -m pspnet_jax.main --mode=evaluate {workdir} --config.eval.scales=0.5,1.0",
    ]
    assert not any((tmp_path / "out").iterdir())


def test_a_field_of_a_table_cannot_be_set_even_to_the_value_of_some_rows(capsys):
    """Rows of average pooling do not name it, since it is the default."""
    assert main(["pooling", "--dataset=scenes", "--config.model.pool=max", "--list"]) == 1
    assert capsys.readouterr().err == "error: --config.model.pool: is what table pooling varies; leave it out\n"


@pytest.mark.parametrize(
    "options", [["--config.seed=3"], ["--config.seed", "3"], ["--devices=0,"], ["--devices=0,0"], ["--devices=0, 1"]]
)
def test_options_that_could_be_misunderstood(table, options, capsys):
    with pytest.raises(SystemExit):
        main([*table, "--list", *options])
    assert re.search("error: (--config.seed: is what --seeds sets|argument --devices: .*: expected)", capsys.readouterr().err)


def test_the_depth_in_an_option_may_be_an_option_too(table, capsys):
    assert main([*table, "--list", "--config.init_from=resnet{depth}", "--config.model.depth=34"]) == 0
    assert {re.search(r"init_from=(\S*)", line)[1] for line in capsys.readouterr().out.splitlines() if "init_from" in line} == {
        "resnet34"
    }


def test_what_training_fills_in_is_no_other_setting(table, tmp_path, monkeypatch, capsys):
    """It saves the absolute path of initial weights, and the class weights that it computes."""
    monkeypatch.chdir(tmp_path)
    options = ["--config.init_from=weights", "--config.loss.class_weights=()", "--config.loss.class_weighting=median"]
    config = prepare(configs.override(configs.load_recipe(f"{table[0]}:one"), options))
    config.init_from, config.loss.class_weights = str(tmp_path / "weights"), (0.5,) * 11
    workdir = tmp_path / "out/runs/scenes_bins-1_seed0"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(configs.to_json(config))
    assert main([*table, "--list", *options]) == 0
    assert main([*table, "--list", *options[1:]]) == 1
    assert "holds a run with other settings (init_from: " in capsys.readouterr().err


def test_tables_with_different_base_recipes_share_no_runs(table, tmp_path, capsys):
    base, other = tmp_path / "base.py", tmp_path / "other.py"
    base.write_text(
        "from pspnet_jax.config import load_recipe\n"
        "def get_config():\n    config = load_recipe('quickstart')\n    config.batch_size = 8\n    return config\n"
    )
    other.write_text(TABLE.replace('"quickstart"', repr(str(base))))
    assert main([str(other), *table, "--list"]) == 1
    assert "would share the runs scenes_bins-none, but differ (batch_size: 8 -> 16): their base" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [('"short_size": 0', '"short_size": 64'), ('"data": "x"', '"data": "y"')])
def test_an_evaluation_by_hand_with_other_settings_or_data_is_not_a_score(table, tmp_path, before, after):
    assert main(table) == 0
    calls(tmp_path)
    path = tmp_path / "out/runs/scenes_bins-1_seed0/evaluation/a.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert main(table) == 0
    assert calls(tmp_path) == ["scenes_bins-1_seed0 evaluate None"]


def test_a_finished_run_whose_score_is_lost_is_evaluated_where_the_data_is_now(table, tmp_path, capsys):
    workdir = tmp_path / "out/runs/scenes_bins-none_seed0"
    (workdir / "checkpoints/160").mkdir(parents=True)
    assert main([*table, "--list", "--config.dataset.root", "/new", "--config.eval.batch_size=1", "--config.batch_size=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = "--config.dataset.root /new --config.eval.batch_size=1"
    assert lines[0] == f"python -m pspnet_jax.main --mode=evaluate --workdir={workdir} {options}"
    assert main(table) == 0
    assert calls(tmp_path)[0] == "scenes_bins-none_seed0 evaluate None"
    assert "| none | 37.00 / 78.00 | 51.00, 51.20 |" in capsys.readouterr().out


def test_a_process_that_starts_while_the_others_are_told_to_end_ends_too():
    processes = runs.Processes()
    processes.terminate()
    began = time.monotonic()
    assert processes.run(["sleep", "60"]) == -signal.SIGTERM
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_sigterm_stops_the_running_process_and_starts_no_other(table, tmp_path):
    """The process saves its state, and the program waits for it."""
    (tmp_path / "program.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n    (here / 'saved').touch()\n    sys.exit(143)\n"
        "here = pathlib.Path(__file__).parent\nsignal.signal(signal.SIGTERM, save)\n"
        "(here / str(len([*here.glob('?')]))).touch()\ntime.sleep(60)\n"
    )
    code = f"from pspnet_jax.ablate import __main__, runs; runs.PROGRAM = {runs.PROGRAM!r}; __main__.command()"
    process = subprocess.Popen([sys.executable, "-c", code, *table], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_tiny_table_from_training_to_its_report(tmp_path, monkeypatch):
    """Two rows and two seeds by the real program, in this process, with a recipe, images and a network of one's own."""
    monkeypatch.setattr(models, "build", lambda *_: OneLayer())
    fakes.write_folder(tmp_path / "data", {"train": 4, "val": 2}, size=(60, 50), num_classes=3)
    base = recipe(tmp_path / "own.py", tmp_path / "data")
    rows = "{'slow': Row({'optimizer.learning_rate': 0.001}), 'fast': Row({})}"
    (tmp_path / "mine.py").write_text(
        f"from pspnet_jax.ablate import Row, Table\nTABLE = Table({rows}, 'fast', bases={{'own': {str(base)!r}}})\n"
        "get_config = TABLE.get_config\n"
    )
    monkeypatch.setattr(runs, "_call", lambda options, *_: "" if pspnet_jax.main.main(options) == 0 else "failed")
    assert main([f"{tmp_path}/mine.py", f"--output={tmp_path}/out", "--seeds", "0", "1", *SMALL]) == 0
    [table] = json.loads((tmp_path / "out/ablation_mine.json").read_text())["tables"]
    for line, change in zip(table["lines"], ("_learning_rate-0.001", ""), strict=True):
        for seed in ("0", "1"):
            lines = (tmp_path / f"out/runs/own{change}_seed{seed}/metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])
            assert last["step"] == 3
            assert line["scores"][seed] == [100 * last["mean_iou"], 100 * last["pixel_accuracy"]]
