"""Colors change as in mmsegmentation's PhotoMetricDistortion, which is written here step by step."""

import cv2
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data.augment import AugmentationParams, apply_augmentation, sample_augmentation
from pspnet_jax.data.colors import ColorParams, apply_colors, sample_colors
from pspnet_jax.data.order import AUGMENT, generator
from pspnet_jax.datasets import IGNORE

MMSEG = {"brightness": 32.0, "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": 18}


def augment_config(**fields):
    config = base_config()
    config.augment.update(fields)
    return config.augment


def changed(image, **fields):
    image = np.array(image, np.uint8)
    apply_colors(image, ColorParams(**fields))
    return image


def scaled(values, factor, offset=0.0):
    return np.clip(values.astype(np.float32) * np.float32(factor) + np.float32(offset), 0, 255).astype(np.uint8)


def step_by_step(image, colors):
    image = scaled(image, 1, colors.brightness)
    if not colors.contrast_last:
        image = scaled(image, colors.contrast)
    if colors.saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = scaled(hsv[..., 1], colors.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if colors.hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + colors.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return scaled(image, colors.contrast) if colors.contrast_last else image


def test_all_steps_equal_mmsegmentations():
    random, augment = np.random.default_rng(0), augment_config(**MMSEG)
    image = random.integers(0, 256, (31, 40, 3), np.uint8)
    for position in range(100):
        colors = sample_colors(generator(3, AUGMENT, position), augment)
        found, expected = changed(image, **colors._asdict()), step_by_step(image, colors)
        if colors.hue and colors.saturation != 1:  # mmsegmentation rounds once more in between
            assert np.abs(found.astype(int) - expected).mean() < 1, colors
        else:
            np.testing.assert_allclose(found, expected, atol=1, err_msg=str(colors))
            assert (found != expected).mean() < 0.02


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"brightness": 30.7}, [230, 130, 30]),  # rounded down
        ({"brightness": 100.0}, [255, 200, 100]),
        ({"contrast": 1.5}, [255, 150, 0]),
        ({"brightness": -20.0, "contrast": 0.5}, [90, 40, 0]),
        ({"brightness": 80.0, "contrast": 0.5, "contrast_last": True}, [127, 90, 40]),  # 280 is clipped before
        ({"saturation": 0.5}, [200, 150, 100]),  # S of (200, 100, 0) is 255, of (200, 150, 100) 127.5
        ({"hue": 15}, [200, 200, 0]),  # from 30 to 60 degrees
        ({"hue": -15}, [200, 0, 0]),
        ({"hue": -75}, [0, 0, 200]),  # to -120 degrees, which are 240
        ({}, [200, 100, 0]),
    ],
)
def test_values_worked_out_by_hand(fields, expected):
    np.testing.assert_allclose(changed([[[200, 100, 0]]], **fields)[0, 0], expected, atol=1 if "saturation" in fields else 0)


def test_gray_has_no_hue_or_saturation():
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    np.testing.assert_array_equal(changed(gray, saturation=1.4, hue=11), gray)


def test_distributions():
    augment = augment_config(**MMSEG)
    samples = [sample_colors(generator(7, AUGMENT, position), augment) for position in range(4000)]
    *values, last = map(np.array, zip(*samples, strict=True))
    for value, neutral, low, high in zip(values, (0, 1, 1, 0), (-32, 0.5, 0.5, -18), (32, 1.5, 1.5, 18), strict=True):
        moved = value != neutral
        assert abs(moved.mean() - 0.5) < 0.032  # 4 standard deviations; the hue is 0 by chance in 1 of 72 samples
        tenths, _ = np.histogram(value[moved], bins=8, range=(low, high))
        assert tenths.sum() == moved.sum()
        assert np.abs(tenths - moved.sum() / 8).max() < 70
    assert abs(last.mean() - 0.5) < 0.032
    assert (min(values[3]), max(values[3])) == (-18, 17)  # as numpy.random.randint(-18, 18)
    correlation = np.corrcoef([*(np.abs(v - n) for v, n in zip(values, (0, 1, 1, 0), strict=True)), last]) - np.eye(5)
    assert np.abs(correlation).max() < 0.064


def test_without_colors_nothing_is_sampled_and_with_them_the_other_choices_stay_the_same():
    for position in range(20):
        plain, colored = (generator(7, AUGMENT, position) for _ in range(2))
        before = sample_augmentation(plain, augment_config())
        after = sample_augmentation(colored, augment_config(**MMSEG))
        assert before.colors is None
        assert str(before) == str(after._replace(colors=None))
        only = generator(7, AUGMENT, position)
        only.random(7)
        assert plain.random() == only.random()


@pytest.mark.parametrize("blur", [False, True])
def test_padding_keeps_the_mean_and_labels_stay(blur):
    image, label = np.full((20, 30, 3), 100, np.uint8), np.full((20, 30), 2, np.uint8)
    params = AugmentationParams(1.0, 0.0, blur, False, np.zeros(2), ColorParams(brightness=15.0))
    pixels, classes = apply_augmentation(image, label, params, (40, 40), (124.0, 116.0, 104.0))
    inside = np.pad(np.ones((20, 30), bool), ((10, 10), (5, 5)))
    assert (pixels[inside] == 115).all()
    assert (pixels[~inside] == (124, 116, 104)).all()
    np.testing.assert_array_equal(classes, np.where(inside, 2, IGNORE))
