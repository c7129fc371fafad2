"""Caches return the right examples, read each once, and notice changed files."""

import itertools
import logging
import os
import pathlib
import types

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import cache, sources
from pspnet_jax.errors import UserError
from tests import fakes
from tests.data.test_pipeline import batches_of

COUNT = 5


@pytest.fixture
def dataset(tmp_path):
    """Returns a config.dataset with files and a cache directory of the test's own."""
    dataset = base_config().dataset
    dataset.root, dataset.cache_dir = str(fakes.write_folder(tmp_path / "files", {"train": COUNT})), str(tmp_path / "cache")
    return dataset


class Counted(sources.Files):
    """Reads the fake examples and counts the reads."""

    def __init__(self, dataset):
        opened = sources.open_source(dataset, "train")
        super().__init__(dataset, opened.pairs)
        self.reads = 0

    def load(self, index):
        self.reads += 1
        return super().load(index)


def read_all(dataset, rounds, source):
    """Reads all examples several times through a new cache, and checks them."""
    cached = cache.cached(source, dataset, cache.CacheBudget(dataset))
    for _, index in itertools.product(range(rounds), range(COUNT)):
        image, label = cached(index)
        expected_image, expected_label = fakes.pair("train", index)
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(label, expected_label)


@pytest.mark.parametrize(("kind", "reads", "reads_again"), [("", 15, 15), ("memory", 5, 5), ("disk", 5, 0)])
def test_each_example_is_decoded_once(dataset, kind, reads, reads_again):
    dataset.cache = kind
    for expected in (reads, reads_again):  # as in two processes
        source = Counted(dataset)
        read_all(dataset, 3, source)
        assert source.reads == expected


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_batches_are_the_same_with_a_cache(dataset, kind):
    config = base_config()
    config.dataset.update(root=dataset.root, cache_dir=dataset.cache_dir)
    config.batch_size, config.total_steps, config.augment.crop = 4, 6, (40, 48)
    plain = list(batches_of(config))
    config.dataset.cache = kind
    for _ in range(2):
        for batch, expected in zip(batches_of(config), plain, strict=True):
            np.testing.assert_array_equal(batch["image"], expected["image"])
            np.testing.assert_array_equal(batch["label"], expected["label"])


def test_a_changed_file_is_read_again(dataset, tmp_path):
    dataset.cache = "disk"
    source = Counted(dataset)
    read_all(dataset, 1, source)
    label = tmp_path / "files/labels/train/003.png"
    before = label.stat().st_mtime_ns
    os.utime(label, ns=(before, before + 10**9))
    cache.cached(source, dataset, cache.CacheBudget(dataset))(3)
    assert source.reads == COUNT + 1
    os.utime(label, ns=(before, before))  # st_ctime still shows the change
    cache.cached(source, dataset, cache.CacheBudget(dataset))(3)
    assert source.reads == COUNT + 2
    cache.cached(source, dataset, cache.CacheBudget(dataset))(3)
    assert source.reads == COUNT + 2


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_half_of_the_free_space_is_used_with_one_warning(dataset, kind, monkeypatch, caplog):
    size = 40 * 48 * 4
    free = iter([4 * size, 4 * size, 3 * size, 2 * size])  # at the start, and before each of three examples
    monkeypatch.setattr(cache, "_available_memory", lambda: next(free))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free)))
    dataset.cache = kind
    source = Counted(dataset)
    with caplog.at_level(logging.WARNING):
        read_all(dataset, 3, source)
    assert source.reads == 2 + 3 * (COUNT - 2)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "half of the space that was free is used" in record.message


def test_damaged_cache_files_are_written_again(dataset, tmp_path):
    dataset.cache = "disk"
    source = Counted(dataset)
    read_all(dataset, 1, source)
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == COUNT
    damaged = [
        b"",
        b"\x93NUMPY",
        files[2].read_bytes()[:-1],
        files[3].read_bytes()[:-50] + bytes(50),
    ]  # the last has zeroed bytes
    for file, contents in zip(files, damaged, strict=False):
        file.write_bytes(contents)
    np.save(files[4], np.load(files[4]).astype(np.float32))
    read_all(dataset, 2, source)
    assert source.reads == 2 * COUNT


def test_examples_are_cached_separately_for_each_number_of_classes(dataset):
    dataset.cache = "disk"
    read_all(dataset, 1, Counted(dataset))
    (pathlib.Path(dataset.root) / "classes.txt").unlink()
    dataset.class_names = ("a", "b", "c", "d", "e")
    source = Counted(dataset)
    read_all(dataset, 1, source)
    assert source.reads == COUNT


def test_a_full_disk_does_not_end_training(dataset, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    dataset.cache = "disk"
    source = Counted(dataset)
    with caplog.at_level(logging.WARNING):
        read_all(dataset, 2, source)
    assert source.reads == 2 * COUNT
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "No space left on device" in record.message
    assert not list(pathlib.Path(dataset.cache_dir).glob("*.npy"))


def test_a_cache_dir_that_cannot_be_written_is_named(dataset, tmp_path):
    dataset.cache, dataset.cache_dir = "disk", str(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"dataset.cache_dir='.*below': cannot write to .* expected a local directory"):
        cache.CacheBudget(dataset)


def test_a_source_without_files_cannot_be_cached_on_disk(dataset):
    dataset.cache = "disk"
    source = sources.Source()
    source.names, source.num_classes = ["a"], 4
    with pytest.raises(UserError, match=r"dataset.cache='disk': this source names no files"):
        cache.cached(source, dataset, cache.CacheBudget(dataset))
