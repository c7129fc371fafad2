"""Jobs of two and four processes have the results of one process, and notice it if their hosts differ."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pspnet_jax import models, parallel
from pspnet_jax.main import main
from pspnet_jax.train import checkpoint, layout
from tests import fakes
from tests.processes import ROOT, free_port, run_processes
from tests.test_main import recipe, records
from tests.train import OneLayer, fit, make_batches, mesh_of, tiny_config

pytestmark = pytest.mark.slow

# The command line, with the smallest network there is
MAIN = """
import sys
from pspnet_jax import models
from pspnet_jax.main import main
from tests.train import OneLayer

models.build = lambda *_: OneLayer()
sys.exit(main(sys.argv[1:]))
"""
SMALL = ["--config.augment.crop=(40, 48)", "--config.eval.crop=(40, 48)", "--config.eval.base_size=60", "--config.model.bins=1"]
SMALL += ["--config.batch_size=8", "--config.total_steps=6", "--config.every.log=1", "--config.optimizer.learning_rate=0.5"]


@contextlib.contextmanager
def only(devices):
    """Hides all but the first devices of this process, and replaces the network by the smallest one."""
    found = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_: found)
        patch.setattr(jax, "device_count", lambda *_: devices)
        patch.setattr(models, "build", lambda *_: OneLayer())
        yield


def largest_difference(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y)), initial=0)) for x, y in pairs)


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_exit(done, code):
    assert [process.returncode for process in done] == [code] * len(done), "\n".join(process.stderr for process in done)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe with its data, and the workdirs of two processes with a device each and of one process with two devices."""
    directory = tmp_path_factory.mktemp("processes")
    fakes.write_folder(directory / "data", {"train": 9, "val": 5}, size=(60, 50), num_classes=3)
    command = ["--config", str(recipe(directory / "own.py", directory / "data")), *SMALL]
    done = run_processes(2, "-c", MAIN, *command, "--workdir", str(directory / "two"), options=True)
    check_exit(done, 0)
    with only(2):
        assert main([*command, "--workdir", str(directory / "one")]) == 0
    return directory, done


def test_two_processes_train_and_evaluate_as_one(trained):
    directory, (first, second) = trained
    one, two = (checkpoint.load(directory / run, 6, mesh_of(1))[2] for run in ("one", "two"))
    parameters = largest_difference(one, two)
    lines = {kind: [records(directory / run, kind) for run in ("one", "two")] for kind in ("train", "eval")}
    losses, ious = (
        [[line[name] for line in run] for run in lines[kind]] for kind, name in [("train", "loss"), ("eval", "mean_iou")]
    )
    print(
        f"\nlargest difference between two processes and one, after 6 steps: parameters {parameters:.1e}, losses "
        f"{largest_difference(*losses):.1e}, mIoU {largest_difference(*ious):.1e}"
    )
    assert parameters < 1e-6
    assert largest_difference(*losses) < 1e-6
    assert [len(run) for run in losses] == [6, 6]
    assert len(set(losses[0])) == 6
    assert lines["eval"][0][-1]["images"] == lines["eval"][1][-1]["images"] == 5
    assert largest_difference(*ious) < 1e-6
    assert "step 6/6" in first.stdout
    assert "step" not in second.stdout


def test_two_processes_that_share_images_train_as_one(trained):
    """With parallel.spatial=2, both read the same batches, and each computes half of the rows of every image."""
    directory, _ = trained
    command = ["--config", str(directory / "own.py"), *SMALL, "--config.parallel.spatial=2"]
    done = run_processes(2, "-c", MAIN, *command, "--workdir", str(directory / "shared"), options=True)
    check_exit(done, 0)
    expected, found = ([line["loss"] for line in records(directory / run, "train")] for run in ("one", "shared"))
    print(f"\nlargest difference of a loss in 6 steps: {largest_difference(found, expected):.1e}")
    assert largest_difference(found, expected) < 1e-6


def test_two_processes_evaluate_a_run_as_one(trained):
    """Checks the report of --mode evaluate, which the first process alone prints and writes."""
    directory, _ = trained
    shutil.copytree(directory / "two", directory / "scored")
    command = ["--mode=evaluate", f"--workdir={directory / 'scored'}", "--config.eval.split=train"]
    done = run_processes(2, "-c", MAIN, *command, options=True)
    check_exit(done, 0)
    (together,) = (directory / "scored" / "evaluation").glob("*.json")
    found = json.loads(together.read_text())
    together.unlink()
    with only(1):
        assert main(command) == 0
    (alone,) = (directory / "scored" / "evaluation").glob("*.json")
    expected = json.loads(alone.read_text())
    print(f"\nmIoU of two processes {found['mean_iou']}, of one {expected['mean_iou']}")
    assert found["images"] == expected["images"] == 9
    assert found["classes"] == expected["classes"]
    assert "mIoU" in done[0].stdout
    assert "mIoU" not in done[1].stdout


def test_two_processes_predict_the_files_of_one(trained):
    """One of five images is damaged; the others get the same files, bit for bit. Both processes count all and exit with 1."""
    directory, _ = trained
    shutil.copytree(directory / "data/images/val", directory / "photos")
    (directory / "photos/002.png").write_bytes(b"no image")
    command = ["--mode=predict", f"--workdir={directory / 'two'}", f"--input={directory / 'photos'}"]
    done = run_processes(2, "-c", MAIN, *command, f"--output={directory / 'together'}", options=True)
    check_exit(done, 1)
    sentences = [process.stderr.splitlines() for process in done]
    assert [len(lines) for lines in sentences] == [2, 1]
    assert "002.png: cannot be read as an image" in sentences[0][0]
    assert (sentences[0][1], sentences[1][0]) == (
        f"1 of 5 images could not be predicted, see {directory}/together/failed.txt",
        f"error: 1 of 5 images could not be predicted, see {directory}/together/failed.txt",
    )
    assert "4 of 5 images have their results in" in done[0].stdout
    with only(1):
        assert main([*command, f"--output={directory / 'alone'}"]) == 1
    together, alone = (files_below(directory / name) for name in ("together", "alone"))
    assert len(alone) == 2 + 3 * 4  # with .origin.json and failed.txt
    assert together == alone


def test_sigterm_ends_a_prediction_at_once(trained, tmp_path):
    """Only training saves after a signal; the results of a prediction are continued by --skip_existing."""
    (tmp_path / "in").mkdir()
    for index in range(2000):
        (tmp_path / f"in/{index}.png").symlink_to(trained[0] / "data/images/val/000.png")
    command = [
        "--mode=predict",
        f"--workdir={trained[0] / 'two'}",
        f"--input={tmp_path / 'in'}",
        f"--output={tmp_path / 'out'}",
    ]

    def stop(processes):
        while not list(tmp_path.glob("out/overlay/*.jpg")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        for process in processes:
            process.terminate()
        assert [process.wait(timeout=5) for process in processes] == [-signal.SIGTERM] * 2

    run_processes(2, "-c", MAIN, *command, options=True, meanwhile=stop)


# Trains each workdir up to a step, and prints a checksum of the state or of the state restored from a finished run.
RESUME = """
import sys
from pspnet_jax import parallel

parallel.start_processes()
from tests.test_processes import train_to

for workdir, last in zip(sys.argv[1::2], sys.argv[2::2]):
    if state := train_to(workdir, int(last)):
        print("state", parallel.checksum(state))
"""


def train_to(workdir, last):
    """Trains to step 12, where the state is returned, or stops at step 4, after it is saved; each process has its share."""
    share = 8 // jax.process_count()
    rows = slice(share * jax.process_index(), share * (jax.process_index() + 1))

    def stop(step):
        if step == last < 12:
            raise SystemExit

    def batches(start):
        return ({name: array[rows] for name, array in batch.items()} for batch in make_batches(start))

    with contextlib.suppress(SystemExit):
        return fit(tiny_config(), batches, None, workdir, model=OneLayer(), hooks=[stop])


def states(done):
    return [[line for line in process.stdout.splitlines() if line.startswith("state")] for process in done]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of an uninterrupted run on one device, and its final state."""
    workdir = tmp_path_factory.mktemp("alone")
    with only(1):
        return workdir, train_to(workdir, 12)


def read(workdir, like):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    return layout.read_state(checkpoint.Checkpoints(workdir, read_only=True).path(12), target)


def test_a_run_continues_with_four_processes_or_with_one(tmp_path, alone):
    """What one saves, the other restores bit for bit; the steps add up gradients in another order."""
    workdir, state = alone
    with only(1):
        train_to(tmp_path / "widened", 4)
    done = run_processes(4, "-c", RESUME, *map(str, (tmp_path / "narrowed", 4, tmp_path / "widened", 12, workdir, 12)))
    check_exit(done, 0)
    with only(1):
        narrowed = train_to(tmp_path / "narrowed", 12)
    widened = read(tmp_path / "widened", state)
    assert states(done) == [[f"state {parallel.checksum(each)}" for each in (widened, state)]] * 4
    differences = [largest_difference(state, other) for other in (narrowed, widened)]
    print("\nlargest difference from a run of one process, after 12 steps: 4 -> 1 {:.1e}, 1 -> 4 {:.1e}".format(*differences))
    assert max(differences) < 1e-5


def test_a_run_of_two_processes_continues_on_eight_devices(tmp_path, alone):
    check_exit(run_processes(2, "-c", RESUME, str(tmp_path / "run"), "4"), 0)
    with only(8):
        difference = largest_difference(alone[1], train_to(tmp_path / "run", 12))
    print(f"\nlargest difference from a run on one device, after 12 steps: {difference:.1e}")
    assert difference < 1e-5


DIFFERENT = """
import json, os, sys, time
from pspnet_jax import lock, parallel

parallel.start_processes()
import jax
from etils import epath

lock.APPEARS_WITHIN = 1
host, directory = jax.process_index(), epath.Path(sys.argv[1])

def attempt(function):
    try:
        found = function()
    except ValueError as error:
        found = str(error)
    print("said", json.dumps(found))

def hold(path):
    with lock.locked(path):
        names = sorted(os.listdir(path))
        parallel.exchange("")  # the first process removes the lock when it leaves
        return names

def fail():
    with parallel.fail_together("listing the images"):
        if host == 1:
            raise ValueError("no such folder")

attempt(lambda: parallel.require_same({"class names": ["sky", "road"][: 2 - host], "seed": 0}))
attempt(lambda: hold(directory / f"of_{host}"))
attempt(lambda: hold(directory / "of_all"))
attempt(fail)
if host == 1:
    time.sleep(1)
attempt(lambda: [*parallel.exchange(host).values()])
"""


def test_differences_between_two_processes_are_named(tmp_path):
    (tmp_path / "of_1").mkdir()
    done = run_processes(2, "-c", DIFFERENT, str(tmp_path))
    check_exit(done, 0)
    said = [[json.loads(line[5:]) for line in process.stdout.splitlines() if line.startswith("said")] for process in done]
    first, second = (f"process {i} ({socket.gethostname()})" for i in range(2))
    for (values, unshared, shared, failure, late), process, other in zip(said, (0, 1), (second, None), strict=True):
        assert values.startswith(
            f"{second} differs from {first}: class names=['sky'] instead of ['sky', 'road']; start the same"
        )
        assert unshared.startswith(f"{tmp_path}/of_{process}: {second} cannot see a file that {first} has written there; all")
        assert "lock" in shared
        assert failure == (f"listing the images failed in {other}: ValueError: no such folder" if other else "no such folder")
        assert late == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of_0", "of_1", "of_all"]
    assert not list(tmp_path.rglob(".*"))


def test_hosts_with_other_class_names_do_not_start_to_train(trained, tmp_path):
    directory, _ = trained
    own = recipe(tmp_path / "own.py", directory / "data")
    line = "    config.dataset.class_names = ('sky', 'road', f'car {sys.argv[-1]}')  # the number of the process\n"
    own.write_text("import sys\n" + own.read_text().replace("    return", f"{line}    return"))
    command = "--config", str(own), *SMALL, "--workdir", str(tmp_path / "run")
    done = run_processes(2, "-c", MAIN, *command, options=True)
    check_exit(done, 1)
    for process in done:
        assert "dataset.class_names=('sky', 'road', 'car 1') instead of ('sky', 'road', 'car 0')" in process.stderr
        assert len([line for line in process.stderr.splitlines() if not line.startswith("[Gloo]")]) == 1
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_numbers_of_devices_do_not_start(trained):
    devices = "import os, sys; os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={1 + int(sys.argv[-1])}'\n"
    command = "--mode=evaluate", "--workdir", str(trained[0] / "one")
    done = run_processes(2, "-c", devices + MAIN, *command, options=True)
    check_exit(done, 1)
    for process in done:
        (sentence,) = [line for line in process.stderr.splitlines() if not line.startswith("[Gloo]")]
        assert "differs from process 0" in sentence
        assert "devices='2 x cpu' instead of '1 x cpu'" in sentence


def test_a_missing_process_ends_the_start_with_one_sentence():
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process_id=0", "--start_timeout=1", "--distributed"]
    command = [sys.executable, "-m", "pspnet_jax.main", "--config=configs/quickstart.py", *place]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert re.match(
        r"error: after 1 s, 1 of 2 processes have come to 127.*; missing: 1; usual causes: the command was not", sentence
    )
