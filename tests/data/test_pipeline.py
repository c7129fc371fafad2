import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, sources
from tests import fakes

COUNT = 7  # images, in batches of 4: batches straddle the epochs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fakes.write_folder(tmp_path_factory.mktemp("folder"), {"train": COUNT, "val": 3})


def recipe(root, augmented=True, batch_size=4, total_steps=14):
    """A recipe with all of the augmentation, or with none: then the crop is the image."""
    config = base_config()
    config.dataset.root = str(root)
    config.batch_size, config.total_steps = batch_size, total_steps
    config.augment.crop = (40, 48)
    if not augmented:
        config.augment.scale = (1.0, 1.0)
        config.augment.rotate_probability = config.augment.blur_probability = config.augment.mirror_probability = 0.0
    return config


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def epochs(config):
    """Returns the index of every training example in order, one row an epoch, found by its label."""
    index_of = {fakes.pair("train", index)[1].tobytes(): index for index in range(COUNT)}
    found = [index_of[label.tobytes()] for batch in pipeline.train_batches(config) for label in batch["label"]]
    return np.array(found[: len(found) // COUNT * COUNT]).reshape(-1, COUNT)


def test_without_augmentation_a_batch_holds_the_pairs_as_they_are(root):
    config = recipe(root, augmented=False)
    order = epochs(config).ravel()
    for step, batch in enumerate(itertools.islice(pipeline.train_batches(config), 3)):
        assert batch["image"].shape == (4, 40, 48, 3)
        for i in range(4):
            np.testing.assert_array_equal(batch["image"][i], fakes.pair("train", order[4 * step + i])[0])


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(root):
    order = epochs(recipe(root, augmented=False))
    assert order.shape == (8, COUNT)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(COUNT), (8, 1)))
    assert len({tuple(row) for row in order}) == 8  # 8 of 7! = 5040


def test_the_order_follows_from_the_seed(root):
    config = recipe(root, augmented=False)
    first = epochs(config)
    np.testing.assert_array_equal(epochs(config), first)
    config.seed = 1
    assert (epochs(config) != first).any()


@pytest.mark.parametrize("start", [1, 5, 13])
def test_a_resumed_run_makes_the_same_batches(root, start):
    config = recipe(root)
    whole = list(pipeline.train_batches(config))
    assert len(whole) == 14
    assert_same(list(pipeline.train_batches(config, start_step=start)), whole[start:])


def test_resuming_late_does_not_walk_there(root):
    config = recipe(root, total_steps=10**12)
    late = next(pipeline.train_batches(config, start_step=10**12 - 1))
    assert late["image"].shape == (4, 40, 48, 3)
    assert list(pipeline.train_batches(config, start_step=10**12)) == []


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_same_batches(root, hosts):
    config = recipe(root)
    shares = [pipeline.train_batches(config, host=host, hosts=hosts) for host in range(hosts)]
    joined = [{key: np.concatenate([s[key] for s in step]) for key in step[0]} for step in zip(*shares, strict=True)]
    assert_same(joined, list(pipeline.train_batches(config)))


def test_a_batch_may_be_larger_than_the_epoch(root):
    config = recipe(root, augmented=False, batch_size=16, total_steps=2)
    np.testing.assert_array_equal(epochs(config), epochs(recipe(root, augmented=False))[:4])


def test_augmentation_differs_between_epochs_and_examples(root):
    config = recipe(root, batch_size=COUNT, total_steps=2)
    first, second = pipeline.train_batches(config)
    images = np.concatenate([first["image"], second["image"]])
    assert len({image.tobytes() for image in images}) == 2 * COUNT


def test_batch_must_be_a_multiple_of_the_hosts(root):
    with pytest.raises(ValueError, match=r"batch_size=4: expected a multiple of the number of hosts, 3"):
        pipeline.train_batches(recipe(root), hosts=3)


@pytest.mark.parametrize("hosts", [1, 2, 5])
def test_evaluation_has_every_example_once(root, hosts):
    shares = [list(pipeline.examples(recipe(root), "val", host=host, hosts=hosts)) for host in range(hosts)]
    assert [[e["name"] for e in share] for share in shares] == [
        [f"{index:03d}" for index in range(host, 3, hosts)] for host in range(hosts)
    ]
    for example in itertools.chain(*shares):
        image, label = fakes.pair("val", int(example["name"]))
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["label"], label)


@pytest.fixture
def spoiled(tmp_path):
    """Returns a recipe whose example 002 turns bad after the check at the start: its only other pair is in order."""
    config = recipe(fakes.write_folder(tmp_path, {"train": 3}), batch_size=2, total_steps=6)
    sources.open_source(config.dataset, "train")
    return config, tmp_path / "images/train/002.png", tmp_path / "labels/train/002.png"


def test_a_wrong_label_met_in_training_is_named(spoiled):
    config, _, label = spoiled
    fakes.write_image(label, np.full((40, 48), 17, np.uint8))
    with pytest.raises(ValueError, match=r"labels/train/002.png: label value 17 at 1920 pixels"):
        list(pipeline.train_batches(config))
    with pytest.raises(ValueError, match=r"labels/train/002.png: label value 17 at 1920 pixels"):
        list(pipeline.examples(config, "train"))


def test_batches_before_the_wrong_one_arrive(spoiled):
    config, image, _ = spoiled
    good = list(pipeline.examples(config, "train"))[:2]
    image.unlink()
    examples = pipeline.examples(config, "train")
    assert_same([next(examples), next(examples)], good)
    with pytest.raises(ValueError, match=r"images/train/002.png: cannot be read"):
        next(examples)


def test_an_error_that_no_check_explains_names_the_batch(spoiled, monkeypatch):
    config, image, _ = spoiled
    monkeypatch.setattr(sources.Files, "check", lambda self, index: None)
    image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"one of the examples \d+, \d+ cannot be loaded: .*empty") as error:
        list(pipeline.train_batches(config))
    assert "002" in str(error.value)


def _threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_closing_an_iterator_ends_its_threads(root):
    def use():
        batches = pipeline.train_batches(recipe(root, total_steps=10**6))
        next(batches)
        batches.close()

    use()
    before = _threads()
    for _ in range(5):
        use()
    assert _threads() <= before


SLOW_SCENES = """
import time
from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, scenes

fast = scenes.scene
scenes.scene = lambda *arguments: (time.sleep(0.02), fast(*arguments))[1]
config = base_config()
config.dataset.name = "scenes"
config.batch_size = 2
batches = pipeline.train_batches(config)
next(batches)
"""


def test_leaving_in_the_middle_does_not_hang():
    done = subprocess.run([sys.executable, "-c", SLOW_SCENES], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, "Exception ignored" in done.stderr) == (0, False), done.stderr
