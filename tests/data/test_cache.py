"""Caches hand out what was read, read it once, and know when a file has changed."""

import itertools
import logging
import os
import pathlib
import types

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import cache, pipeline, sources
from tests import fakes

COUNT = 5


@pytest.fixture
def dataset(tmp_path):
    """A config.dataset whose files and cache nobody else has."""
    dataset = base_config().dataset
    dataset.root, dataset.cache_dir = str(fakes.write_folder(tmp_path / "files", {"train": COUNT})), str(tmp_path / "cache")
    return dataset


class Reader:
    """Reads the fakes, and counts how often."""

    def __init__(self):
        self.reads = 0

    def __call__(self, index):
        self.reads += 1
        return fakes.pair("train", index)


def read_all(dataset, rounds, read):
    """Reads all examples some times with a cache that begins anew; they have to be right."""
    cached = cache.cached(read, sources.open_source(dataset, "train"), dataset, cache.Room(dataset))
    for _, index in itertools.product(range(rounds), range(COUNT)):
        image, label = cached(index)
        expected_image, expected_label = fakes.pair("train", index)
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(label, expected_label)


@pytest.mark.parametrize(("kind", "reads", "reads_again"), [("", 15, 15), ("memory", 5, 5), ("disk", 5, 0)])
def test_each_example_is_decoded_once(dataset, kind, reads, reads_again):
    dataset.cache = kind
    for expected in (reads, reads_again):  # by two processes, so to say
        reader = Reader()
        read_all(dataset, 3, reader)
        assert reader.reads == expected


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_training_sees_the_same_with_a_cache(dataset, kind):
    config = base_config()
    config.dataset.update(root=dataset.root, cache_dir=dataset.cache_dir)
    config.batch_size, config.total_steps, config.augment.crop = 4, 6, (40, 48)
    plain = list(pipeline.train_batches(config))
    config.dataset.cache = kind
    for _ in range(2):
        for batch, expected in zip(pipeline.train_batches(config), plain, strict=True):
            np.testing.assert_array_equal(batch["image"], expected["image"])
            np.testing.assert_array_equal(batch["label"], expected["label"])


def test_a_changed_file_is_read_anew(dataset, tmp_path):
    dataset.cache = "disk"
    source = sources.open_source(dataset, "train")
    reader = Reader()
    read_all(dataset, 1, reader)
    label = tmp_path / "files/labels/train/003.png"
    before = label.stat().st_mtime_ns
    os.utime(label, ns=(before, before + 10**9))
    cache.cached(reader, source, dataset, cache.Room(dataset))(3)
    assert reader.reads == COUNT + 1
    os.utime(label, ns=(before, before))
    cache.cached(reader, source, dataset, cache.Room(dataset))(3)
    assert reader.reads == COUNT + 1


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_half_of_what_is_free_is_used_and_that_said_once(dataset, kind, monkeypatch, caplog):
    size = 40 * 48 * 4
    free = iter([4 * size, 4 * size, 3 * size, 2 * size])  # in the beginning, and before each of three examples
    monkeypatch.setattr(cache, "_available_memory", lambda: next(free))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free)))
    dataset.cache = kind
    reader = Reader()
    with caplog.at_level(logging.WARNING):
        read_all(dataset, 3, reader)
    assert reader.reads == 2 + 3 * (COUNT - 2)
    (record,) = caplog.records
    assert "half of what was free" in record.message


def test_damaged_files_of_the_cache_are_made_again(dataset, tmp_path):
    dataset.cache = "disk"
    source = sources.open_source(dataset, "train")
    reader = Reader()
    read_all(dataset, 1, reader)
    table = cache.classes_held(reader, source, 4, dataset)
    assert reader.reads == 2 * COUNT
    for file, contents in zip(sorted((tmp_path / "cache").iterdir()), [b"", b"\x93NUMPY", *[None] * COUNT], strict=False):
        file.write_bytes(file.read_bytes()[:-1] if contents is None else contents)
    read_all(dataset, 2, reader)
    assert reader.reads == 3 * COUNT
    np.testing.assert_array_equal(cache.classes_held(reader, source, 4, dataset), table)
    assert reader.reads == 4 * COUNT


def test_an_example_of_more_classes_is_not_taken_for_one_of_fewer(dataset):
    dataset.cache = "disk"
    read_all(dataset, 1, Reader())
    (pathlib.Path(dataset.root) / "classes.txt").unlink()
    dataset.class_names = ("a", "b", "c", "d", "e")
    reader = Reader()
    read_all(dataset, 1, reader)
    assert reader.reads == COUNT


def test_a_full_disk_does_not_end_training(dataset, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    dataset.cache = "disk"
    reader = Reader()
    with caplog.at_level(logging.WARNING):
        read_all(dataset, 2, reader)
    assert reader.reads == 2 * COUNT
    (record,) = caplog.records
    assert "No space left on device" in record.message
    assert os.listdir(dataset.cache_dir) == []


def test_a_cache_dir_that_cannot_be_written_is_named(dataset, tmp_path):
    dataset.cache, dataset.cache_dir = "disk", str(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"dataset.cache_dir='.*below': cannot write to .* expected a local directory"):
        cache.Room(dataset)


def test_classes_are_looked_up_once(dataset, tmp_path):
    source = sources.open_source(dataset, "train")
    expected = np.array([[(fakes.pair("train", index)[1] == c).any() for c in range(4)] for index in range(COUNT)])
    assert expected.all()  # noise has every class

    def read(index):  # example i has the classes up to i, and 255
        image, label = fakes.pair("train", index)
        return image, np.where(label <= index, label, 255).astype(np.uint8)

    expected = np.tril(np.ones((COUNT, 4), bool))
    np.testing.assert_array_equal(cache.classes_held(read, source, 4, dataset), expected)
    np.testing.assert_array_equal(cache.classes_held(None, source, 4, dataset), expected)
    os.utime(tmp_path / "files/labels/train/000.png", ns=(0, 0))
    reader = Reader()
    assert cache.classes_held(reader, source, 4, dataset).all()
    assert reader.reads == COUNT


def test_balance_needs_a_class_somewhere(dataset):
    source = sources.open_source(dataset, "train")
    with pytest.raises(ValueError, match=r"dataset.balance=0.0: no label of .* has a class in it"):
        cache.classes_held(lambda index: (None, np.full((4, 4), 255, np.uint8)), source, 4, dataset)
