"""Segmenting images from Python: kinds of input, the order and number of images read, and the contents of a result."""

import itertools
import math
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

from pspnet_jax.errors import UserError
from pspnet_jax.infer import draw
from pspnet_jax.infer.segmenter import AHEAD, Segmenter
from tests.infer.test_evaluate import INFO, STRONGEST, predictor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SIZES = ((40, 40), (36, 50), (80, 70), (40, 40), (20, 30))


def segmenter(devices=1, weights=STRONGEST, **fields):
    return Segmenter(predictor(devices, **fields), weights, INFO)


def picture(height, width, seed=0):
    """Returns random colors, each with a strongest channel."""
    return np.random.default_rng(seed).permuted(np.broadcast_to(np.uint8([10, 100, 200]), (height, width, 3)), axis=2)


@pytest.mark.parametrize("kind", ["array", "file name", "path", "PIL image", "opened file", "JAX array"])
def test_an_image_of_each_kind(kind, tmp_path):
    image = picture(30, 41)
    Image.fromarray(image).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as opened:
        given = {
            "array": image,
            "file name": str(tmp_path / "image.png"),
            "path": tmp_path / "image.png",
            "PIL image": Image.fromarray(image),
            "opened file": opened,
            "JAX array": jax.numpy.asarray(image),
        }
        result = segmenter()(given[kind])
    np.testing.assert_array_equal(result.labels, image.argmax(-1))
    np.testing.assert_array_equal(result.image, image)
    assert (result.labels.dtype, result.classes) == (np.uint8, ("red", "green", "blue", "never"))


def test_files_and_pillow_images_are_turned_upright_and_become_rgb(tmp_path):
    image, exif = picture(20, 30), Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    Image.fromarray(np.dstack([image, np.full((20, 30), 255, np.uint8)])).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        for given in (tmp_path / "turned.png", opened):
            np.testing.assert_array_equal(segmenter()(given).labels, np.rot90(image.argmax(-1), -1))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_several_images_keep_their_order(devices, kind):
    images = [picture(*size, seed) for seed, size in enumerate(3 * SIZES)]
    results = segmenter(devices)(kind(images))
    assert isinstance(results, list) == (kind is not iter)
    found = list(results)
    assert len(found) == len(images)
    for image, result in zip(images, found, strict=True):
        np.testing.assert_array_equal(result.labels, image.argmax(-1))


def test_an_iterator_may_close_and_reuse_its_images(tmp_path):
    images = [picture(33, 33, seed) for seed in range(4)]

    def reused():
        buffer = np.empty_like(images[0])
        for image in images:
            np.copyto(buffer, image)
            yield buffer

    def closed():
        for image in images:
            Image.fromarray(image).save(tmp_path / "image.png")
            with Image.open(tmp_path / "image.png") as opened:
                yield opened

    for iterator in (reused(), closed()):
        for image, result in zip(images, segmenter()(iterator), strict=True):
            np.testing.assert_array_equal(result.labels, image.argmax(-1))


def test_no_images_have_no_results():
    assert segmenter()([]) == list(segmenter()(iter([]))) == []


def test_an_iterator_without_end_is_read_a_little_ahead_and_nothing_is_kept():
    alive = set()

    def images():
        for number in itertools.count():
            image = picture(33, 33, number)
            alive.add(number)
            weakref.finalize(image, alive.discard, number)
            yield image

    results = segmenter()(images())
    for number in range(5 * AHEAD):
        assert (next(results).labels == picture(33, 33, number).argmax(-1)).all()
        assert len(alive) <= AHEAD + 16  # 16: those in the groups that are computed
    results.close()


def test_probabilities_confidence_and_entropy():
    """The network's logits are 10 times the channels' shares of 255, and -99 for the last class."""
    image = np.tile(np.uint8([255, 127, 0]), (20, 40, 1))
    result = segmenter()(image)
    exponentials = np.exp(np.array([10, 10 * 127 / 255, 0, -99]))
    expected = exponentials / exponentials.sum()
    probabilities = result.probabilities()
    assert (probabilities.shape, probabilities.dtype) == ((20, 40, 4), np.float32)
    np.testing.assert_allclose(probabilities, np.broadcast_to(expected, (20, 40, 4)), atol=1e-6)
    np.testing.assert_allclose(result.confidence.highest, expected[0], atol=1e-6)
    np.testing.assert_allclose(result.confidence.entropy, -(expected[:3] * np.log(expected[:3])).sum(), atol=1e-5)
    uniform = segmenter(weights=STRONGEST * 0)(image)
    np.testing.assert_allclose(uniform.confidence.entropy, math.log(4), atol=1e-5)


def test_labels_are_the_most_probable_classes_with_scales_and_flip():
    result = segmenter(scales=(0.5, 1.0), flip=True)(picture(60, 50))
    np.testing.assert_array_equal(result.labels, result.probabilities().argmax(-1))


def test_overlay_and_saved_labels(tmp_path):
    image = picture(20, 30)
    result = segmenter()(image)
    np.testing.assert_array_equal(np.asarray(result.overlay(0.25)), draw.overlay(image, image.argmax(-1), INFO.colors, 0.25))
    result.save(tmp_path / "new" / "labels.png")
    with Image.open(tmp_path / "new" / "labels.png") as saved:
        assert saved.mode == "P"
        np.testing.assert_array_equal(np.asarray(saved), image.argmax(-1))
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), np.array(INFO.colors)[image.argmax(-1)])
    with pytest.raises(UserError, match=r"labels\.jpg: labels are written as PNG; choose a name that ends in \.png"):
        result.save(tmp_path / "labels.jpg")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "an image is of type int; expected a path, a PIL image or an array"),
        ([picture(9, 9), None], "image 1: is of type NoneType; expected a path"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"image 0: an image is uint8\[2, 9, 9, 3\]: expected uint8\[height, width, 3\]"),
        (np.zeros((9, 9, 3)), r"image 0: an image is float64\[9, 9, 3\]"),
        ("nowhere.png", r"nowhere\.png: cannot be read as an image \(\[Errno 2\] No such file"),
        ("http://a/b.png", "http://a/b.png: cannot be read or written here"),
        (Image.new("I;16", (9, 9)), r"image 0: cannot be read \(it has uint16 pixels, but dataset.image_dtype"),
        (Image.new("CMYK", (9, 9)), r"image 0: cannot be read \(it is a CMYK image; convert it to RGB\)"),
    ],
)
def test_images_that_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        segmenter()(given)


def test_scores_that_are_not_finite_are_an_error_that_names_the_image():
    with pytest.raises(UserError, match=r"image 1: the network's scores are not finite \(NaN\)"):
        segmenter(network=lambda w, x: jax.numpy.where(x[..., :1] > 0.5, jax.numpy.nan, x @ w))(
            [np.zeros((33, 33, 3), np.uint8), np.full((33, 33, 3), 255, np.uint8)]
        )


def test_double_precision_changes_nothing():
    image = picture(60, 50)
    expected = segmenter(scales=(0.5, 1.0))(image)
    with jax.enable_x64(True):
        result = segmenter(scales=(0.5, 1.0))(image)
        assert result.probabilities().dtype == np.float32
        np.testing.assert_array_equal(result.labels, expected.labels)
        np.testing.assert_array_equal(result.probabilities(), expected.probabilities())
