"""The built-in scenes: what tells boats from cars, what does not, and the same scenes through TFDS."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pspnet_jax.data import scenes, tfds_source  # noqa: F401 -- registers pspnet_scenes
from pspnet_jax.data.scenes import BOAT, BOULDER, CAR, ROAD, SHEEP, WATER
from pspnet_jax.datasets import IGNORE, table


@pytest.fixture(scope="module")
def drawn():
    """300 scenes of the training split."""
    return [scenes.scene("train", index) for index in range(300)]


def halves(array):
    """The left and the right half of a picture, both from its edge to its middle."""
    return array[:, : scenes.WIDTH // 2], array[:, : scenes.WIDTH // 2 - 1 : -1]


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


def test_in_each_half_boats_have_a_river_and_cars_a_road(drawn):
    kinds = []
    for _, label in drawn:
        for half in halves(label):
            present = np.bincount(half.ravel(), minlength=256) > 0
            assert present[BOAT] == present[WATER] != present[CAR] == present[ROAD]
            assert present[SHEEP] != present[BOULDER]
            kinds.append((present[BOAT], present[SHEEP]))
    left, right = np.array(kinds[::2]), np.array(kinds[1::2])
    shares = np.mean([left, right, left == right], axis=(1,))  # in one half whatever the other is
    assert (np.abs(shares - 0.5) < 0.12).all()  # 4 standard deviations


@pytest.mark.parametrize("seed", range(25))
def test_a_vehicle_differs_only_in_what_is_far_away_in_its_half(seed):
    """With the same random numbers, only the river or road differs, which is 40 pixels or more from a vehicle."""
    boats = scenes.draw(np.random.default_rng(seed), (True, True), (True, True))
    for choices in (((False, True), (True, True)), ((True, True), (False, True))):
        cars = scenes.draw(np.random.default_rng(seed), *choices)
        own = 0 if not choices[0][0] else 1
        for side in (0, 1):
            (image, label), (other_image, other_label) = ([halves(array)[side] for array in each] for each in (boats, cars))
            if side != own:
                np.testing.assert_array_equal(image, other_image)
                np.testing.assert_array_equal(label, other_label)
                continue
            vehicle, way = label == BOAT, label == WATER
            np.testing.assert_array_equal(other_label == CAR, vehicle)
            np.testing.assert_array_equal(other_label == ROAD, way)
            different = (image != other_image).any(axis=-1)
            assert not (different & ~way).any()
            offsets = np.argwhere(different)[:, None] - np.argwhere(vehicle)[None]
            assert np.square(offsets).sum(-1).min() >= 40**2


@pytest.mark.parametrize("seed", range(25))
def test_sheep_differ_from_boulders_only_in_what_surrounds_them(seed):
    (image, label), (other_image, other_label) = (
        scenes.draw(np.random.default_rng(seed), (True, sheep), (True, True)) for sheep in (True, False)
    )
    ring = (label == IGNORE) | (other_label == IGNORE)
    np.testing.assert_array_equal(halves(other_label)[0] == BOULDER, halves(label)[0] == SHEEP)
    assert not ((image != other_image).any(axis=-1) & ~ring).any()


def test_shares_of_the_classes(drawn):
    """Percent of all pixels. Chosen by eye: everything is there to be learned, and things are small beside the ground."""
    counts = np.bincount(np.stack([label for _, label in drawn]).ravel(), minlength=256)
    percent = 100 * counts / counts.sum()
    classes = "sky water grass road pier boat car sheep boulder pole bird"
    low = dict(zip(classes.split(), (17, 2, 38, 2, 20, 0.9, 0.9, 0.3, 0.3, 1, 0.2), strict=True))
    high = dict(zip(classes.split(), (23, 3, 47, 3, 27, 1.5, 1.5, 0.6, 0.6, 2, 0.5), strict=True))
    for number, name in enumerate(table("scenes").class_names):
        assert low[name] < percent[number] < high[name], name
    assert 3 < percent[IGNORE] < 5


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
