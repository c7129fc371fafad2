"""From image files to index, color and overlay files."""

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import image_files
from pspnet_jax.infer.draw import colorize, overlay
from pspnet_jax.infer.inputs import find_images
from pspnet_jax.infer.predict import predict
from tests.infer.test_evaluate import INFO, STRONGEST, predictor


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def test_a_folder_of_images_of_several_sizes(tmp_path):
    sizes = {"a.b": (40, 50), "c": (61, 35), "d": (9, 12)}
    blocks = np.kron(picture(4, 4), np.ones((16, 16, 1), np.uint8))  # JPEG keeps these
    images = {name: blocks[:height, :width] for name, (height, width) in sizes.items()}
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "in" / f"{name}.{'png' if name != 'c' else 'BMP'}")
    for other in ("notes.txt", ".hidden.png", "below/e.png"):
        (tmp_path / "in" / other).write_text("not for us")
    predict(predictor(), STRONGEST, find_images(tmp_path / "in"), tmp_path / "out", INFO)
    run = predictor()
    for name, image in images.items():
        height, width = image.shape[:2]
        label = np.asarray(run.labels(run.place(STRONGEST), [image]))[0, :height, :width]
        mode, index = read(tmp_path / "out" / "index" / f"{name}.png")
        assert mode == "L"
        np.testing.assert_array_equal(index, label)
        np.testing.assert_array_equal(read(tmp_path / "out" / "color" / f"{name}.png")[1], label)
        with Image.open(tmp_path / "out" / "color" / f"{name}.png") as color:
            np.testing.assert_array_equal(np.asarray(color.convert("RGB")), colorize(label, INFO.colors))
        mixed = read(tmp_path / "out" / "overlay" / f"{name}.jpg")[1].astype(int)
        assert abs(mixed - overlay(image, label, INFO.colors)).mean() < 3
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == sorted(
        [f"{name}.png" for name in images] * 2 + [f"{name}.jpg" for name in images]
    )


def test_one_file(tmp_path):
    Image.fromarray(picture(20, 30)).save(tmp_path / "one.webp", lossless=True)
    predict(predictor(), STRONGEST, find_images(tmp_path / "one.webp"), tmp_path / "out", INFO)
    assert read(tmp_path / "out" / "index" / "one.png")[1].shape == (20, 30)


def test_missing_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--input .*nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no images in this folder; expected files ending in \.bmp"):
        find_images(tmp_path)


def test_two_images_that_would_be_written_to_the_same_file(tmp_path):
    for name in ("a.jpg", "a.png"):
        Image.fromarray(picture(8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png would both be written as a\.png"):
        find_images(tmp_path)


@pytest.mark.parametrize("content", ["text", "truncated", "empty", "deep"])
def test_files_that_are_no_pictures_we_can_take(tmp_path, content):
    path = tmp_path / "bad.png"
    if content == "deep":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    else:
        Image.fromarray(picture(64, 64)).save(path)
        path.write_bytes({"text": b"hello", "truncated": path.read_bytes()[:500], "empty": b""}[content])
    with pytest.raises(ValueError, match=r"bad.png: cannot be read as an image \("):
        image_files.read(path)


def test_images_are_read_as_upright_rgb(tmp_path):
    stored = picture(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(image_files.read(tmp_path / "turned.png"), np.rot90(stored, -1))
    Image.fromarray(stored[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(image_files.read(tmp_path / "gray.png"), stored[..., [0, 0, 0]])
    Image.fromarray(np.dstack([stored, stored[..., 0]])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(image_files.read(tmp_path / "alpha.png"), stored)
