"""Large TIFFs are predicted block by block, with the labels of the whole image."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

from pspnet_jax.errors import UserError
from pspnet_jax.infer import large
from pspnet_jax.infer.draw import overlay
from pspnet_jax.infer.inputs import find_images
from pspnet_jax.infer.plan import Axis, window_starts
from pspnet_jax.infer.predict import predict
from pspnet_jax.infer.segmenter import Segmenter
from tests.infer.test_evaluate import INFO, STRONGEST, predictor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def contextual(weights, windows):
    """Scores that depend on a pixel's place in the window and on all other pixels, so that each window counts."""
    places = jnp.arange(windows.shape[1])[:, None] + 2 * jnp.arange(windows.shape[2])
    ramp = jnp.stack([jnp.sin(places), jnp.cos(places), jnp.sin(places / 7)], -1)
    return (windows + 0.3 * ramp + windows.mean((1, 2), keepdims=True)) @ weights


@pytest.fixture
def limit(monkeypatch):
    """TIFFs are large, and blocks have at most 80x80 pixels."""
    monkeypatch.setattr(large, "needs_blocks", lambda path: path.suffix == ".tif")
    monkeypatch.setattr(large, "MAX_BLOCK", 80 * 80 * 4 * (INFO.num_classes + 2 * 3))


def write(folder, height, width, **options):
    """Writes a smooth random image as NAME.tif and returns it."""
    folder.mkdir(exist_ok=True)
    coarse = np.random.default_rng(height).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
    tifffile.imwrite(folder / "a.tif", image, photometric="rgb", tile=(64, 64), **options)
    return image


@pytest.mark.parametrize(
    ("size", "devices", "fields"),
    [
        ((157, 201), 2, {"flip": True, "stride": (11, 20)}),
        ((20, 200), 1, {"protocol": "mmseg"}),
    ],
)
def test_labels_equal_those_of_the_whole_image(tmp_path, limit, size, devices, fields):
    image = write(tmp_path / "in", *size, compression="zlib")
    segmenter = Segmenter(predictor(devices, contextual, **fields), STRONGEST, INFO)
    predict(segmenter, find_images(tmp_path / "in"), tmp_path / "out")
    found = tifffile.imread(tmp_path / "out/index/a.tif")
    expected = segmenter(image)
    assert len(np.unique(expected.labels)) == 3
    np.testing.assert_array_equal(found, expected.labels)
    with Image.open(tmp_path / "out/overlay/a.jpg") as picture:
        difference = np.abs(np.asarray(picture, int) - overlay(image, expected.labels, INFO.colors))
    assert difference.mean() < 3  # JPEG


def test_images_that_pillow_refuses_are_large(tmp_path, monkeypatch):
    write(tmp_path, 100, 100)
    for limit, expected in ((5000, False), (4999, True), (None, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert large.needs_blocks(tmp_path / "a.tif") == expected


@pytest.mark.parametrize("stride", [0, 5, 33])
@pytest.mark.parametrize("size", [10, 33, 34, 100, 257])
def test_blocks_provide_each_pixel_once_with_all_windows_over_it(size, stride):
    starts = window_starts(max(size, 33), 33, stride)
    axis = Axis(size, size, False, max(size, 33), 0, 33, starts)
    blocks = list(large.split(axis, 80))
    assert [pixel for own, _ in blocks for pixel in range(own.start, own.stop)] == list(range(size))
    for own, read in blocks:
        assert read.stop - read.start <= 80
        inside = [start for start in starts if start >= read.start and min(start + 33, size) <= read.stop]
        assert [start - read.start for start in inside] == window_starts(max(read.stop - read.start, 33), 33, stride)
        assert all(start in inside for start in starts if start < own.stop and start + 33 > own.start)


def test_overlays_are_reduced_and_finished_images_skipped(tmp_path, limit, monkeypatch):
    """Every second row and column of a picture in pure colors, whose labels are those colors."""
    monkeypatch.setattr(large, "MAX_OVERLAY", 70)
    image = 255 * np.eye(3, dtype=np.uint8)[np.random.default_rng(0).integers(0, 3, (12, 11))]
    image = np.kron(image, np.ones((10, 10, 1), np.uint8))[:115, :105]
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/a.tif", image, photometric="rgb", tile=(64, 64))
    segmenter, paths, output = Segmenter(predictor(), STRONGEST, INFO), find_images(tmp_path / "in"), tmp_path / "out"
    predict(segmenter, paths, output)
    with Image.open(output / "overlay/a.jpg") as picture:
        assert picture.size == (53, 58)
        assert (np.asarray(picture).argmax(-1) == image[::2, ::2].argmax(-1)).mean() > 0.99
    first = segmenter.predictor.windows
    predict(segmenter, paths, output, skip_existing=True)
    assert segmenter.predictor.windows == first
    (output / "overlay/a.jpg").unlink()
    predict(segmenter, paths, output, skip_existing=True)
    assert segmenter.predictor.windows == 2 * first


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"base_size": 512, "scales": (0.5, 1.0)}, "--config.eval.scales=1.0 --config.eval.base_size=0"),
        ({"inference": "whole"}, "--config.eval.inference=windows"),
        ({"protocol": "caffe"}, "--config.eval.protocol=semseg"),
        ({"protocol": "mmseg", "flip": True}, "--config.eval.flip=False"),
    ],
)
def test_settings_that_scale_the_image_are_refused(tmp_path, limit, fields, flags):
    write(tmp_path / "in", 100, 100)
    with pytest.raises(UserError, match=rf"a.tif: 100x100 pixels are predicted in blocks of the original size; set {flags}\n"):
        predict(Segmenter(predictor(**fields), STRONGEST, INFO), find_images(tmp_path / "in"), tmp_path / "out")


def test_memory_does_not_depend_on_the_number_of_rows(tmp_path, limit, monkeypatch):
    """Of NumPy and Python; 3,200 rows have 1.4 MB of pixels and 0.5 MB of labels."""
    monkeypatch.setattr(large, "MAX_OVERLAY", 70)
    network = Segmenter(predictor(stride=(33, 33), batch_size=16), STRONGEST, INFO)
    peaks = []
    for height in (1600, 1600, 3200):  # the first time, programs are compiled
        write(tmp_path / "in", height, 150, compression="zlib")
        tracemalloc.start()
        predict(network, find_images(tmp_path / "in"), tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 300_000
