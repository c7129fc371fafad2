"""Evaluation images that are also training images are counted, whatever their names."""

import logging
import shutil

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import overlap, sources
from tests import fakes


def shared(root, train="train", val="val", check=True, **fields):
    dataset = base_config().dataset
    dataset.update(root=str(root), **fields)
    return overlap.warn_shared([sources.open_source(dataset, train, check)], sources.open_source(dataset, val, check))


def copy(root, source, target):
    for kind in ("images", "labels"):
        shutil.copy(root / kind / f"{source}.png", root / kind / f"{target}.png")


@pytest.mark.parametrize("check", [True, False])
def test_files_in_both_splits_are_counted(tmp_path, caplog, check):
    root = fakes.write_folder(tmp_path, {"train": 4, "val": 3})
    assert shared(root, check=check) == 0
    copy(root, "train/002", "val/001")  # the name also exists in train
    copy(root, "train/003", "val/new")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        assert shared(root, check=check) == 2
    assert "2 of 4 evaluation images are also training images, the first is 001 (called 002 in training)" in caplog.text


def test_a_split_that_is_part_of_the_training_data(tmp_path, caplog):
    root = fakes.write_folder(tmp_path, {"train": 4, "val": 3})
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        assert shared(root, val="train") == 4
        assert shared(root, "train+val") == 3
    assert "4 of 4 evaluation images are also training images, the first is 000:" in caplog.text


def test_same_name_and_size_is_not_the_same_image(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    for index, split in enumerate(("train", "val")):
        fakes.write_image(root / f"images/{split}/000.png", np.full((40, 48, 3), index, np.uint8), compress_level=0)
        fakes.write_image(root / f"labels/{split}/000.png", fakes.pair("train", 0)[1])
    assert len({(root / f"images/{split}/000.png").stat().st_size for split in ("train", "val")}) == 1
    assert shared(root) == 0


def test_scenes_are_identified_by_their_split(tmp_path):
    assert shared("", "train", "validation", name="scenes") == 0
    assert shared("", "validation", "validation", name="scenes") == 200
