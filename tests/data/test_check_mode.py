"""--mode check lists what is wrong with every split, whatever else goes wrong."""

import shutil

import numpy as np
import pytest

from pspnet_jax.main import main
from tests import fakes


@pytest.fixture
def check(tmp_path, capsys):
    """Returns a function that checks tmp_path/data with the folder recipe, and returns the status and what was said."""

    def run(*arguments):
        command = ["--config=configs/folder.py", f"--config.dataset.root={tmp_path}/data", "--mode=check"]
        status = main([*command, f"--output={tmp_path}/check", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_a_split_that_is_missing_does_not_hide_what_is_wrong_with_the_other(tmp_path, check):
    root = fakes.write_folder(tmp_path / "data", {"train": 3})
    (root / "images/train/001.png").write_bytes(b"")
    status, said = check()
    assert status == 1
    assert "images/train/001.png: cannot be read" in said
    assert "images/val: no such directory" in said
    assert "2 problem(s) found" in said


def test_pictures_that_cannot_be_written_are_one_sentence(tmp_path, check):
    fakes.write_folder(tmp_path / "data", {"train": 2, "val": 1})
    (tmp_path / "file").write_text("")
    status, said = check(f"--output={tmp_path}/file/below")
    assert status == 1
    assert f"{tmp_path}/file/below: cannot be written (Not a directory); the pictures are missing" in said


def test_pictures_are_drawn_neither_over_the_users_nor_among_the_data(tmp_path, check):
    fakes.write_folder(tmp_path / "data", {"train": 2, "val": 1})
    assert check(f"--output={tmp_path}/out")[0] == check(f"--output={tmp_path}/out")[0] == 0  # over its own
    fakes.write_image(tmp_path / "mine/train_images.png", np.zeros((4, 5, 3), np.uint8))
    before = (tmp_path / "mine/train_images.png").read_bytes()
    status, said = check(f"--output={tmp_path}/mine")
    assert (status, (tmp_path / "mine/train_images.png").read_bytes()) == (1, before)
    assert "mine/train_images.png: already exists and was not written by this program; choose another --output" in said
    status, said = check(f"--output={tmp_path}/data/labels/train/check")
    assert status == 1
    assert "labels/train/check: lies among the images and labels in " in said
    assert not (tmp_path / "data/labels/train/check").exists()
    assert "Traceback" not in said


def test_shared_images_and_missing_classes_are_no_problems_but_are_told(tmp_path, check):
    root = fakes.write_folder(tmp_path / "data", {"train": 3, "val": 2})
    (root / "classes.txt").write_text("a\nb\nc\nd [far]\ne [/x]\n")
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "train/002.png", root / kind / "val/000.png")
    status, said = check()
    assert status == 0
    assert "d [far]" in said
    assert "no pixel of 'e [/x]' (4)" in said
    assert "1 of the 2 images that are scored are in the training data as well, the first of them 000 (there 002)" in said
