import dataclasses
import gc
import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import augment, pipeline, sources
from pspnet_jax.data.order import AUGMENT, generator
from pspnet_jax.errors import UserError
from tests import fakes

pytestmark = pytest.mark.slow

COUNT = 7  # images; batches of 4 span two epochs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fakes.write_folder(tmp_path_factory.mktemp("folder"), {"train": COUNT, "val": 3})


def recipe(root, augmented=True, batch_size=4, total_steps=14):
    """Returns a recipe with all augmentations, or with none, where the crop is the whole image."""
    config = base_config()
    config.dataset.root = str(root)
    config.batch_size, config.total_steps = batch_size, total_steps
    config.augment.crop = (40, 48)
    if not augmented:
        config.augment.scale = (1.0, 1.0)
        config.augment.rotate_probability = config.augment.blur_probability = config.augment.flip_probability = 0.0
    return config


def batches_of(config, **how):
    return pipeline.as_numpy(pipeline.train_dataset(config, **how))


def examples_of(config, split, **how):
    return pipeline.as_numpy(pipeline.eval_dataset(config, split, **how))


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def epochs(config):
    """Returns the index of every training example in order, one row per epoch, found by its label."""
    index_of = {fakes.pair("train", index)[1].tobytes(): index for index in range(COUNT)}
    found = [index_of[label.tobytes()] for batch in batches_of(config) for label in batch["label"]]
    return np.array(found[: len(found) // COUNT * COUNT]).reshape(-1, COUNT)


def test_without_augmentation_a_batch_contains_the_unchanged_pairs(root):
    config = recipe(root, augmented=False)
    order = epochs(config).ravel()
    for step, batch in enumerate(itertools.islice(batches_of(config), 3)):
        assert batch["image"].shape == (4, 40, 48, 3)
        for i in range(4):
            np.testing.assert_array_equal(batch["image"][i], fakes.pair("train", order[4 * step + i])[0])


def test_each_epoch_has_every_example_once_in_a_new_order(root):
    order = epochs(recipe(root, augmented=False))
    assert order.shape == (8, COUNT)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(COUNT), (8, 1)))
    assert len({tuple(row) for row in order}) == 8  # 8 of 7! = 5040


def test_the_order_depends_on_the_seed(root):
    config = recipe(root, augmented=False)
    first = epochs(config)
    np.testing.assert_array_equal(epochs(config), first)
    config.seed = 1
    assert (epochs(config) != first).any()


# Of three batches, only flipped and cropped, which computes no new pixel values; from the pipeline before it used tf.data.
CHECKSUMS = {
    "folder": "cf672947ac2db1f7",
    "memory": "cf672947ac2db1f7",
    "disk": "cf672947ac2db1f7",
    "balance": "664f22a1db0a9079",
    "cityscapes": "3c7a642c6eecb4e9",
    "scenes": "6c7d4618a62a5b48",
}


@pytest.mark.parametrize("name", CHECKSUMS)
def test_batches_have_not_changed(tmp_path, name):
    """For sources with lossless images: two mixed folders with and without caches and balance, raw labels, and scenes."""
    config = recipe(tmp_path)
    config.dataset.cache_dir, config.augment.crop, config.seed = str(tmp_path / "cache"), (41, 47), 3
    config.augment.scale, config.augment.rotate_probability, config.augment.blur_probability = (1.0, 1.0), 0.0, 0.0
    if name == "cityscapes":
        fakes.write_cityscapes(tmp_path, {"train": 4, "train_extra": 2}, size=(64, 128))
        config.dataset.name, config.dataset.train_split = "cityscapes", "train+train_extra"
    elif name == "scenes":
        config.dataset.name = "scenes"
    else:
        fakes.write_folder(tmp_path, {"train": COUNT})
        fakes.write_folder(tmp_path / "other", {"other": 3}, size=(61, 35))
        config.dataset.mixture = (("folder", str(tmp_path / "other"), "other", 0.4),)
        config.dataset.balance = 0.6 if name == "balance" else 0.0
        config.dataset.cache = name if name in ("memory", "disk") else ""
    for _ in range(2):  # the second time from the cache
        digest = hashlib.sha256()
        for batch in itertools.chain(batches_of(config, start_step=11), batches_of(config, start_step=13, host=1, hosts=2)):
            digest.update(batch["image"].tobytes() + batch["label"].tobytes())
        assert digest.hexdigest()[:16] == CHECKSUMS[name]


def test_with_augmentation_a_batch_contains_the_augmented_pairs(root):
    config = recipe(root, total_steps=3)
    data, read = pipeline.open_training(config), sources.open_source(config.dataset, "train").read
    for step, batch in enumerate(batches_of(config, data=data)):
        for i, position in enumerate(range(4 * step, 4 * step + 4)):
            params = augment.sample_augmentation(generator(config.seed, AUGMENT, position), config.augment)
            _, index = data.order[position]
            image, label = augment.apply_augmentation(*read(index), params, (40, 48), config.normalize.mean)
            np.testing.assert_array_equal(batch["image"][i], image)
            np.testing.assert_array_equal(batch["label"][i], label)


def test_the_element_spec_is_static(root):
    config = recipe(root)
    spec = pipeline.train_dataset(config, hosts=2).element_spec
    assert {key: (s.shape.as_list(), s.dtype.name) for key, s in spec.items()} == {
        "image": ([2, 40, 48, 3], "uint8"),
        "label": ([2, 40, 48], "uint8"),
    }
    assert pipeline.train_dataset(config, start_step=3).cardinality() == 11
    assert pipeline.eval_dataset(config, "val", host=1, hosts=2).cardinality() == 1


def test_an_epoch_includes_the_mixed_in_examples(mixed):
    data = pipeline.open_training(mixed)
    assert data.examples_per_epoch == 9  # 7 * 1.25
    assert [order for order in (data.order[position][0] for position in range(1000))].count(1) == 200


class Stripes(sources.Source):
    """A minimal custom source: only names, the number of classes and `load`."""

    num_classes = 4

    def __init__(self, wrong=None):
        self.names, self.wrong = [f"stripes {index}" for index in range(5)], wrong

    def load(self, index):
        if index == self.wrong:
            raise KeyError("no such record")
        return np.full((40, 48, 3), index, np.uint8), np.full((40, 48), index % 4, np.uint8)


def test_a_custom_source(root):
    config = recipe(root, augmented=False, batch_size=5, total_steps=2)
    data = pipeline.open_training(config, source=Stripes())
    for batch in batches_of(config, data=data):
        assert sorted(batch["image"][:, 0, 0, 0]) == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(batch["label"], batch["image"][..., 0] % 4)
    names = [example["name"] for example in pipeline.as_numpy(pipeline.eval_dataset(config, source=Stripes()))]
    assert names == Stripes().names
    with pytest.raises(UserError, match=r"stripes 3: cannot be loaded \('no such record'\)"):
        list(batches_of(config, data=pipeline.open_training(config, source=Stripes(wrong=3))))


def test_an_empty_custom_source_is_an_error_and_not_replaced_by_the_folder(root):
    empty = Stripes()
    empty.names = []
    with pytest.raises(UserError, match=r"split 'train' has no examples"):
        pipeline.open_training(recipe(root), source=empty)
    assert list(pipeline.as_numpy(pipeline.eval_dataset(recipe(root), "val", source=empty))) == []


def test_a_custom_source_with_another_number_of_classes_is_an_error(root):
    config = recipe(root)
    config.dataset.class_names = ("class 0", "class 1", "class 2")
    with pytest.raises(UserError, match=r"this source has 4 classes, but dataset.class_names has 3"):
        pipeline.open_training(config, source=Stripes())


@pytest.mark.parametrize("start", [1, 5, 13])
def test_a_resumed_run_makes_the_same_batches(root, start):
    config = recipe(root)
    whole = list(batches_of(config))
    assert len(whole) == 14
    assert_same(list(batches_of(config, start_step=start)), whole[start:])


def test_resuming_late_does_not_iterate_over_earlier_steps(root):
    config = recipe(root, total_steps=10**12)
    late = next(batches_of(config, start_step=10**12 - 1))
    assert late["image"].shape == (4, 40, 48, 3)
    assert list(batches_of(config, start_step=10**12)) == []


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_the_hosts_make_up_the_same_batches(root, hosts):
    config = recipe(root)
    shares = [batches_of(config, host=host, hosts=hosts) for host in range(hosts)]
    joined = [{key: np.concatenate([s[key] for s in step]) for key in step[0]} for step in zip(*shares, strict=True)]
    assert_same(joined, list(batches_of(config)))


def test_a_batch_may_be_larger_than_the_epoch(root):
    config = recipe(root, augmented=False, batch_size=16, total_steps=2)
    np.testing.assert_array_equal(epochs(config), epochs(recipe(root, augmented=False))[:4])


def test_augmentation_differs_between_epochs_and_examples(root):
    config = recipe(root, batch_size=COUNT, total_steps=2)
    first, second = batches_of(config)
    images = np.concatenate([first["image"], second["image"]])
    assert len({image.tobytes() for image in images}) == 2 * COUNT


def test_batch_must_be_a_multiple_of_the_hosts(root):
    with pytest.raises(ValueError, match=r"batch_size=4: expected a multiple of the number of hosts, 3"):
        batches_of(recipe(root), hosts=3)


@pytest.mark.parametrize("hosts", [1, 2, 5])
def test_evaluation_has_every_example_once(root, hosts):
    shares = [list(examples_of(recipe(root), "val", host=host, hosts=hosts)) for host in range(hosts)]
    assert [[e["name"] for e in share] for share in shares] == [
        [f"{index:03d}" for index in range(host, 3, hosts)] for host in range(hosts)
    ]
    for example in itertools.chain(*shares):
        image, label = fakes.pair("val", int(example["name"]))
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["label"], label)


@pytest.fixture
def unchecked(tmp_path, monkeypatch):
    """Returns a recipe that is checked only now, so that the files of example 002, also returned, can be damaged afterward."""
    config = recipe(fakes.write_folder(tmp_path, {"train": 3}), batch_size=2, total_steps=6)
    source = sources.open_source(config.dataset, "train")
    monkeypatch.setattr(pipeline, "open_source", lambda *_, **__: source)
    return config, tmp_path / "images/train/002.png", tmp_path / "labels/train/002.png"


def test_a_wrong_label_met_in_training_is_named(unchecked):
    config, _, label = unchecked
    fakes.write_image(label, np.full((40, 48), 17, np.uint8))
    with pytest.raises(ValueError, match=r"labels/train/002.png: label value 17 at 1920 pixels"):
        list(batches_of(config))
    with pytest.raises(ValueError, match=r"labels/train/002.png: label value 17 at 1920 pixels"):
        list(examples_of(config, "train"))


def test_a_temporary_read_failure_is_reported_in_one_sentence(unchecked, monkeypatch):
    config, image, _ = unchecked
    read, contents = sources.Files.read, image.read_bytes()
    monkeypatch.setattr(sources.Files, "read", lambda self, index: (image.write_bytes(contents), read(self, index))[1])
    image.unlink()
    with pytest.raises(
        UserError, match=r"an example could not be read \(.*, but a second attempt succeeded; run the same command"
    ):
        list(batches_of(config))


def test_elements_before_the_wrong_one_are_yielded(unchecked):
    config, image, _ = unchecked
    good = list(examples_of(config, "train"))[:2]
    image.unlink()
    examples = examples_of(config, "train")
    assert_same([next(examples), next(examples)], good)
    with pytest.raises(ValueError, match=r"images/train/002.png: no such file"):
        next(examples)


def test_an_error_that_no_check_explains_names_the_example(unchecked, monkeypatch):
    config, image, _ = unchecked
    monkeypatch.setattr(sources.Files, "check", lambda self, index: None)
    image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"/002.png or .*/002.png: cannot be loaded \(Input is empty\.\); replace it"):
        list(batches_of(config))


@pytest.fixture
def mixed(tmp_path):
    """Returns a recipe of two folders without augmentation, whose pairs are the fakes "train" and "other"."""
    config = recipe(fakes.write_folder(tmp_path / "one", {"train": COUNT}), augmented=False, batch_size=20, total_steps=50)
    other = fakes.write_folder(tmp_path / "two", {"other": 3})
    config.dataset.mixture = (("folder", str(other), "other", 0.25),)
    return config


def origins(config, **start):
    """Returns the (split, index) of every training example, found by its label."""
    keys = [("train", index) for index in range(COUNT)] + [("other", index) for index in range(3)]
    known = {fakes.pair(*key)[1].tobytes(): key for key in keys}
    return [known[label.tobytes()] for batch in batches_of(config, **start) for label in batch["label"]]


def test_datasets_are_mixed_by_weight(mixed):
    found = origins(mixed)
    assert len(found) == 1000
    assert sum(split == "other" for split, _ in found) == 200  # 0.25 of 1.25
    assert {index for split, index in found if split == "other"} == {0, 1, 2}
    assert origins(mixed, start_step=37) == found[37 * 20 :]
    halves = [origins(mixed, host=host, hosts=2) for host in range(2)]
    assert [key for s in range(50) for half in halves for key in half[10 * s : 10 * s + 10]] == found


def test_mixed_datasets_need_the_same_classes(mixed, tmp_path):
    (tmp_path / "one/classes.txt").write_text("a\nb\nc\nd\n")
    for names in ("A\nc\nb\nd\n", "a\n"):
        (tmp_path / "two/classes.txt").write_text(names)
        with pytest.raises(
            ValueError, match=r"class 1 of dataset.name='folder' at .*two' is .* but 'b' in dataset.class_names"
        ):
            batches_of(mixed)


def test_balance_shows_rare_classes_more_often(tmp_path):
    """Class 3 is in one of 7 labels, so in 1/7 of the examples; with balance 0.8, in 0.2/7 + 0.8 (1/4 + 3/28) of them."""
    root = fakes.write_folder(tmp_path / "files", {"train": COUNT})
    labels = [np.where(fakes.pair("train", i)[1] == 3, 2 if i else 3, fakes.pair("train", i)[1]) for i in range(COUNT)]
    for index, label in enumerate(labels):
        fakes.write_image(root / f"labels/train/{index:03d}.png", label.astype(np.uint8))
    config = recipe(root, augmented=False, batch_size=10, total_steps=100)
    config.dataset.cache_dir, config.dataset.balance = str(tmp_path / "cache"), 0.8
    batches = list(batches_of(config))
    share = np.mean([(label == 3).any() for batch in batches for label in batch["label"]])
    expected = 0.2 / 7 + 0.8 * (1 / 4 + 3 / 28)
    print(f"{share:.3f} of 1000 examples contain the rare class, expected {expected:.3f}")
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)
    assert_same(list(batches_of(config, start_step=80)), batches[80:])


def test_balance_needs_a_class_somewhere(tmp_path):
    config = recipe(fakes.write_folder(tmp_path, {"train": 1}))
    fakes.write_image(tmp_path / "labels/train/000.png", np.full((40, 48), 255, np.uint8))
    config.dataset.balance = 0.1
    with pytest.raises(ValueError, match=r"every pixel is 255, which is ignored"):
        pipeline.open_training(config)


def _until(condition):
    """Returns whether a condition becomes true within 5 seconds; Linux may list a thread briefly after its end."""
    return any(condition() or time.sleep(0.05) for _ in range(100))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
@pytest.mark.parametrize("end", ["close", "drop"])
def test_an_iterator_that_is_closed_or_dropped_leaves_no_thread(root, end):
    """The first use also starts a thread pool that TensorFlow keeps for all datasets."""

    def use():
        batches, examples = batches_of(recipe(root, total_steps=10**6)), examples_of(recipe(root), "train")
        next(batches), next(examples)
        during = len(os.listdir("/proc/self/task"))
        if end == "close":
            batches.close()
            examples.close()
        return during

    use()
    before = len(os.listdir("/proc/self/task"))
    assert max(use() for _ in range(5)) > before
    assert _until(lambda: len(os.listdir("/proc/self/task")) <= before)


def test_deleting_the_iterator_frees_its_objects(root):
    data = pipeline.open_training(recipe(root))
    reader = Reader(data.readers[0])
    data, reader = dataclasses.replace(data, readers=[reader]), weakref.ref(reader)
    batches = batches_of(recipe(root), data=data)
    next(batches)
    del data, batches
    assert _until(lambda: gc.collect() >= 0 and reader() is None)


class Reader:
    """Wraps a read function, and blocks on slow indices until released."""

    def __init__(self, read, slow=frozenset()):
        self.read, self.slow, self.release = read, slow, threading.Event()

    def __call__(self, index):
        if index in self.slow:
            self.release.wait(60)
        return self.read(index)


def test_a_ready_batch_does_not_wait_for_the_next(root):
    config = recipe(root, batch_size=1)
    data = pipeline.open_training(config)
    shown = [data.order[position][1] for position in range(COUNT)]
    reader = Reader(data.readers[0], slow={shown[2]})
    batches = batches_of(config, data=dataclasses.replace(data, readers=[reader]))
    began = time.monotonic()
    next(batches), next(batches)
    assert time.monotonic() - began < 30  # the third takes a minute
    reader.release.set()
    assert len(list(batches)) == 12


SLOW_SCENES = """
import time
from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, scenes

fast = scenes.scene
scenes.scene = lambda *arguments: (time.sleep(0.02), fast(*arguments))[1]
config = base_config()
config.dataset.name = "scenes"
config.batch_size = 2
batches = pipeline.as_numpy(pipeline.train_dataset(config))
next(batches)
"""


@pytest.mark.parametrize("end", ["", "del batches"])
def test_exiting_during_iteration_does_not_hang(end):
    done = subprocess.run([sys.executable, "-c", SLOW_SCENES + end], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, "Exception ignored" in done.stderr) == (0, False), done.stderr


MANY_BATCHES = """
import pathlib, sys
from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline

config = base_config()
config.dataset.root, config.batch_size, config.augment.crop = sys.argv[1], 4, (40, 48)


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


for step, batch in zip(range(2001), pipeline.as_numpy(pipeline.train_dataset(config))):
    if step in (500, 2000):
        print(resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the resident size as Linux gives it")
def test_memory_stays_flat_over_2000_batches(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 20}, size=(96, 128))
    done = subprocess.run(
        [sys.executable, "-c", MANY_BATCHES, str(root)], check=True, timeout=300, capture_output=True, text=True
    )
    warm, end = map(float, done.stdout.split())
    print(f"{warm:.1f} MB after 500 batches, {end:.1f} MB after 2000")
    assert end - warm < 8  # a leak of every 30 kB batch would be 45 MB
