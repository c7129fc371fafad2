"""Classes in training images: counts worked out by hand, and what happens to them when the data changes or is gone."""

import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

from pspnet_jax.analysis import cooccurrence
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from tests import fakes


@pytest.fixture
def config(tmp_path):
    """Three images of 8x8 pixels: sea with a boat, road with a car, and both side by side with two pixels of void between."""
    sea, road = np.zeros((8, 8), np.uint8), np.full((8, 8), 1, np.uint8)
    sea[3:5, 3:5], road[3:5, 3:5] = 2, 3
    beside = np.hstack((sea[:, :4], road[:, 4:]))
    beside[:, 3:5] = 255
    for index, label in enumerate((sea, road, beside)):
        fakes.write_image(tmp_path / f"data/images/train/{index}.png", np.zeros((8, 8, 3), np.uint8))
        fakes.write_image(tmp_path / f"data/labels/train/{index}.png", label)
    config = base_config()
    config.dataset.root, config.dataset.class_names = str(tmp_path / "data"), ("sea", "road", "boat", "car")
    return config


def test_classes_that_occur_together_and_touch(config, tmp_path):
    found = cooccurrence.of_training([config], epath.Path(tmp_path))
    assert found.images == 3
    assert found.present.tolist() == [2, 2, 1, 1]
    assert found.together.tolist() == [[2, 1, 1, 0], [1, 2, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert found.touching.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert found.expected[0].tolist() == [4 / 3, 4 / 3, 2 / 3, 2 / 3]
    assert found.scores[3, 0] == np.log2(2 / 3 + 1)
    assert found.scores[2, 0] == np.log2((2 / 3 + 1) / 2)


def test_counts_are_kept_until_the_data_changes_and_when_it_is_gone(config, tmp_path, monkeypatch):
    label = tmp_path / "data/labels/train/0.png"
    Image.fromarray(np.asarray(Image.open(label))).save(label, compress_level=0)
    size = label.stat().st_size
    first, count = cooccurrence.of_training([config], epath.Path(tmp_path)), cooccurrence._count
    monkeypatch.setattr(cooccurrence, "_count", lambda opened: pytest.fail("counted again"))
    again = cooccurrence.of_training([config], epath.Path(tmp_path))
    np.testing.assert_array_equal(again.touching, first.touching)
    monkeypatch.setattr(cooccurrence, "_count", count)
    Image.fromarray(np.full((8, 8), 1, np.uint8)).save(label, compress_level=0)
    assert label.stat().st_size == size
    assert cooccurrence.of_training([config], epath.Path(tmp_path)).present.tolist() == [1, 3, 0, 1]
    for kind in ("images", "labels"):
        (tmp_path / f"data/{kind}/train/2.png").unlink()
    assert cooccurrence.of_training([config], epath.Path(tmp_path)).images == 2
    shutil.rmtree(tmp_path / "data")
    assert cooccurrence.of_training([config], epath.Path(tmp_path)).images == 2
    with pytest.raises(UserError, match="no such directory"):
        cooccurrence.of_training([config], epath.Path(tmp_path / "another run"))


def test_data_that_has_moved_is_found_by_the_config_of_the_command_line(config, tmp_path):
    moved = config.copy_and_resolve_references()
    config.dataset.root = str(tmp_path / "where it was")
    assert cooccurrence.of_training([config, moved], epath.Path(tmp_path)).images == 3
