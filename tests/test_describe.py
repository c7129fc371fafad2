"""--mode check --input: a folder becomes a recipe, which reads its labels as they are meant."""

import re

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import config as configs
from pspnet_jax import main
from pspnet_jax.data import label_values, sources

HALF = np.repeat([[0], [1]], 8, axis=0).repeat(16, axis=1).astype(np.uint8)  # the upper half 0, the lower half 1


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def check(folder, recipe):
    return main.main(["--mode", "check", "--input", str(folder), "--output", str(recipe)])


def labels_by(recipe):
    """Returns the class names of a recipe, and the labels of both splits as it reads them."""
    config = configs.load_recipe(str(recipe))
    splits = [config.dataset.train_split, config.eval.split]
    opened = [sources.open_source(config.dataset, split, channels=config.model.channels) for split in splits]
    return config, [source.read(i)[1] for source in opened for i in range(len(source))]


def test_gray_values_with_a_void_border(tmp_path):
    values = np.where(HALF == 1, 7, 3).astype(np.uint8)
    values[0] = 255
    for i in range(6):
        write(tmp_path / f"data/pics/{i}.jpg", photo(i))
        write(tmp_path / f"data/gt/{i}_gt.png", values)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.images, config.dataset.labels) == ("pics/{name}.jpg", "gt/{name}_gt.png")
    assert len(labels) == 6
    expected = HALF.copy()
    expected[0] = 255  # ignored
    assert all((label == expected).all() for label in labels)
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.width > 400
    assert check(tmp_path / "data", tmp_path / "made.py") == 0  # nothing has changed
    (tmp_path / "made.py").write_text("mine")
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert (tmp_path / "made.py").read_text() == "mine"


def test_colors_are_named_by_a_list(tmp_path):
    colors = np.array([(128, 0, 0), (0, 0, 0)], np.uint8)
    for split in ("train", "val"):
        write(tmp_path / f"data/{split}/a.png", photo(0))
        write(tmp_path / f"data/{split}_labels/a_L.png", colors[HALF])
    (tmp_path / "data/class_dict.csv").write_text("name,r,g,b\nroad,128,0,0\nsky,0,0,0\n")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert config.dataset.label_map == "{(0, 0, 0): 'sky', (128, 0, 0): 'road'}"
    assert all((label == 1 - HALF).all() for label in labels)


def test_binary_labels_saved_as_jpeg_are_thresholded(tmp_path):
    for i in range(6):
        write(tmp_path / f"data/images/{i}.jpg", photo(i))
        noise = np.random.default_rng(i).integers(0, 9, HALF.shape).astype(np.uint8)
        write(tmp_path / f"data/masks/{i}.jpg", np.where(HALF, 255 - noise, noise).astype(np.uint8))
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert all((label == HALF).all() for label in labels_by(tmp_path / "made.py")[1])


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        ([], "it holds no files"),
        (["images/1.png", "masks/001.png"], "images/1.png and masks/001.png differ in the zeros before a number"),
        (["a/1.png", "b/1.png"], "has .* values or colors, as a photo has"),
    ],
)
def test_without_pairs_there_is_no_recipe(tmp_path, capsys, paths, sentence):
    (tmp_path / "data").mkdir()
    for i, path in enumerate(paths):
        write(tmp_path / "data" / path, photo(i))
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/data: no pairs of images and labels found")
    assert re.search(sentence, error)
    assert not (tmp_path / "made.py").exists()


def test_ambiguous_values_are_kept_with_a_remark():
    def read(shares, texts=()):
        return [(entry.key, entry.name, "GUESS" in entry.remark) for entry in label_values.entries(shares, dict(texts))]

    assert read({0: 0.5, 255: 0.5}) == [(0, "class_0", False), (255, "class_255", False)]
    assert read({0: 0.5, 1: 0.2, 2: 0.3}) == [(0, "class_0", True), (1, "class_1", False), (2, "class_2", False)]
    assert read({0: 0.5, 1: 0.2, 255: 0.3}) == [(0, "class_0", False), (1, "class_1", False), (255, None, True)]
    assert read({0: 1.0}) == [(0, "class_0", False), (1, "class_1", False)]
    listed = {"classes.txt": "building\ntree\n"}
    assert read({1: 0.5, 2: 0.5}, listed.items()) == [(1, "building", False), (2, "tree", False)]  # counted from 1
    colors = {"class_dict.csv": "name,r,g,b\nfield,0,0,0\nroad,255,255,255\n"}
    assert read({0: 0.5, 255: 0.5}, colors.items()) == [(0, "field", False), (255, "road", False)]
    assert read({1: 0.5, 3: 0.5}, listed.items()) == [(1, "class_1", False), (3, "class_3", False)]  # the list does not fit
