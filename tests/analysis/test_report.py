"""The whole mode on a tiny run: the score of --mode evaluate, the files of the folder, two runs, and data that is missing."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from pspnet_jax import models, optimizers
from pspnet_jax import runs as loaded
from pspnet_jax.analysis import curves, report
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.train import checkpoint
from pspnet_jax.train.step import new_state
from tests import fakes


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two runs with random weights, as if they were imported, and their data: nine images and, to evaluate, three."""
    directory = tmp_path_factory.mktemp("report")
    root = fakes.write_folder(directory / "data", {"train": 9, "val": 3}, size=(60, 50), num_classes=2)
    fakes.write_image(root / "labels/val/002.png", np.full((60, 50), 255, np.uint8))  # of which nothing can be scored
    config = base_config()
    config.dataset.root, config.dataset.class_names, config.dataset.colors = str(root), ("class 0", "class 1"), ()
    config.model.update(depth=18, width=8, output_stride=32, bins=(1, 2))
    config.eval.update(base_size=60, crop=(40, 48))
    config.total_steps = 1
    loaded.prepare(config)
    model = models.build(config.model, 2)
    init = jax.jit(model.init, static_argnames="train")
    for seed, name in enumerate(("one", "two")):
        variables = init(jax.random.key(seed), jnp.zeros((1, 33, 33, 3)), train=False)
        state = new_state(config, optimizers.build(config.optimizer, 1), variables)
        checkpoint.create_run(epath.Path(directory / name), config, jax.device_put(state, jax.devices()[0]))
    return directory / "one", directory / "two", root


def document(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def evaluated(workdir: Path, *flags: str) -> dict:
    assert main(["--mode=evaluate", f"--workdir={workdir}", *flags]) == 0
    newest = max((workdir / "evaluation").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_score_is_that_of_evaluate(runs):
    workdir, flags = runs[0], ("--config.eval.inference=whole", "--config.eval.base_size=0")
    assert main(["--mode=report", f"--workdir={workdir}", *flags]) == 0
    found, expected = document(workdir / "report"), evaluated(workdir, *flags)
    for name, figure in found["summary"].items():
        assert figure["value"] == expected[name]
    assert [entry["iou"]["value"] for entry in found["classes"]] == [row["iou"] for row in expected["classes"]]
    assert [entry["recall"]["value"] for entry in found["classes"]] == [row["accuracy"] for row in expected["classes"]]
    rows = [sum(row) for row in found["confusion_matrix"]]
    assert rows == [row["pixels"] for row in expected["classes"]] == [entry["pixels"] for entry in found["classes"]]


def test_runs_of_the_same_name_get_different_titles():
    def titles(*workdirs):
        found = [report.Run(types.SimpleNamespace(workdir=epath.Path(workdir)), None, "") for workdir in workdirs]
        return [run.title for run in report._with_different_titles(*found)]

    assert titles("/a/one", "/a/two") == ["one", "two"]
    assert titles("/a/x/run", "/b/x/run") == ["a/x/run", "b/x/run"]
    assert titles("/a/run", "/a/run") == ["run", "run"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_two_runs_and_all_files(runs, tmp_path):
    one, two, _ = runs
    flags = ["--against", str(two), "--split=val", "--format=fiftyone", "--output", str(tmp_path / "both")]
    assert main(["--mode=report", f"--workdir={one}", *flags]) == 0
    found = document(tmp_path / "both")
    against, scores = found["against"], [evaluated(workdir)["mean_iou"] for workdir in (one, two)]
    assert scores[0] != scores[1]
    assert against["summary"]["mean_iou"]["difference"]["value"] == scores[0] - scores[1]
    assert against["summary"]["mean_iou"]["other"]["value"] == scores[1]
    assert (found["title"], against["title"]) == ("one", "two")
    assert found["curves"] == {"training": [], "evaluations": []}
    assert [entry["name"] for entry in found["images"]] == ["000", "001", "002"]
    row = found["images"][2]
    assert (row["mean_iou"], row["labeled"], row["smallest"]) == (None, 0, None)
    for row, other in zip(found["images"], against["images"], strict=True):
        assert {*row["pictures"]} == {"image", "truth", "prediction", "error", "confidence"}
        for path in (*row["pictures"].values(), *other["pictures"].values()):
            with Image.open(tmp_path / "both" / path) as picture:
                assert picture.size == (50, 60)
    with Image.open(tmp_path / "both" / found["images"][0]["pictures"]["truth"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), fakes.pair("val", 0, (60, 50), 2)[1])
    assert (tmp_path / "both/index.html").exists()
    assert (tmp_path / "both/tables/against_classes.csv").exists()
    [*samples] = json.loads((tmp_path / "both/fiftyone/samples.json").read_text())["samples"]
    with Image.open(tmp_path / "both/fiftyone" / samples[0]["ground_truth"]["mask_path"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), fakes.pair("val", 0, (60, 50), 2)[1] + np.uint8(1))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_one_image_of_a_run_whose_training_data_is_gone(runs, tmp_path, request):
    one, _, root = runs
    shutil.copytree(root, moved := tmp_path / "data", ignore=shutil.ignore_patterns("train", "001.png", "002.png"))
    shutil.copytree(one, run := tmp_path / "run", ignore=shutil.ignore_patterns("cooccurrence.json", "report*"))
    root.rename(aside := root.with_name("aside"))
    request.addfinalizer(lambda: aside.rename(root))
    assert main(["--mode=report", f"--workdir={run}", f"--config.dataset.root={moved}"]) == 0
    found = document(run / "report")
    assert found["mismatched"] == []
    assert "the training data cannot be read" in found["mismatched_reason"]
    assert found["dataset"]["images"] == 1
    assert found["summary"]["mean_iou"]["low"] == pytest.approx(found["summary"]["mean_iou"]["value"])


class Source(list):
    """The names of a source's examples, and what identifies its data."""

    def __init__(self, names, fingerprint):
        super().__init__(names)
        self.names, self.fingerprint, self.reading = names, fingerprint, ""


def opened(classes=("a", "b"), names=("x", "y"), fingerprint="1"):
    config = base_config()
    config.dataset.class_names = classes
    return report.Run(types.SimpleNamespace(config=config, workdir="runs/other"), Source(names, fingerprint), "other")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"classes": ("a", "c")},
            "runs/other: its class 1 is 'c', but that of the run is 'b'; only runs with the same classes",
        ),
        ({"names": ("x", "z")}, r"runs/other: its images and labels \(2\) are not those of the run \(2\)"),
        ({"fingerprint": "2"}, "its images and labels"),
    ],
)
def test_runs_with_other_classes_or_images_are_not_compared(other, message):
    with pytest.raises(UserError, match=message):
        report._require_comparable(opened(), opened(**other))
    report._require_comparable(opened(), opened(names=("y", "x")))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_folder_that_is_not_a_report_is_not_replaced(runs, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--mode=report", f"--workdir={runs[0]}", f"--output={tmp_path}"]) == 1
    assert "already exists; choose another name, or delete it" in capsys.readouterr().err


def test_curves_have_numbers_and_keep_undamaged_lines(tmp_path):
    lines = [
        {"step": 1, "kind": "train", "loss": 2.5, "note": "no number"},
        {"step": 2, "kind": "train", "loss": float("nan")},
        {"step": 2, "kind": "eval", "mean_iou": 0.25, "pixel_accuracy": 0.5, "classes": [{"name": "a", "iou": 0.25}]},
        {"step": 2, "kind": "epoch", "epoch": 1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f"{text}{{damaged\n")
    assert curves.read(epath.Path(tmp_path)) == {
        "training": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}],
        "evaluations": [{"step": 2, "mean_iou": 0.25, "pixel_accuracy": 0.5}],
    }


def test_another_format_is_refused(tmp_path, capsys):
    assert main(["--mode=report", f"--workdir={tmp_path}", "--format=voc"]) == 1
    assert "--format voc: --mode report has only fiftyone" in capsys.readouterr().err
