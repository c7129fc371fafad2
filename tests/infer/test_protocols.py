"""Each protocol against its transcription to NumPy, with a network that depends on orientation and position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.protocols import PROTOCOLS
from tests.infer import reference

pytestmark = pytest.mark.slow

SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def settings(**fields):
    config = base_config()
    config.eval.update({"crop": (11, 9), "base_size": 20, "scales": (1.0,), "batch_size": 4, "flip": True} | fields)
    return config


def make(protocol, **fields):
    return PROTOCOLS[protocol](settings(**fields))


def difference(image, config):
    """Returns the largest difference in probability from the transcription, after checking that the classes agree."""
    protocol = config.eval.protocol
    predictor = Predictor(lambda _, x: reference.network(x, jnp), config, reference.CLASSES, jax.devices()[:1])
    ours = np.asarray(predictor.probabilities({}, [image]))[0, : image.shape[0], : image.shape[1]]
    labels = np.asarray(predictor.labels({}, [image]))[0, : image.shape[0], : image.shape[1]]
    expected = getattr(reference, protocol)(reference.network, image, config)
    first, second = np.sort(expected, -1)[..., [-1, -2]].T
    clear = (first - second).T > 1e-4
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(labels[clear], expected.argmax(-1)[clear])
    return np.abs(ours - expected).max()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((10, 16), {"flip": False}),
        ((16, 10), {}),  # tall; at long side 20, the short side is 12.5
        ((5, 33), {}),  # wide: shorter than the crop
        ((13, 13), {"scales": (0.375,)}),  # smaller than the crop on both sides, odd padding, 7.5
        ((14, 18), {"scales": SIX}),
        ((14, 18), {"scales": SIX, "flip": False}),
        ((33, 20), {"base_size": 50, "crop": (45, 20)}),  # windows of one strip and a half
        ((50, 41), {"stride": (5, 8)}),  # scaled down by more than 2
        ((9, 31), {"inference": "whole", "scales": (0.7, 1.0)}),
    ],
)
def test_protocol_equals_its_transcription(protocol, size, fields):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = difference(image, settings(protocol=protocol, **fields))
    print(f"{protocol} {size} {fields}: {found:.1e}")
    assert found < 1e-5


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((14, 18), {"base_size": 0, "scales": SIX}),  # multiples of the image's own sides
        ((30, 17), {"base_size": 33, "short_size": 15, "scales": (0.5, 1.0)}),  # the second bound decides
        ((6, 31), {"stride": (11, 9), "batch_size": 64}),  # windows shrunk to the image on one axis, several on the other
    ],
)
@pytest.mark.parametrize("align_corners", [True, False])
def test_mmseg_sizes_and_corners_equal_their_transcription(size, fields, align_corners):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    config = settings(protocol="mmseg", **fields)
    config.model.align_corners = align_corners
    found = difference(image, config)
    print(f"{size} {fields} align_corners {align_corners}: {found:.1e}")
    assert found < 1e-5


@pytest.mark.parametrize(
    ("protocol", "size", "fields", "scale", "scaled"),
    [
        ("semseg", (360, 480), {"base_size": 512}, 1.0, (384, 512)),
        ("semseg", (480, 360), {"base_size": 512}, 1.75, (896, 672)),
        ("semseg", (1024, 2048), {"base_size": 2048}, 0.5, (512, 1024)),
        ("semseg", (333, 500), {"base_size": 512}, 1.0, (341, 512)),  # 340.992
        ("semseg", (360, 480), {"base_size": 0}, 1.25, (450, 600)),
        ("semseg", (5, 8), {"base_size": 20}, 0.625, (8, 12)),  # 12.5 to the even 12; 7.5 to the even 8
        ("semseg", (2, 500), {"base_size": 500}, 0.1, (1, 50)),  # 0.2 rounds to 0, which is no size
        ("caffe", (360, 480), {"base_size": 512}, 1.0, (385, 513)),  # 384.75
        ("caffe", (480, 360), {"base_size": 512}, 0.5, (257, 193)),  # 192.75
        ("caffe", (5, 10), {"base_size": 4}, 1.0, (3, 5)),  # 2.5 away from zero
        ("caffe", (7, 7), {"base_size": 473}, 0.75, (356, 356)),  # 355.75, rounded and rounded up
        ("caffe", (7, 14), {"base_size": 473}, 0.5, (119, 238)),  # 237.5 rounded up; 118.75
        ("caffe", (207, 322), {"base_size": 512}, 0.75, (247, 385)),  # 247.5 is 247.49998 in single precision
        ("mmseg", (1024, 2048), {"base_size": 2048, "short_size": 1024}, 1.0, (1024, 2048)),
        ("mmseg", (512, 683), {"base_size": 2048, "short_size": 512}, 1.0, (512, 683)),
        ("mmseg", (683, 2800), {"base_size": 2048, "short_size": 512}, 1.0, (500, 2048)),  # 499.58
        ("mmseg", (300, 400), {"base_size": 2048, "short_size": 0}, 1.0, (1536, 2048)),
        ("mmseg", (300, 400), {"base_size": 2049, "short_size": 1025}, 0.5, (512, 683)),  # bounds 1024 and 512
        ("mmseg", (3, 7), {"base_size": 0}, 0.5, (2, 4)),  # bounds 4 and 2, factor 4 / 7; 1.714
    ],
)
def test_scaled_size_by_hand(protocol, size, fields, scale, scaled):
    assert make(protocol, **fields).scaled_size(*size, scale) == scaled


@pytest.mark.parametrize("size", [(360, 480, 181, 241), (7, 300, 450, 3), (200, 120, 201, 121), (1, 5, 9, 1), (64, 48, 32, 24)])
def test_images_are_scaled_as_opencv_does(size):
    """mmseg exactly, against cv2's integer arithmetic; semseg in floating point, to a thousandth of a gray level."""
    height, width, new_height, new_width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exact = make("mmseg").scale(image, new_height, new_width)
    np.testing.assert_array_equal(exact, reference.cv2_8bit(image, new_height, new_width))
    floating = make("semseg").scale(image, new_height, new_width)
    assert floating.dtype == np.float32
    np.testing.assert_allclose(floating, reference.interpolate(image.astype(float), new_height, new_width), atol=1e-3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_images_of_other_numbers_of_channels_are_scaled_channel_by_channel(protocol, channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 14, channels), dtype=np.uint8)
    scaled = make(protocol).scale(image, 12, 20)
    for channel in range(channels):
        three = make(protocol).scale(image[..., [channel] * 3], 12, 20)
        np.testing.assert_allclose(scaled[..., channel], three[..., 0], atol=1e-3)  # sums in another order


def test_images_are_scaled_as_imresize_does():
    """Values are rounded after each axis, starting with the axis that shrinks most.

    From 3 x 2 pixels to 1 x 1, rows come first, and 1/3 becomes 0; transposed, columns come first. From 2 x 2 to 1 x 1, rows
    come first: 1/2 becomes 1, and then the mean of 1 and 0 becomes 1 again.
    """
    caffe = make("caffe")
    image = np.dstack([np.array([[0, 1], [1, 0], [0, 0]], np.uint8)] * 3)
    assert caffe.scale(image, 1, 1).tolist() == [[[0, 0, 0]]]
    assert caffe.scale(image.transpose(1, 0, 2), 1, 1).tolist() == [[[0, 0, 0]]]
    assert caffe.scale(np.dstack([np.array([[0, 1], [0, 0]], np.uint8)] * 3), 1, 1).tolist() == [[[1, 1, 1]]]
    image = np.random.default_rng(0).integers(0, 256, (23, 40, 3), dtype=np.uint8)
    for size in ((12, 21), (10, 39), (47, 81), (23, 40), (30, 11)):
        np.testing.assert_array_equal(caffe.scale(image, *size), reference.imresize(image, *size))


def test_flips_are_combined_by_hand():
    """Two pixels, two classes. The logits (log 3, 0) give (3/4, 1/4). The flipped image has its pixels in reverse order."""
    log3 = np.log(3)
    logits, flipped = np.array([[log3, 0], [0, 0]]), np.array([[0, log3], [log3, 0]])
    semseg, caffe = make("semseg").combine_flip, make("caffe").combine_flip
    np.testing.assert_allclose(semseg(logits), [[3 / 4, 1 / 4], [1 / 2, 1 / 2]], rtol=1e-6)
    np.testing.assert_allclose(semseg(logits, flipped), [[3 / 4, 1 / 4], [3 / 8, 5 / 8]], rtol=1e-6)
    np.testing.assert_allclose(caffe(logits), [[3 / 4, 1 / 4], [1 / 2, 1 / 2]], rtol=1e-6)
    np.testing.assert_allclose(caffe(logits, flipped), [[9 / 10, 1 / 10], [1 / 4, 3 / 4]], rtol=1e-6)


def test_large_logits_do_not_overflow():
    """exp(100) is infinite in MATLAB's single precision; ours returns the limit."""
    np.testing.assert_array_equal(make("caffe").combine_flip(np.array([[200.0, 0.0]]), np.array([[200.0, 0.0]])), [[1, 0]])


def test_caffe_normalizes_the_scores_of_a_pixel_to_sum_to_one():
    scores = make("caffe").finalize_scores(jnp.array([[0.2, 0.6], [0.0, 0.0]]))
    np.testing.assert_allclose(scores, [[0.25, 0.75], [0, 0]], rtol=1e-6)
