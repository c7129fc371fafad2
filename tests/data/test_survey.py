"""A survey counts sizes and classes, and lists problems."""

import io
import os
import re
import zlib

import numpy as np
import pytest
from rich.console import Console

from pspnet_jax.config import base_config
from pspnet_jax.data import sources, survey
from pspnet_jax.datasets import DatasetInfo
from tests import fakes
from tests.data.test_sources import recipe

INFO = DatasetInfo("two", ("sky", "sea"), ((1, 2, 3), (4, 5, 6)))


def test_counts_of_pixels_images_and_sizes(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 2}, size=(40, 50), num_classes=2)
    for index, label in enumerate((np.zeros((40, 50)), np.tile([1, 1, 1, 255, 0], (30, 4)))):
        fakes.write_image(root / f"images/train/{index:03d}.png", np.zeros((*label.shape, 3), np.uint8))
        fakes.write_image(root / f"labels/train/{index:03d}.png", label.astype(np.uint8))
    found = survey.survey(recipe(root=str(root)), "train", 2)
    assert (found.usable, found.sizes) == ([0, 1], {(40, 50): 1, (30, 20): 1})
    assert (found.pixels.tolist(), found.ignored, found.present.tolist()) == ([2120, 360], 120, [2, 1])
    assert found.problems == []
    assert str(found) == "train: 2 images of 20x30, 50x40; 4.62% of the pixels are ignored"
    assert found.table(INFO).row_count == 2


def test_names_with_brackets_are_printed_in_the_table(tmp_path):
    info = DatasetInfo("two", ("sky [far]", "sea [/b]"), ((1, 2, 3), (4, 5, 6)))
    found = survey.survey(recipe(root=str(fakes.write_folder(tmp_path, {"train": 1}, num_classes=2))), "train", 2)
    console = Console(file=io.StringIO(), record=True)
    console.print(found.table(info))
    printed = console.export_text()
    assert all(name in printed for name in info.class_names)


def test_problems_of_files_and_counts_are_listed(tmp_path):
    root = fakes.write_ade20k(tmp_path, {"training": 3})
    (root / "images/training/ADE_train_00000002.jpg").write_bytes(b"")
    found = survey.survey(recipe(name="ade20k", root=str(root)), "training", 150)
    assert found.usable == [0, 2]
    assert len(found.problems) == 2
    assert "ADE_train_00000002.jpg: cannot be read" in found.problems[0]
    assert found.problems[1] == "ade20k training officially has 20,210 images, but 3 were found"


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 2, 5]), (9, [0, 1, 2, 3, 4, 5])])
def test_samples_are_evenly_spaced(tmp_path, count, expected):
    root = fakes.write_folder(tmp_path, {"train": 6})
    dataset = recipe(root=str(root))
    found = survey.samples(survey.survey(dataset, "train", 4), count)
    assert [example["name"] for example in found] == [f"{index:03d}" for index in expected]
    for example, index in zip(found, expected, strict=True):
        image, label = fakes.pair("train", index)
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["label"], label)


def test_every_wrong_file_is_listed_even_if_most_are(tmp_path):
    """This includes a PNG with valid checksums and damaged pixels, which only a decoder finds."""
    root = fakes.write_folder(tmp_path, {"train": 5})
    for index in (0, 1):
        fakes.write_image(root / f"labels/train/{index:03d}.png", np.full((40, 48), 7, np.uint8))
    (root / "images/train/002.png").write_bytes(b"")
    path = root / "images/train/003.png"
    contents = path.read_bytes()
    start = contents.index(b"IDAT") + 4
    size = int.from_bytes(contents[start - 8 : start - 4], "big")
    broken = contents[: start + 50] + bytes(size - 50)
    path.write_bytes(broken + zlib.crc32(broken[start - 4 :]).to_bytes(4, "big") + contents[start + size + 4 :])
    dataset = recipe(root=str(root))
    found = survey.survey(dataset, "train", 4)
    assert found.usable == [4]
    words = (
        "000.png: label value 7",
        "001.png: label value 7",
        "002.png: cannot be read",
        "003.png: cannot be read because it is damaged",
    )
    for sentence, expected in zip(found.problems, words, strict=True):
        assert re.search(expected, sentence)
    assert [example["name"] for example in survey.samples(found, 3)] == ["004"]


class Fakes(sources.Files):
    """Reads the fake examples, keeps only the classes up to i in label i, and counts the reads."""

    def __init__(self, dataset):
        opened = sources.open_source(dataset, "train")
        super().__init__(dataset, opened.pairs)
        self.reads = 0

    def load(self, index):
        self.reads += 1
        image, label = super().load(index)
        return image, np.where(label <= index, label, 255).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path):
    return recipe(root=str(fakes.write_folder(tmp_path / "files", {"train": 3})), cache_dir=str(tmp_path / "cache"))


def test_classes_are_counted_once_for_the_same_files(dataset, tmp_path):
    source = Fakes(dataset)
    labels = [fakes.pair("train", index)[1] for index in range(3)]
    expected = [[np.sum(label == c) * (c <= index) for c in range(4)] for index, label in enumerate(labels)]
    for _ in range(2):
        np.testing.assert_array_equal(survey.class_counts(source, dataset, source.read), expected)
    assert source.reads == 3
    (kept,) = (tmp_path / "cache").glob("classes_*[!k]")
    kept.write_bytes(kept.read_bytes()[:-1])
    np.testing.assert_array_equal(survey.class_counts(source, dataset, source.read), expected)
    os.utime(tmp_path / "files/labels/train/000.png", ns=(0, 0))
    survey.class_counts(source, dataset, source.read)
    assert source.reads == 9


def test_frequencies_of_classes(dataset, tmp_path):
    """Labels of 2 x 3 pixels: 0 0 1 / 1 1 255 and 0 2 2 / 2 2 2; and 1 1 1 / 1 1 1 in the mixture."""
    config, root = base_config(), tmp_path / "tiny"
    for index, rows in enumerate(([[0, 0, 1], [1, 1, 255]], [[0, 2, 2], [2, 2, 2]])):
        fakes.write_image(root / f"images/train/{index}.png", np.zeros((2, 3, 3), np.uint8))
        fakes.write_image(root / f"labels/train/{index}.png", np.array(rows, np.uint8))
    fakes.write_image(root / "images/more/0.png", np.zeros((2, 3, 3), np.uint8))
    fakes.write_image(root / "labels/more/0.png", np.ones((2, 3), np.uint8))
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    config.dataset.update(root=str(root), cache_dir=dataset.cache_dir, mixture=(("folder", str(root), "more", 2.0),))
    opened = [sources.open_source(*part) for part in sources.training_parts(config.dataset)]
    found = survey.class_pixels(config, opened)
    assert found.pixels.tolist() == [3, 9, 5, 0]
    assert found.labeled.tolist() == [5 + 6, 5 + 6, 6, 0]
