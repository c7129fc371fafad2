"""The command line: all modes from a recipe to pictures, and the messages for wrong input."""

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import jobs, runs
from pspnet_jax.config import base_config, leaves, load_recipe, to_json
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.train import checkpoint
from tests import fakes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.model.depth=18",
    "--config.model.width=8",
    "--config.model.output_stride=32",
    "--config.model.bins=1,2",
    "--config.augment.crop=(40, 48)",
    "--config.eval.crop=(40, 48)",
    "--config.eval.base_size=60",
    "--config.batch_size=8",
    "--config.total_steps=3",
    "--config.every.log=1",
]


BASE = "import numpy as np\nfrom pspnet_jax.config import base_config\ndef get_config():\n    config = base_config()\n"


def recipe(path: Path, root: Path) -> Path:
    """Writes a recipe for the folder dataset that `fakes` makes."""
    path.write_text(
        "from pspnet_jax.config import base_config\n"
        "def get_config():\n"
        "    config = base_config()\n"
        "    config.name = 'own'\n"
        f"    config.dataset.root = {str(root)!r}\n"
        "    return config\n"
    )
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A workdir trained with the command line on a small folder dataset, and the dataset."""
    directory = tmp_path_factory.mktemp("main")
    root, workdir = directory / "data", directory / "run"
    fakes.write_folder(root, {"train": 9, "val": 3}, size=(60, 50), num_classes=3)
    own = recipe(directory / "own.py", root)
    assert main(["--config", str(own), "--workdir", str(workdir), "--profile=3:1", *SMALL]) == 0
    return workdir, root


def error(capsys, *arguments: str) -> str:
    """Runs a command that has to exit with status 1, and returns its error message."""
    assert main(list(arguments)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def records(workdir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_training_writes_checkpoints_metrics_pictures_and_config(run):
    workdir, root = run
    assert [r["step"] for r in records(workdir, "train")] == [1, 2, 3]
    assert [r["step"] for r in records(workdir, "eval")] == [3]
    assert (workdir / "checkpoints" / "3").is_dir()
    assert json.loads((workdir / "config.json").read_text())["dataset"]["root"] == str(root)
    assert len(list((workdir / "pictures").glob("*.png"))) == 4
    assert (workdir / "pictures" / "confusion_matrix.png").exists()
    assert (workdir / "curves.png").exists()
    assert list((workdir / "tensorboard").glob("events*"))
    assert list((workdir / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))


def test_evaluate_reproduces_the_final_score_of_training(run, capsys):
    workdir, _ = run
    assert main(["--mode", "evaluate", "--workdir", str(workdir)]) == 0
    trained = records(workdir, "eval")[-1]
    (file,) = (workdir / "evaluation").glob("*_val_step3_*_crop40-48_*scales1.0_*.json")
    scored = json.loads(file.read_text())
    assert scored["mean_iou"] == trained["mean_iou"]
    assert scored["images"] == 3
    rows = list(csv.reader(file.with_name(f"{file.stem}_confusion.csv").read_text().splitlines()))
    assert [sum(map(int, row)) for _, *row in rows[1:]] == [line["pixels"] for line in scored["classes"]]
    assert file.with_name(f"{file.stem}_confusion.png").exists()
    printed = capsys.readouterr().out
    assert f"mIoU {trained['mean_iou']:.2%}" in printed
    assert re.search(r"3 images of val, windows 40x48.*flip on, protocol semseg", printed)


def test_evaluate_takes_another_split_and_other_scales(run):
    workdir, _ = run
    assert main(["--mode=evaluate", f"--workdir={workdir}", "--config.eval.split=train", "--config.eval.scales=0.5,1.0"]) == 0
    (file,) = (workdir / "evaluation").glob("*_train_step3_*scales0.5-1.0_*.json")
    scored = json.loads(file.read_text())
    assert (scored["images"], scored["scales"], scored["split"]) == (9, [0.5, 1.0], "train")


def test_evaluate_warns_about_images_that_were_trained_on(run, capsys):
    assert main(["--mode=evaluate", f"--workdir={run[0]}", "--config.eval.split=train"]) == 0
    assert "9 of 9 evaluation images are also training images" in capsys.readouterr().out


def test_fields_without_effect_cause_warnings(run, capsys, tmp_path):
    assert main(["--mode=evaluate", f"--workdir={run[0]}", "--config.eval.best_metric=mean_f1"]) == 0
    assert "eval.best_metric: 'mean_iou' -> 'mean_f1': only training uses these fields" in capsys.readouterr().out
    assert main(["--mode=evaluate", f"--workdir={run[0]}", "--config.total_steps=9"]) == 0
    assert "total_steps: 3 -> 9: only training uses these fields; they have no effect in this mode" in capsys.readouterr().out
    own = recipe(tmp_path / "own.py", run[1])
    options = ["--config.loss.terms=ohem+dice", "--config.loss.focal_gamma=1.0", "--config.loss.class_weights=1.0,0.0,1.0"]
    options += ["--config.model.norm=frozen", "--config.optimizer.beta2=0.9"]
    assert main(["--config", str(own), "--workdir", str(tmp_path / "run"), *SMALL, *options]) == 0
    output = capsys.readouterr().out
    assert "loss.focal_gamma=1.0 has no effect: it is used only with focal" in output
    assert "optimizer.beta2=0.9 has no effect: it is used only with adamw" in output
    assert "loss.ohem_min_kept=100000: a crop has 1920 pixels, so ohem keeps all" in output
    assert "loss.class_weights: pixels of " in output
    assert "the running statistics have their initial values, mean 0 and variance 1; use model.norm='frozen' only" in output


def test_labels_with_another_palette_are_not_scored(tmp_path, capsys):
    for folder, colors in (("data", [(200, 0, 0), (0, 200, 0)]), ("other", [(0, 200, 0), (200, 0, 0)])):
        root = fakes.write_folder(tmp_path / folder, {"train": 9, "val": 1}, size=(60, 50), num_classes=3)
        for path in root.glob("labels/*/*.png"):
            label = Image.fromarray(np.asarray(Image.open(path)) % 3)
            label.putpalette(np.array([(9, 9, 9), *colors], np.uint8).tobytes())
            label.save(path)
    own = ["--config", str(recipe(tmp_path / "own.py", tmp_path / "data")), "--workdir", str(tmp_path / "run"), *SMALL]
    assert main(own) == 0
    (tmp_path / "other/classes.txt").unlink()
    output = error(capsys, "--mode=evaluate", f"--workdir={tmp_path}/run", f"--config.dataset.root={tmp_path}/other")
    assert "but RGB (200, 0, 0) in the training data" in output
    assert "the same value means different classes" in output


def test_a_checkpoint_that_is_deleted_after_loading_is_still_evaluated(run, tmp_path, monkeypatch):
    load = checkpoint.load

    def load_and_remove(workdir, *arguments):
        found = load(workdir, *arguments)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
        return found

    shutil.copytree(run[0], tmp_path / "run")
    monkeypatch.setattr(checkpoint, "load", load_and_remove)
    assert main(["--mode=evaluate", f"--workdir={tmp_path / 'run'}"]) == 0


def test_class_weights_are_either_given_or_computed(run, capsys, tmp_path):
    own = recipe(tmp_path / "own.py", run[1])
    both = ["--config.loss.class_weights=1.0,1.0,5.0", "--config.loss.class_weighting=median"]
    output = error(capsys, "--config", str(own), "--workdir", str(tmp_path / "run"), *SMALL, *both)
    assert "class_weights=(1.0, 1.0, 5.0): loss.class_weighting computes other values; set only one of the two" in output


def test_the_networks_classes_keep_their_order(caplog):
    with pytest.raises(UserError, match="class 0 of the network is 'sky', not 'road'; keep its order"):
        runs._check_class_names(("sky", "road"), ("road", "Sky"))
    runs._check_class_names(("class 0", "class 1"), ("sky", "road"))
    runs._check_class_names(("sky", "road"), ("Sky", "road"))
    assert not caplog.records
    runs._check_class_names(("sky", "road"), ("sky", "street"))
    assert "class 1 of the network was trained as 'road'; it is now called 'street'" in caplog.text


def test_predict_writes_three_pictures_per_image_in_its_size(run, tmp_path):
    workdir, root = run
    images = root / "images" / "val"
    assert main(["--mode=predict", f"--workdir={workdir}", f"--input={images}", f"--output={tmp_path}"]) == 0
    for image in images.iterdir():
        index = pixels(tmp_path / "index" / f"{image.stem}.png")
        assert index.shape == pixels(image).shape[:2]
        assert index.max() < 3
        assert (tmp_path / "color" / f"{image.stem}.png").exists()
        assert (tmp_path / "overlay" / f"{image.stem}.jpg").exists()


def test_predict_writes_maps(run, tmp_path):
    workdir, root = run
    images = root / "images" / "val"
    given = [f"--workdir={workdir}", f"--input={images}", f"--output={tmp_path}"]
    assert main(["--mode=predict", *given, "--maps=probabilities,confidence"]) == 0
    for image in images.iterdir():
        probabilities = np.load(tmp_path / "probabilities" / f"{image.stem}.npy")
        index = pixels(tmp_path / "index" / f"{image.stem}.png")
        predicted = np.take_along_axis(probabilities, index[..., None], -1)[..., 0]
        np.testing.assert_array_equal(predicted, probabilities.max(-1))  # in float16, several may be equal
        confidence = pixels(tmp_path / "confidence" / f"{image.stem}.png") / 65535
        np.testing.assert_allclose(confidence, probabilities.max(-1), atol=2**-11)


def test_an_unknown_map_is_refused(run, capsys):
    message = error(capsys, "--mode=predict", f"--workdir={run[0]}", "--output=out", "--maps=confidence,entropy")
    assert "--maps: 'entropy': expected confidence or probabilities, or both with a comma between them" in message


def test_predict_draws_over_a_video(run, capsys, tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    from tests.infer.test_video import TIMES, write

    write(tmp_path / "clip.mp4", (40, 48))
    command = ["--mode=predict", f"--workdir={run[0]}", f"--input={tmp_path}/clip.mp4", f"--output={tmp_path}/out"]
    assert main(command) == 0
    assert f"{len(TIMES)} frames written to {tmp_path}/out/overlay/clip.mp4" in capsys.readouterr().out
    assert main([*command, "--skip_existing"]) == 0
    assert "overlay/clip.mp4 is there already" in capsys.readouterr().out
    assert main(command) == 0  # replaces it
    assert "is predicted without --format" in error(capsys, *command, "--format=voc")
    assert "with other settings; delete it" in error(capsys, *command, "--skip_existing", "--config.eval.flip=false")
    assert "leave out .mp4" in error(capsys, *command, f"--output={tmp_path}/out.mp4")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/clip.mp4", (40, 48))
    assert "was made from another video" in error(capsys, *command, f"--input={tmp_path}/other/clip.mp4")


def test_repeating_the_command_of_a_finished_run_changes_nothing(run, capsys):
    workdir, root = run
    before = (workdir / "metrics.jsonl").read_text()
    own = recipe(workdir.parent / "own.py", root)
    assert main(["--config", str(own), "--workdir", str(workdir), *SMALL]) == 0
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_network_in_the_same_workdir_is_refused(run, capsys):
    workdir, root = run
    own = recipe(workdir.parent / "own.py", root)
    output = error(capsys, "--config", str(own), "--workdir", str(workdir), *SMALL, "--config.model.stem=conv7")
    assert "model.stem: 'deep' -> 'conv7'" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/nothing.py"], "configs/nothing.py: no such file"),
        ([], "--config is missing"),
        (["--mode=fly"], "invalid choice: 'fly'"),
        (["--config=configs/camvid.py", "--verbose"], "--verbose: unknown argument"),
        (["--config=configs/camvid.py", "--config.model.bins=1,x"], "model.bins=('1,x',): expected"),
        (["--config=configs/camvid.py", "--config.augment.scale=2"], "augment.scale=(2,): expected 2 values"),
        (["--config=configs/camvid.py", "--config.model.dept=50"], "did you mean model.depth"),
        (["--config=configs/camvid.py", "--config.model.depth=fifty"], "--config.model.depth=fifty"),
        (["--config=configs/camvid.py", "--config.model.depth=51"], "model.depth=51: expected one of 18, 34, 50"),
        (["--config=configs/camvid.py", "--config.optimizer.accumulate=3"], "batch_size=8: expected a multiple of 3"),
        (["--config=configs/camvid.py", "--config.augment.crop=(20, 20)"], "augment.crop=(20, 20): expected"),
        (["--config=configs/camvid.py"], "dataset.root"),
        (["--config=configs/ade20k.py:7"], "model.depth=7: expected one of"),
        (["--config=configs/ade20k.py:fifty"], "configs/ade20k.py:fifty"),
        (["--config=configs/camvid.py", "--config.dataset.name=camvod"], "dataset.name='camvod': expected one of 'folder'"),
        (["--config=configs/camvid.py", "--config.dataset.colors=(1, 2)"], "dataset.colors=(1, 2): expected"),
        (["--config=configs/quickstart.py", "--config.init_from=nowhere"], "nowhere: no such file or directory"),
        (["--mode=evaluate", "--workdir=nowhere"], "nowhere"),
        (["--mode=evaluate"], "--workdir is missing"),
        (["--mode=predict", "--workdir=nowhere"], "--output"),
        (["--mode=check"], "--config is missing"),
        (["--config=configs/camvid.py", "--config.model.depth"], "model.depth"),
        (["--config=configs/camvid.py", "--config.loss.terms=dice+lovasz"], "'lovasz' is unknown; expected one of"),
        (
            ["--config=configs/quickstart.py", "--config.loss.class_weights=1.0,2.0"],
            "expected one weight for each of the 11 classes",
        ),
        (["--config=configs/camvid.py", "7"], "7: unknown argument"),
        (["--config=configs/camvid.py", "--config.seed=99999999999999999999"], "seed=99999999999999999999: expected a whole"),
        (["--config=configs/camvid.py", "--config.seed", "-1", "--noconfig.model.auxiliary"], "dataset.root"),
        (["--config=configs/quickstart.py", "--input=x"], "--input: --mode train does not use it, only predict, check, import"),
        (["--config=configs/quickstart.py", "--checkpoint=3"], "--checkpoint: --mode train does not use it"),
        (["--config=configs/quickstart.py", "--batch=0"], "--batch: --mode train does not use it, only export"),
        (["--mode=predict", "--workdir=nowhere", "--output=x", "--input=hf://a/b"], "hf://a/b: is a name of weights, but"),
        (["--config=configs/quickstart.py", "--processes=two"], "argument --processes: 'two': expected a whole number"),
        (
            ["--config=configs/quickstart.py", "--process_id=1"],
            "--processes is None and --process_id is 1, and no cluster says",
        ),
        (
            ["--mode=check", "--coordinator=node:1", "--processes=4", "--process_id=2"],
            "--mode check runs in a single process, and this is process 2 of 4; start it once, with --processes 1",
        ),
        (["--config=configs"], "--config configs: no such file"),
        (["--mode=predict", "--workdir="], "argument --workdir: is empty; perhaps a shell variable is not set"),
        (["--mode=evaluate", "--checkpoint", ""], "argument --checkpoint: is empty"),
        (["--mode=evaluate", "--workdir=hdfs://a/b"], "hdfs://a/b: cannot be read or written here; expected a local path"),
        (["--config=configs/camvid.py", "--config.dataset.root=http://a/b"], "http://a/b: cannot be read or written here"),
        (["--config=configs/camvid.py", "--config.seed=1", "-config.batch_sze=3"], "did you mean batch_size"),
        (
            ["--config=configs/camvid.py", "--workdir", "a", "b"],
            "b: unknown argument; an option takes one value",
        ),
        (["--config=configs/camvid.py", "--config.eval.flip=yes"], "flip=yes: Non-boolean argument to boolean flag"),
        (["--config=configs/camvid.py", "--config.name=a\nb"], "expected the name of a folder in runs/: one line"),
        (["--config=configs/camvid.py", "--config.dataset.root=s3://a/b"], "s3://a/b: cannot be read or written here"),
        (["--mode=evaluate", "--workdir=s3://a/b"], "s3://a/b: cannot be read or written here"),
        (["--mode=evaluate", "--workdir=/"], "/: is not a run with checkpoints; train there first"),
        (
            ["--mode=export", "--workdir=/nowhere", "--format=torch", "--output=x.pth"],
            "/nowhere: is not a run with checkpoints",
        ),
        (["--mode=check", "--input=hf://a/b"], "hf://a/b: cannot be read or written here"),
        (["--mode=check", "--input=https://a/b"], "https://a/b: cannot be read or written here"),
        (["--mode=export", "--size=0x0"], "'0x0': expected HEIGHTxWIDTH in pixels, such as 473x473, or any"),
        (["--config=~/no/config.json"], f"--config {Path.home()}/no/config.json: no such file"),
    ],
)
def test_a_mistake_ends_in_one_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert words in error(capsys, *arguments)


def test_total_steps_cannot_be_lowered_below_the_current_step(run, capsys):
    workdir, root = run
    own = recipe(workdir.parent / "own.py", root)
    output = error(capsys, "--config", str(own), "--workdir", str(workdir), *SMALL, "--config.total_steps=2")
    assert "total_steps=2: the run in" in output
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 3


def test_the_network_of_a_checkpoint_cannot_be_overridden(run, capsys):
    output = error(capsys, "--mode=evaluate", f"--workdir={run[0]}", "--config.model.depth=50")
    assert "model.depth: 18 -> 50" in output


def test_a_workdir_that_cannot_be_written_is_named(run, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    own = recipe(tmp_path / "own.py", run[1])
    output = error(capsys, "--config", str(own), f"--workdir={tmp_path / 'file' / 'run'}", *SMALL)
    assert str(tmp_path / "file") in output


def test_a_missing_input_is_named(run, capsys, tmp_path):
    workdir, _ = run
    output = error(capsys, "--mode=predict", f"--workdir={workdir}", "--input=no/such.jpg", f"--output={tmp_path}")
    assert "no/such.jpg" in output


@pytest.mark.parametrize("name", ["ade20k", "voc2012", "cityscapes"])
def test_a_benchmark_without_files_ends_in_one_sentence(name):
    command = [sys.executable, "-m", "pspnet_jax.main", "--config", f"configs/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--config.dataset.root" in done.stderr.splitlines()[-1]


def test_check_includes_a_mixture(run, capsys, tmp_path):
    own = recipe(tmp_path / "own.py", run[1])
    other = fakes.write_folder(tmp_path / "other", {"more": 3}, num_classes=3)
    (other / "images/more/001.png").write_bytes(b"")
    mixture = f"--config.dataset.mixture=(('folder', '{other}', 'more', 0.5),)"
    output = error(capsys, "--mode=check", f"--config={own}", f"--workdir={tmp_path}/run", mixture)
    assert "images/more/001.png: cannot be read" in output
    assert "1 problem(s) found" in output
    pictures = [f"{part}_{kind}.png" for part in ("mixture1_more", "train", "val") for kind in ("classes", "images")]
    assert sorted(path.name for path in (tmp_path / "run/check").iterdir()) == pictures


def test_an_opencv_that_is_too_old_is_named():
    code = """import sys, cv2; cv2.__version__ = "4.13.0"
from pspnet_jax.main import main
sys.exit(main(["--config=configs/quickstart.py"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: OpenCV 4.13.0 rounds coordinates too coarsely; run pip install")
    assert "Traceback" not in done.stderr


def test_help_lists_every_field_with_its_default_and_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out.split("fields of the config")[1]
    fields = re.findall(r"^--config\.([\w.]+)=(.+?)(?:  (.*))?$", output, flags=re.MULTILINE)
    defaults = dict(leaves(base_config()))
    assert {field: ast.literal_eval(value) for field, value, _ in fields} == defaults
    assert all(comment for _, _, comment in fields)


# Predicts a folder as windows and as whole images, and prints how many programs it needed and how many of them were kept.
PREDICT = """
import sys
import jax
from pspnet_jax.main import main

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
for inference in ("windows", "whole"):
    given = [f"--workdir={sys.argv[1]}", f"--input={sys.argv[2]}", f"--output={sys.argv[3]}/{inference}"]
    assert main(["--mode=predict", *given, f"--config.eval.inference={inference}"]) == 0
print(*(events.count(f"/jax/compilation_cache/{kind}") for kind in ("compile_requests_use_cache", "cache_hits")))
"""


def test_a_second_prediction_of_images_of_many_sizes_compiles_nothing(run, tmp_path):
    for size in ((30, 41), (97, 50)):
        fakes.write_image(tmp_path / f"images/{size}.png", np.zeros((*size, 3), np.uint8))
    command = [sys.executable, "-c", PREDICT, str(run[0]), str(tmp_path / "images"), str(tmp_path / "output")]
    chosen = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"  # by conftest, for the other tests
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | {"XDG_CACHE_HOME": str(tmp_path)}
    counts = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append([int(count) for count in done.stdout.splitlines()[-1].split()])
    (needed, kept), second = counts
    assert kept < needed
    assert second == [needed, needed]


@pytest.mark.parametrize("given", ["abc", "5", "0:3", "1:3", "x:2", "5:0", "5:", "-2:4"])
def test_a_wrong_range_of_steps_to_profile_is_refused(given, capsys):
    assert "expected STEP:COUNT, such as 20:5" in error(capsys, "--config=configs/camvid.py", f"--profile={given}")


def test_a_profile_beyond_the_last_step_is_refused(capsys, tmp_path):
    output = error(capsys, "--config=configs/quickstart.py", "--profile=160:2", f"--workdir={tmp_path}")
    assert "--profile: step 161 cannot be traced, because total_steps=160; choose earlier steps" in output


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import nothere", "line 1: ModuleNotFoundError: No module named 'nothere'"),
        ("def get_config():\n    pass", "get_config() returns NoneType; expected one made by base_config()"),
        ("def get_config():\n    return {}", "get_config() returns dict"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()", "the config lacks augment.blur"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (f"{BASE}    config.total_steps = None\n    return config", "total_steps=None: expected the types of base_config()"),
        (
            f"{BASE}    config.dataset.colors = ((np.int64(1), 2, 3),)\n    return config",
            "dataset.colors=((np.int64(1), 2, 3),)",
        ),
    ],
)
def test_a_broken_recipe_ends_in_one_sentence(body, words, capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(body)
    output = error(capsys, f"--config={path}")
    assert output.startswith(f"error: --config {path}: ")
    assert words in output


def test_the_config_of_a_run_is_a_recipe(run):
    file = run[0] / "config.json"
    assert to_json(load_recipe(str(file))) == file.read_text()


def test_evaluate_warns_that_a_recipe_is_not_used(run, capsys):
    own = recipe(run[0].parent / "own.py", run[1])
    assert main(["--mode=evaluate", f"--workdir={run[0]}", f"--config={own}"]) == 0
    assert "saved with the checkpoint is used, not" in (output := capsys.readouterr().out)
    assert "model.depth: 50 -> 18" in output


@pytest.mark.parametrize("colors", ["--config.dataset.colors=()", "--config.seed=0"])
def test_a_wrong_number_of_classes_is_refused(run, capsys, colors):
    names = "--config.dataset.class_names=('a','b','c','d')"
    output = error(capsys, "--mode=evaluate", f"--workdir={run[0]}", names, colors)
    assert "dataset.class_names=('a', 'b', 'c', 'd'): expected 3 names, one for each class of the network" in output


def test_a_tilde_stands_for_the_home_directory(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["--mode=predict", f"--workdir={run[0]}", f"--input={run[1]}/images/val", "--output=~/results"]) == 0
    assert len(list((tmp_path / "results/index").iterdir())) == 3
    assert str(tmp_path / "results") in capsys.readouterr().out
    assert not (tmp_path / "~").exists()


def started(tmp_path, module: str, source: str, **environment: str) -> subprocess.CompletedProcess:
    """Starts a training that stops at an invalid value, with a user's module on the import path."""
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    command = [sys.executable, "-m", "pspnet_jax.main", "--config=configs/quickstart.py", "--config.every.log=0"]
    settings = os.environ | {"PYTHONPATH": str(tmp_path)} | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=settings)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_a_platform_without_devices_is_named(tmp_path):
    for platform in ("cuda", "nonsense"):
        output = started(tmp_path, "empty.py", "", JAX_PLATFORMS=platform).stderr.splitlines()[-1]
        assert output.startswith(f"error: JAX finds no device of JAX_PLATFORMS={platform}")


def test_a_failing_plugin_is_reported_in_one_sentence(tmp_path):
    source = "def initialize():\n    raise RuntimeError('Unable to load CUDA.')"
    done = started(tmp_path, "jax_plugins/xla_cuda99/__init__.py", source, JAX_PLATFORMS="")
    (message,) = [line for line in (done.stdout + done.stderr).splitlines() if "Unable to load CUDA" in line]
    assert message.endswith("initialize(): Unable to load CUDA.; its devices will not be used")
    assert done.stderr.splitlines()[-1] == "error: every.log=0: expected more than 0"


def test_the_tpu_compiler_is_not_loaded_where_there_is_no_tpu(tmp_path):
    """JAX's profiler crashes in a process that has loaded libtpu without a TPU."""
    traced = "from pspnet_jax import main\nimport jax, sys\nmain._start_jax()\nwith jax.profiler.trace(sys.argv[1]): pass"
    command = [sys.executable, "-c", traced, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": ""})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_tensorflow_is_named(tmp_path):
    source = "raise ModuleNotFoundError(\"No module named 'tensorflow'\", name='tensorflow')"
    command = [sys.executable, "-m", "pspnet_jax.main", "--config=configs/quickstart.py"]
    (tmp_path / "tensorflow.py").write_text(source)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.splitlines()[-1].startswith("error: tensorflow cannot be imported (No module named 'tensorflow')")


def test_double_precision_set_in_the_shell_is_turned_off(tmp_path):
    done = started(tmp_path, "empty.py", "", JAX_ENABLE_X64="1")
    assert "JAX_ENABLE_X64 is set" in done.stdout


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y"),
        (MemoryError(), "out of memory (MemoryError); lower batch_size"),
        (
            ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"),
            "9 bytes.); lower batch_size",
        ),
        (ValueError("RESOURCE_EXHAUSTED: Error opening zarr: Too many open files"), "too many files are open; raise the limit"),
        (
            RuntimeError("can't start new thread"),
            "no more threads can be started; raise the limit on processes",
        ),
        (UnicodeEncodeError("utf-8", "d\udcc3", 1, 2, "surrogates not allowed"), "set LC_ALL=C.UTF-8"),
        (RuntimeError("/x/events: No space left on device"), "/x/events: No space left on device; free some space"),
    ],
)
def test_a_lack_of_resources_is_reported_in_one_sentence(raised, words, capsys, monkeypatch):
    def job(arguments, overrides):
        raise ValueError("wrapped") from raised

    monkeypatch.setitem(jobs.JOBS, "train", job)
    assert words in error(capsys, "--config=configs/quickstart.py")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(jobs.JOBS, "train", lambda *_: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        main(["--config=configs/quickstart.py"])


def test_predictions_are_not_written_over_the_images(run, capsys, tmp_path):
    (tmp_path / "color").mkdir()
    image = next((run[1] / "images/val").iterdir())
    (tmp_path / "color/a.png").write_bytes(image.read_bytes())
    for given in (tmp_path / "color", tmp_path / "color/a.png"):
        output = error(capsys, "--mode=predict", f"--workdir={run[0]}", f"--input={given}", f"--output={tmp_path}")
        assert "color/a.png: already exists and was not predicted from this input" in output
    assert (tmp_path / "color/a.png").read_bytes() == image.read_bytes()


def test_a_deleted_current_directory_is_reported(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current directory no longer exists" in error(capsys, "--mode=evaluate", "--workdir=runs/x")
    monkeypatch.chdir(tmp_path)


def test_an_interrupt_in_a_destructor_is_not_lost(monkeypatch):
    """Python ignores exceptions raised in destructors."""

    class SlowDestructor:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    def job(arguments, overrides):
        SlowDestructor()
        time.sleep(5)

    monkeypatch.setitem(jobs.JOBS, "train", job)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners in parallel processes ignore the signal
    assert main(["--config=configs/quickstart.py"]) == 130
    signal.signal(signal.SIGINT, handler)
