"""--mode check lists the problems of every split, whatever else goes wrong."""

import shutil

import numpy as np
import pytest

from pspnet_jax.main import main
from tests import fakes


@pytest.fixture
def check(tmp_path, capsys):
    """Returns a function that checks tmp_path/data with the folder recipe, and returns the exit status and the output."""

    def run(*arguments):
        command = ["--config=configs/folder.py", f"--config.dataset.root={tmp_path}/data", "--mode=check"]
        status = main([*command, f"--output={tmp_path}/check", *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_a_missing_split_does_not_hide_problems_of_another(tmp_path, check):
    root = fakes.write_folder(tmp_path / "data", {"train": 3})
    (root / "images/train/001.png").write_bytes(b"")
    status, output = check()
    assert status == 1
    assert "images/train/001.png: cannot be read" in output
    assert "images/val: no such directory" in output
    assert "2 problem(s) found" in output


def test_pictures_that_cannot_be_written_are_reported_in_one_sentence(tmp_path, check):
    fakes.write_folder(tmp_path / "data", {"train": 2, "val": 1})
    (tmp_path / "file").write_text("")
    status, output = check(f"--output={tmp_path}/file/below")
    assert status == 1
    assert f"{tmp_path}/file/below: cannot be written (Not a directory); the pictures are missing" in output


def test_pictures_are_not_written_over_the_users_files_or_among_the_data(tmp_path, check):
    fakes.write_folder(tmp_path / "data", {"train": 2, "val": 1})
    assert check(f"--output={tmp_path}/out")[0] == check(f"--output={tmp_path}/out")[0] == 0  # overwrites its own pictures
    fakes.write_image(tmp_path / "mine/train_images.png", np.zeros((4, 5, 3), np.uint8))
    before = (tmp_path / "mine/train_images.png").read_bytes()
    status, output = check(f"--output={tmp_path}/mine")
    assert (status, (tmp_path / "mine/train_images.png").read_bytes()) == (1, before)
    assert "mine/train_images.png: already exists and was not written by this program; choose another --output" in output
    status, output = check(f"--output={tmp_path}/data/labels/train/check")
    assert status == 1
    assert "labels/train/check: is inside " in output
    assert not (tmp_path / "data/labels/train/check").exists()
    assert "Traceback" not in output


def test_shared_images_and_missing_classes_are_only_warnings(tmp_path, check):
    root = fakes.write_folder(tmp_path / "data", {"train": 3, "val": 2})
    (root / "classes.txt").write_text("a\nb\nc\nd [far]\ne [/x]\n")
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "train/002.png", root / kind / "val/000.png")
    status, output = check()
    assert status == 0
    assert "d [far]" in output
    assert "no pixel has class 'e [/x]' (4)" in output
    assert "1 of 2 evaluation images are also training images, the first is 000 (called 002 in training)" in output
