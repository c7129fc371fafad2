"""Augmentation equals its definition, step by step in NumPy, and labels stay aligned with their images."""

import cv2
import numpy as np
import pytest
import tifffile
from numpy.lib.stride_tricks import sliding_window_view

from pspnet_jax.config import base_config
from pspnet_jax.data.augment import AugmentationParams, apply_augmentation, sample_augmentation
from pspnet_jax.data.order import AUGMENT, generator
from pspnet_jax.datasets import IGNORE
from pspnet_jax.large_files import LargeTiff
from tests import fakes

MEAN = (123.675, 116.28, 103.53)
FILL = np.array([124, 116, 104])


def params(scale=1.0, degrees=0.0, blur=False, flip=False, offset=(0.0, 0.0)) -> AugmentationParams:
    return AugmentationParams(scale, degrees, blur, flip, np.array(offset))


def fused(image, label, parameters, crop):
    return apply_augmentation(image, label, parameters, crop, MEAN)


def bilinear(image, y, x):
    """Returns the values of float[H,W,3] at the points (y, x), with replicated edges."""
    height, width, _ = image.shape
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    v, u = (y - top)[..., None], (x - left)[..., None]
    above = (1 - u) * image[top, left] + u * image[top, right]
    return (1 - v) * above + v * ((1 - u) * image[bottom, left] + u * image[bottom, right])


def nearest(label, y, x):
    height, width = label.shape
    clipped = [np.clip(np.floor(p + 0.5).astype(int), 0, n - 1) for p, n in ((y, height), (x, width))]
    return label[clipped[0], clipped[1]]


def turn(height, width, degrees):
    """Returns the source point of each pixel after a counterclockwise rotation (y points down)."""
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return cos * y + sin * x + (height - 1) / 2, -sin * y + cos * x + (width - 1) / 2


def canvas(label, scale):
    return tuple(max(round(n * scale), 1) for n in label.shape)


def at_once(image, label, scale, degrees, flip=False):
    """Returns the whole flipped canvas without blur, from one affine map, and its points' distances from a rounding tie."""
    y, x = ((p + 0.5) / scale - 0.5 for p in turn(*canvas(label, scale), degrees))
    if flip:
        y, x = y[:, ::-1], x[:, ::-1]
    height, width = label.shape
    outside = (y < -0.5) | (y >= height - 0.5) | (x < -0.5) | (x >= width - 0.5)
    if not degrees:
        outside[:] = False
    pixels = np.where(outside[..., None], FILL, bilinear(image.astype(float), y, x))
    tie = np.minimum(abs(y - np.floor(y) - 0.5), abs(x - np.floor(x) - 0.5))
    return pixels, np.where(outside, IGNORE, nearest(label, y, x)), tie


def step_by_step(image, label, parameters, crop):
    """Applies the five steps in augment.py's docstring one by one to the whole canvas, in float64 and without rounding."""
    scale, degrees, blur, flip, offset, _ = parameters
    height, width = canvas(label, scale)
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5
    image, label = bilinear(image.astype(float), y, x), nearest(label, y, x)
    if degrees:
        y, x = turn(height, width, degrees)
        covered = (y >= -0.5) & (y < height - 0.5) & (x >= -0.5) & (x < width - 0.5)
        image, label = (
            np.where(covered[..., None], bilinear(image, y, x), FILL),
            np.where(covered, nearest(label, y, x), IGNORE),
        )
    if blur:
        kernel = np.array([1, 4, 6, 4, 1])
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
        parts = [kernel[i] * kernel[j] * padded[i : i + height, j : j + width] for i in range(5) for j in range(5)]
        image = sum(parts) / kernel.sum() ** 2
    if flip:
        image, label = image[:, ::-1], label[:, ::-1]
    missing = [max(c - n, 0) for c, n in zip(crop, (height, width), strict=True)]
    around = [(n // 2, n - n // 2) for n in missing]
    pixels = np.empty((height + missing[0], width + missing[1], 3))
    pixels[:] = FILL
    pixels[around[0][0] :][:height, around[1][0] :][:, :width] = image
    classes = np.pad(label, around, constant_values=IGNORE)
    top, left = (int(o * (n - c + 1)) for o, n, c in zip(offset, classes.shape, crop, strict=True))
    return pixels[top:, left:][: crop[0], : crop[1]], classes[top:, left:][: crop[0], : crop[1]]


def assert_rounded(pixels, exact, error=0.03):
    """Asserts that uint8 pixels are rounded from values within `error` of the exact ones."""
    worst = np.abs(pixels - exact).max()
    print(f"error before rounding {worst - 0.5:.4f} gray levels; {(pixels != exact.round()).mean():.2%} round differently")
    assert worst <= 0.5 + error


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 19, (height, width), np.uint8)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (0.513, (0.0, 0.0)),  # canvas 31 x 47: padding on all sides, one pixel more below than above
        (0.813, (0.99, 0.4)),  # canvas 49 x 74: padding above and below
        (1.0, (0.999, 0.999)),
        (1.0, (0.3, 0.6)),
        (1.371, (0.0, 0.0)),  # the crop meets the canvas' corner, where the blur is reflected
        (1.993, (0.98, 0.999)),  # one pixel of the blur's margin remains below, none on the right
        (2.0, (0.5, 0.5)),
    ],
)
def test_scale_blur_flip_crop_equal_the_definition(scale, offset, flip, blur):
    image, label = noise(60, 91)
    parameters = params(scale, 0.0, blur, flip, offset)
    pixels, classes = fused(image, label, parameters, (52, 57))
    expected_pixels, expected_classes = step_by_step(image, label, parameters, (52, 57))
    np.testing.assert_array_equal(classes, expected_classes)
    assert_rounded(pixels, expected_pixels)


def blocks(height, width, side=14, classes=9):
    """Returns uint8[H,W] with squares of random classes."""
    grid = np.random.default_rng(1).integers(0, classes, (height // side + 1, width // side + 1))
    return np.kron(grid, np.ones((side, side), int))[:height, :width].astype(np.uint8)


def uniform(classes, radius):
    """Returns bool[H,W]: whether all pixels within `radius`, including diagonals, have one class; False near the border."""
    windows = sliding_window_view(classes, (2 * radius + 1, 2 * radius + 1))
    same = windows.max(axis=(2, 3)) == windows.min(axis=(2, 3))
    return np.pad(same, radius, constant_values=False)


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize(
    ("scale", "degrees", "flip", "offset"),
    [
        (0.611, 9.7, False, (0.0, 0.0)),
        (1.0, -4.3, True, (0.2, 0.9)),
        (1.373, 7.1, True, (0.0, 1e-3)),
        (1.9, -10.0, False, (0.99, 0.99)),
    ],
)
def test_rotation_equals_the_definition_on_a_smooth_image(scale, degrees, flip, offset, blur):
    """One map interpolates once, the definition twice, so they agree only on smooth images and away from class edges."""
    y, x = np.mgrid[:120, :150]
    image = np.stack([127 + 80 * np.sin(x / 17 + k) + 40 * np.cos(y / 13 - k) for k in range(3)], -1).round().astype(np.uint8)
    label = blocks(120, 150)
    parameters = params(scale, degrees, blur, flip, offset)
    pixels, classes = fused(image, label, parameters, (97, 105))
    expected_pixels, expected_classes = step_by_step(image, label, parameters, (97, 105))
    away = uniform(expected_classes, 1)
    assert away.mean() > 0.6
    np.testing.assert_array_equal(classes[away], expected_classes[away])
    assert (classes == expected_classes).mean() > 0.95
    covered = uniform((expected_classes == IGNORE).astype(int), 3)
    assert covered.mean() > 0.6
    assert np.abs(pixels - expected_pixels)[covered].max() <= 1.5


def test_rotation_is_padded_exactly_where_the_source_ends():
    image, label = noise(70, 90)
    pixels, classes = fused(image, label, params(1.4, 10.0), (98, 126))
    expected_pixels, expected_classes, _ = at_once(image, label, 1.4, 10.0)
    assert 0.05 < (expected_classes == IGNORE).mean() < 0.3
    np.testing.assert_array_equal(classes, expected_classes)
    assert_rounded(pixels, expected_pixels)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("scale", "degrees"), [(1.9, 0.0), (1.9, -3.9), (0.71, 9.9)])
def test_points_are_exact_far_from_the_origin(scale, degrees, flip):
    """The last crop of a noise image as wide as Cityscapes', where float32 coordinates are least exact."""
    image, label = noise(256, 2048)
    pixels, classes = fused(image, label, params(scale, degrees, flip=flip, offset=(0.9999, 0.9999)), (181, 713))
    exact, expected, tie = (array[-181:, -713:] for array in at_once(image, label, scale, degrees, flip))
    wrong = classes != expected
    print(f"{wrong.sum()} of {wrong.size} labels differ, at most {tie[wrong].max(initial=0):.1e} pixels from a rounding tie")
    assert tie[wrong].max(initial=0) < 2e-4
    assert degrees or not wrong.any()
    assert_rounded(pixels[~wrong], exact[~wrong])  # where the label differs, the pixel may be padding


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (3, 2)])
@pytest.mark.parametrize("scale", [0.6, 1.9])
def test_tiny_images(size, scale):
    image, label = noise(*size)
    for degrees, flip in ((0.0, False), (0.0, True), (8.0, False), (8.0, True)):
        pixels, classes = fused(image, label, params(scale, degrees, False, flip), canvas(label, scale))
        exact, expected, _ = at_once(image, label, scale, degrees, flip)
        np.testing.assert_array_equal(classes, expected)
        assert_rounded(pixels, exact)


def test_blur_by_hand():
    """A bright pixel becomes (1, 4, 6, 4, 1)/16 in both directions; near the border, the reflection is added."""
    image, label = np.zeros((9, 12, 3), np.uint8), np.zeros((9, 12), np.uint8)
    image[5, 3] = image[1, 11] = 64  # 64/256 = 1/4 of the integer weights
    pixels, _ = fused(image, label, params(blur=True), (9, 12))
    assert pixels[3:8, 1:6, 0].tolist() == [[0, 1, 2, 1, 0], [1, 4, 6, 4, 1], [2, 6, 9, 6, 2], [1, 4, 6, 4, 1], [0, 1, 2, 1, 0]]
    assert pixels[:2, 9:, 0].tolist() == [[2, 8, 12], [2, 7, 10]]  # (4 + 4, 6 + 1) down, (1, 4, 6) across


def test_blur_equals_semsegs_opencv_call():
    image, label = noise(60, 70)
    pixels, _ = fused(image, label, params(blur=True), (60, 70))
    np.testing.assert_array_equal(pixels, cv2.GaussianBlur(image.astype(np.float32), (5, 5), 0).round())


def test_rotation_turns_counterclockwise():
    label = np.zeros((101, 101), np.uint8)
    label[45:56, 90:] = 1  # in the east
    _, classes = fused(noise(101, 101)[0], label, params(degrees=90.0), (101, 101))
    assert (classes[:11, 45:56] == 1).all()  # in the north
    assert (classes == 1).sum() == 121


def samples(count, config):
    """Returns the parameters at the positions 0 to count - 1."""
    return [sample_augmentation(generator(7, AUGMENT, position), config.augment) for position in range(count)]


def augmented(image, label, count, config):
    return [fused(image, label, parameters, config.augment.crop) for parameters in samples(count, config)]


def stacked(count, config) -> AugmentationParams:
    return AugmentationParams(*map(np.array, zip(*samples(count, config), strict=True)))


def test_image_and_label_never_drift_apart():
    """With every augmentation on, pixels more than 4 pixels from another class keep exactly their class's color."""
    config = base_config()
    config.augment.crop = (81, 73)
    label = blocks(100, 130, side=22)
    color = np.append(np.random.default_rng(3).integers(0, 256, (IGNORE, 3)), FILL[None], axis=0).astype(np.uint8)
    compared = 0
    for pixels, classes in augmented(color[label], label, 400, config):
        inside = uniform(classes, 4)
        np.testing.assert_array_equal(pixels[inside], color[classes[inside]])
        compared += inside.sum()
    assert compared > 400 * 500
    kinds = stacked(400, config)
    assert ((kinds.degrees != 0) & kinds.flip & kinds.blur & (kinds.scale < 0.7)).sum() > 5


def test_neutral_values_give_exact_crops_at_uniform_positions():
    config = base_config()
    config.augment.update(scale=(1.0, 1.0), rotate_degrees=0.0, rotate_probability=1.0, crop=(38, 47))
    config.augment.update(blur_probability=0.0, flip_probability=0.0)
    image, label = noise(41, 49)
    image[..., 0], image[..., 1] = np.mgrid[:41, :49]  # each pixel holds its own coordinates
    counts = np.zeros((4, 3))
    for pixels, classes in augmented(image, label, 1200, config):
        top, left = pixels[0, 0, :2]
        np.testing.assert_array_equal(pixels, image[top : top + 38, left : left + 47])
        np.testing.assert_array_equal(classes, label[top : top + 38, left : left + 47])
        counts[top, left] += 1
    assert np.abs(counts - 100).max() < 40  # 4 standard deviations


def test_distributions():
    scale, degrees, blur, flip, offset, _ = stacked(4000, base_config())
    tenths, _ = np.histogram(scale, bins=10, range=(0.5, 2.0))
    assert tenths.sum() == 4000
    assert np.abs(tenths - 400).max() < 80  # 4 standard deviations, as all below
    rotated = degrees != 0
    tenths, _ = np.histogram(degrees[rotated], bins=10, range=(-10, 10))
    assert tenths.sum() == rotated.sum()
    assert np.abs(tenths - 200).max() < 60
    for chance in (rotated, blur, flip):
        assert abs(chance.mean() - 0.5) < 0.032
    tenths, _, _ = np.histogram2d(*offset.T, bins=10, range=((0, 1), (0, 1)))
    assert np.abs(tenths - 40).max() < 28
    correlation = np.corrcoef([scale, rotated, blur, flip, *offset.T]) - np.eye(6)
    assert np.abs(correlation).max() < 0.064


def test_augmentation_depends_only_on_the_random_generator():
    config = base_config()
    config.augment.crop = (49, 49)
    image, label = noise(64, 80)
    first, again = (augmented(image, label, 20, config) for _ in range(2))
    for (pixels, classes), (pixels_again, classes_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(pixels, pixels_again)
        np.testing.assert_array_equal(classes, classes_again)
    assert len({pixels.tobytes() for pixels, _ in first}) == 20


@pytest.mark.parametrize(("width", "scale", "crop"), [(597, 1.7244556114595078, 301), (924, 1.2115800885519603, 683)])
def test_the_last_pixel_is_never_outside_the_source(width, scale, crop):
    """A canvas rounded up by half a pixel ends exactly at the source's edge, which float32 could place outside (black)."""
    image, label = np.full((40, width, 3), 200, np.uint8), np.full((40, width), 3, np.uint8)
    pixels, classes = fused(image, label, params(scale, offset=(0.999, 0.999)), (33, crop))
    assert (pixels == 200).all()
    assert (classes == 3).all()


@pytest.mark.parametrize(
    ("scale", "degrees", "blur", "flip"), [(1, 0, 0, 0), (0.7, 0, 1, 1), (1.7, 8.5, 0, 1), (0.5, -9, 1, 0)]
)
def test_crops_of_large_files_equal_those_of_whole_images(tmp_path, scale, degrees, blur, flip):
    """Exactly, for every place of the crop, also beyond the border."""
    image, label = fakes.pair("train", 0, (180, 250))
    tifffile.imwrite(tmp_path / "image.tif", image, photometric="rgb", tile=(16, 32))
    tifffile.imwrite(tmp_path / "label.tif", label, rowsperstrip=7)
    large = LargeTiff(tmp_path / "image.tif", lambda x: x, (3,)), LargeTiff(tmp_path / "label.tif", lambda x: x[..., 0])
    for place in ((0, 0), (0.999, 0.999), (0.3, 0.6)):
        for crop in ((40, 33), (200, 90)):
            parameters = params(scale, degrees, bool(blur), bool(flip), place)
            expected, found = (fused(*example, parameters, crop) for example in ((image, label), large))
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
