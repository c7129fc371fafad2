"""The user's own augmentation gets each crop and a generator of its own, and mistakes in it are explained."""

import itertools
import re
import sys

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import extra, pipeline
from pspnet_jax.data.order import EXTRA, generator
from pspnet_jax.errors import UserError
from tests import fakes

MODULE = """
import numpy as np

def shift(image, label, random):
    rows = random.integers(image.shape[0])
    return np.roll(image, rows, 0), np.roll(label, rows, 0)

def alone(image):
    return image

def forgets(image, label, random):
    return image

def resizes(image, label, random):
    return image[:30], label[:30].astype(int)

def blends(image, label, random):
    return image, label + np.uint8(random.integers(3, 255))

THIRTY = 30
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "my_augmentation.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_augmentation", None)


def recipe(tmp_path, name):
    config = base_config()
    config.dataset.root = str(fakes.write_folder(tmp_path / "data", {"train": 5}))
    config.batch_size, config.total_steps, config.augment.crop, config.augment.extra = 4, 6, (40, 48), name
    return config


def batches_of(config, **how):
    return list(pipeline.as_numpy(pipeline.train_dataset(config, **how)))


@pytest.mark.slow
def test_it_changes_each_crop_by_random_numbers_of_the_seed_and_position(tmp_path):
    config = recipe(tmp_path, "my_augmentation:shift")
    found, halves = batches_of(config), [batches_of(config, start_step=3, host=host, hosts=2) for host in range(2)]
    config.augment.extra = ""
    for step, (batch, plain) in enumerate(zip(found, batches_of(config), strict=True)):
        for i, key in itertools.product(range(4), ("image", "label")):
            rows = generator(config.seed, EXTRA, 4 * step + i).integers(40)
            np.testing.assert_array_equal(batch[key][i], np.roll(plain[key][i], rows, 0))
    for key, (batch, first, second) in itertools.product(("image", "label"), zip(found[3:], *halves, strict=True)):
        np.testing.assert_array_equal(batch[key], np.concatenate([first[key], second[key]]))


@pytest.mark.slow
def test_a_wrong_name_is_refused_before_the_data_is_read(tmp_path):
    config = recipe(tmp_path, "my_augmentation:missing")
    config.dataset.update(root=str(tmp_path / "nowhere"), class_names=("a", "b"))
    with pytest.raises(UserError, match=r"augment\.extra='my_augmentation:missing'"):
        pipeline.open_training(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_augmentations:shift", "No module named 'my_augmentations'; expected 'module:function'"),
        ("my_augmentation:shifts", "has no attribute 'shifts'"),
        ("my augmentation", "invalid format"),
        ("my_augmentation", "is not a callable object"),
        ("my_augmentation:THIRTY", "30 is not a callable object"),
        ("my_augmentation:alone", "too many positional arguments"),
    ],
)
def test_a_name_that_is_no_such_function_is_refused(name, reason):
    with pytest.raises(UserError, match=f"^augment.extra='{name}': .*{reason}"):
        extra.load(name, 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("forgets", "returns uint8[40, 48, 3]; expected the types and shapes given, uint8[40, 48, 3] and uint8[40, 48]"),
        ("blends", "returns a label with the values ["),
        ("resizes", "returns uint8[30, 48, 3] and int64[30, 48]; expected the types and shapes given, uint8[40, 48, 3] and "),
    ],
)
def test_results_of_another_kind_are_refused(name, reason):
    call = extra.load(f"my_augmentation:{name}", 3)
    with pytest.raises(UserError, match=f"^augment.extra='my_augmentation:{name}' {re.escape(reason)}"):
        call(np.zeros((40, 48, 3), np.uint8), np.zeros((40, 48), np.uint8), generator(0, EXTRA, 0))


def test_errors_of_the_module_and_of_the_function_are_sentences(tmp_path, monkeypatch):
    (tmp_path / "unfinished_augmentation.py").write_text("def augment(:\n")
    (tmp_path / "failing_augmentation.py").write_text("def augment(image, label, random):\n    return image[9, 9, 9, 9]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"^augment.extra='unfinished_augmentation:augment': .*unfinished_augmentation.py, line 1"
    ):
        extra.load("unfinished_augmentation:augment", 3)
    call = extra.load("failing_augmentation:augment", 3)
    with pytest.raises(
        UserError, match=r"^augment.extra='failing_augmentation:augment': .*augmentation.py, line 2: IndexError: "
    ):
        call(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.random.default_rng(0))
