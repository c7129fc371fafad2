"""The built-in scenes: what tells boats from cars, what does not, and the same scenes through TFDS."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pspnet_jax.data import scenes
from pspnet_jax.data.scenes import BOAT, CAR, ROAD, WATER
from pspnet_jax.datasets import IGNORE, table


@pytest.fixture(scope="module")
def drawn():
    """300 scenes of the training split."""
    return [scenes.scene("train", index) for index in range(300)]


def twins(seed):
    """The scene with river and boats, and with road and cars."""
    return [scenes.draw(np.random.default_rng(seed), water) for water in (True, False)]


def test_classes_are_numbered_as_in_the_table():
    for number, name in enumerate(table("scenes").class_names):
        assert getattr(scenes, name.upper()) == number


def test_every_scene_is_another_and_always_the_same():
    some = [(split, index) for split in scenes.SPLITS for index in range(100)]
    first, again = ([scenes.scene(*which)[0].tobytes() for which in some] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(some)


@pytest.mark.parametrize(("split", "index"), [("val", 0), ("train", 2000), ("validation", 200), ("train", -1)])
def test_no_such_scene(split, index):
    with pytest.raises(ValueError, match=rf"no scene {index} in split '{split}'.*train 0\.\.1999, validation 0\.\.199"):
        scenes.scene(split, index)


def test_boats_have_a_river_and_cars_a_road(drawn):
    present = np.array([np.bincount(label.ravel(), minlength=256) > 0 for _, label in drawn])
    np.testing.assert_array_equal(present[:, BOAT], present[:, WATER])
    np.testing.assert_array_equal(present[:, CAR], present[:, ROAD])
    np.testing.assert_array_equal(present[:, BOAT], ~present[:, CAR])
    assert abs(present[:, BOAT].mean() - 0.5) < 0.12  # 4 standard deviations


@pytest.mark.parametrize("seed", range(50))
def test_boats_and_cars_differ_only_in_what_is_far_away(seed):
    """By the same chance, both kinds of scene are one picture but for river and road, at least 40 pixels from a vehicle."""
    (image, label), (other_image, other_label) = twins(seed)
    vehicle = label == BOAT
    np.testing.assert_array_equal(other_label == CAR, vehicle)
    np.testing.assert_array_equal(other_label == ROAD, label == WATER)
    same = ~vehicle & (label != WATER)
    np.testing.assert_array_equal(other_label[same], label[same])
    different = (image != other_image).any(axis=-1)
    assert not (different & (label != WATER)).any()
    offsets = np.argwhere(different)[:, None] - np.argwhere(vehicle)[None]
    assert np.square(offsets).sum(-1).min() >= 40**2


def test_boats_and_cars_look_alike_over_the_dataset(drawn):
    """Means over scenes of what a local view of a vehicle could tell: color, size, position, surroundings."""
    views = {BOAT: [], CAR: []}
    for image, label in drawn:
        kind = BOAT if (label == BOAT).any() else CAR
        rows, columns = np.nonzero(label == kind)
        ground = image[rows.max() + 1, columns.min() : columns.max()].mean()
        views[kind].append([*image[rows, columns].mean(axis=0), len(rows), rows.mean(), abs(columns.mean() - 63.5), ground])
    boats, cars = (np.array(view) for view in views.values())
    error = np.sqrt(boats.var(axis=0) / len(boats) + cars.var(axis=0) / len(cars))
    assert (np.abs(boats.mean(axis=0) - cars.mean(axis=0)) < 4 * error).all()


def test_shares_of_the_classes(drawn):
    """Percent of all pixels. Chosen by eye: everything is there to be learned, and things are small beside the ground."""
    counts = np.bincount(np.stack([label for _, label in drawn]).ravel(), minlength=256)
    percent = 100 * counts / counts.sum()
    classes = "sky water grass road pier boat car pole bird"
    low = dict(zip(classes.split(), (17, 2, 40, 2, 18, 1, 1, 0.6, 0.08), strict=True))
    high = dict(zip(classes.split(), (23, 4, 52, 4, 25, 2, 2, 1.2, 0.2), strict=True))
    for number, name in enumerate(table("scenes").class_names):
        assert low[name] < percent[number] < high[name], name
    assert 0.8 < percent[IGNORE] < 2


def test_tfds_builder_holds_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SPLITS", {"train": 6, "validation": 3})
    builder = tfds.builder("pspnet_scenes", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for split, size in scenes.SPLITS.items():
        examples = builder.as_data_source(split)
        assert len(examples) == size
        for index, example in enumerate(examples):
            image, label = scenes.scene(split, index)
            np.testing.assert_array_equal(example["image"], image)
            np.testing.assert_array_equal(example["label"][..., 0], label)
