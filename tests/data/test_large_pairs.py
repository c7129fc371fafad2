"""Training and the file check read large TIFFs by windows, with the same crops and findings as of whole files."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import tifffile

from pspnet_jax import large_files
from pspnet_jax.config import base_config
from pspnet_jax.data import checks, label_files, pipeline, sources, survey
from pspnet_jax.errors import UserError
from tests import fakes

READER = label_files.LabelReader({0: 0, 1: 1, 2: 2, 3: 3, 255: 255})


def write(root, split="train", count=2, size=(300, 280), **changes):
    """Writes `fakes.pair`s as TIFFs."""
    for index in range(count):
        image, label = fakes.pair(split, index, size)
        for folder, pixels in (("images", image), ("labels", changes.get("label", label))):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
            options = {"photometric": "rgb"} if pixels.ndim == 3 else {}
            path = root / folder / split / f"{index}.tif"
            tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", **options)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(large_files, "WHOLE", 50_000)
    config = base_config()
    config.dataset.root, config.dataset.cache_dir = str(tmp_path / "data"), str(tmp_path / "cache")
    config.augment.crop, config.batch_size, config.total_steps = (65, 49), 2, 4
    write(tmp_path / "data")
    return config


def test_batches_equal_those_of_whole_images(config, monkeypatch):
    data = pipeline.open_training(config)
    assert data.sources[0].by_windows
    assert not isinstance(data.readers[0](0)[0], np.ndarray)
    examples = [fakes.pair("train", index, (300, 280)) for index in range(2)]
    found = list(pipeline.as_numpy(pipeline.train_dataset(config, data=data)))
    monkeypatch.setattr(data.sources[0], "by_windows", False)
    whole = dataclasses.replace(data, readers=[examples.__getitem__])
    expected = pipeline.as_numpy(pipeline.train_dataset(config, data=whole))
    for ours, theirs in itertools.zip_longest(found, expected):
        for name in ("image", "label"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_examples_are_whole_in_evaluation_and_reduced_in_pictures(config, monkeypatch):
    monkeypatch.setattr(survey, "MAX_SIDE", 100)
    expected = [fakes.pair("train", index, (300, 280)) for index in range(2)]
    for example, pair in zip(pipeline.as_numpy(pipeline.eval_dataset(config, "train")), expected, strict=True):
        np.testing.assert_array_equal(example["image"], pair[0])
        np.testing.assert_array_equal(example["label"], pair[1])
    found = survey.survey(config.dataset, "train", 4, measure=True)
    assert (found.problems, found.sizes) == ([], {(300, 280): 2})
    assert found.pixels.tolist() == [sum((label == k).sum() for _, label in expected) for k in range(4)]
    np.testing.assert_allclose(found.moments[1], sum(image.sum((0, 1), dtype=float) for image, _ in expected))
    for example, (image, label) in zip(survey.samples(found, 2), expected, strict=True):
        np.testing.assert_array_equal(example["image"], image[::3, ::3])
        np.testing.assert_array_equal(example["label"], label[::3, ::3])


@pytest.mark.parametrize(("dtype", "photometric"), [(bool, "minisblack"), (bool, "miniswhite"), (np.float32, "minisblack")])
def test_a_window_of_a_label_has_the_values_of_the_whole_file(tmp_path, dtype, photometric):
    label = (fakes.pair("train", 0, (300, 280))[1] % 2).astype(dtype)
    path = tmp_path / "0.tif"
    tifffile.imwrite(path, label, photometric=photometric, tile=(64, 64))
    np.testing.assert_array_equal(READER.read(str(path), "", path.read_bytes()), label)
    np.testing.assert_array_equal(checks.open_large_label(str(path), READER)[7:200, 9:99], label[7:200, 9:99])


def test_the_check_names_what_is_wrong(config, tmp_path):
    root = tmp_path / "data"
    label = np.full((300, 280), 3, np.uint8)
    label[299, 279] = 4
    write(root, "values", 1, label=label)
    with pytest.raises(UserError, match=r"values/0.tif: label value 4 at 1 pixels, expected 0..3 for 4 classes"):
        sources.open_source(config.dataset, "values")
    source = sources.open_source(config.dataset, "values", check=False)
    _, label = source.read(0)
    assert label[0:2, 3:5].tolist() == [[3, 3], [3, 3]]
    with pytest.raises(UserError, match=r"values/0.tif: label value 4 at 1 pixels"):
        label[290:300, 270:280]
    colors = label_files.LabelReader({(0, 0, 0): 0, (255, 0, 0): 1})
    palette = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}
    tifffile.imwrite(root / "palette.tif", np.zeros((64, 64), np.uint8), tile=(64, 64), **palette)
    with pytest.raises(UserError, match=r"palette.tif: is a PALETTE TIFF; convert it"):
        checks.open_large_label(str(root / "palette.tif"), colors)
    write(root, "sizes", 1, label=np.zeros((280, 300), np.uint8))
    with pytest.raises(UserError, match=r"labels/sizes/0.tif: is 300x280, but its image .*images/sizes/0.tif is 280x300"):
        sources.open_source(config.dataset, "sizes")
    write(root, "damaged", 1)
    path = root / "images/damaged/0.tif"
    contents = bytearray(path.read_bytes())
    contents[2000:2100] = bytes(100)
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"images/damaged/0.tif: cannot be read \(.*\); replace it"):
        sources.open_source(config.dataset, "damaged")


def test_label_maps_of_large_files(config, tmp_path):
    """Colors and 16-bit values, which the map replaces; a PNG label is read as a whole."""
    _, label = fakes.pair("train", 0, (300, 280))
    colors = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (9, 9, 9), *[(1, 2, 3)] * 252], np.uint8)
    config.dataset.label_map = "{(0, 0, 0): 'a', (255, 0, 0): 'b', (0, 255, 0): 'c', (9, 9, 9): 'd', 300: 'd', (1, 2, 3): None}"
    write(tmp_path / "data", "colors", 1, label=colors[label])
    write(tmp_path / "data", "values", 1, label=np.full((300, 280), 300, np.uint16))
    for split, expected in (("colors", label), ("values", np.full((300, 280), 3))):
        _, found = sources.open_source(config.dataset, split).read(0)
        np.testing.assert_array_equal(found[10:90, 200:280], expected[10:90, 200:280])
    config.dataset.label_map = ""
    (tmp_path / "data/labels/train/0.tif").unlink()
    fakes.write_image(tmp_path / "data/labels/train/0.png", label)
    (tmp_path / "data/labels/train/1.tif").unlink()
    (tmp_path / "data/images/train/1.tif").unlink()
    image, found = sources.open_source(config.dataset, "train").read(0)
    assert isinstance(image, large_files.LargeTiff)
    np.testing.assert_array_equal(found, label)


def test_the_check_does_not_hold_a_whole_file(config, tmp_path):
    """Of 17 MB of pixels and 6 MB of labels, on all threads."""
    image = np.kron(np.arange(225, dtype=np.uint8).reshape(15, 15, 1), np.ones((160, 160, 3), np.uint8))
    for folder, pixels in (("images", image), ("labels", image[..., 0] % 4)):
        options = {"photometric": "rgb"} if pixels.ndim == 3 else {}
        tifffile.imwrite(tmp_path / f"{folder}.tif", pixels, tile=(64, 64), compression="zlib", **options)
    tracemalloc.start()
    found = checks.check_pair(str(tmp_path / "images.tif"), str(tmp_path / "labels.tif"), 4, True, None, reader=READER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pixels[:4].tolist() == np.bincount((image[..., 0] % 4).ravel()).tolist()
    assert peak < 12_000_000
