"""Pictures of images with more bits or channels, or larger, than a browser shows well."""

import numpy as np
from PIL import Image

from pspnet_jax.analysis import pictures
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.infer import draw

INFO = DatasetInfo("two", ("red", "blue"), ((255, 0, 0), (0, 0, 255)))


def written(folder, image, truth, prediction, confidence):
    (folder / "pictures").mkdir()
    names = pictures.paths(7)
    pictures.write(folder, names, image, truth, prediction, confidence, INFO)
    assert names["error"] == "pictures/000007_error.png"
    return {kind: read(folder / path) for kind, path in names.items()}


def read(path):
    with Image.open(path) as picture:
        return picture.copy()


def test_what_pictures_show(tmp_path):
    image = np.broadcast_to(np.arange(0, 2**16, 2750, np.uint16)[:24, None], (16, 24, 5))
    truth, prediction = np.zeros((2, 16, 24), np.uint8)
    truth[8:], truth[:, :8], prediction[:, 12:] = 1, 255, 1
    confidence = np.tile(np.linspace(0.5, 1, 24, dtype=np.float32), (16, 1))
    found = written(tmp_path, image, truth, prediction, confidence)
    np.testing.assert_allclose(np.asarray(found["image"]), draw.to_rgb(image), atol=9)  # as JPEG
    assert found["truth"].getpixel((8, 15)) == 1
    assert found["prediction"].convert("RGB").getpixel((23, 0)) == (0, 0, 255)
    errors = np.asarray(found["error"].convert("RGB"))
    assert [tuple(errors[0, x]) for x in (0, 8, 12)] == [pictures.VOID, pictures.RIGHT, pictures.WRONG]
    brightness = np.asarray(found["confidence"].convert("L")).mean(0)
    assert brightness[-4:].mean() > brightness[:4].mean() + 50


def test_large_pictures_are_reduced_and_keep_class_indices(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_SIDE", 32)
    truth = np.tile(np.array([0, 1, 255, 1], np.uint8), (100, 12))
    found = written(tmp_path, np.zeros((100, 48, 3), np.uint8), truth, truth, np.ones((100, 48), np.float32))
    assert {picture.size for picture in found.values()} == {(15, 32)}
    assert set(np.asarray(found["truth"]).ravel()) <= {0, 1, 255}
