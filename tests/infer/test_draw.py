"""Pictures have the right colors in the right places."""

import numpy as np
from PIL import Image

from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.infer.draw import colorize, contact_sheet, overlay, palette_image, side_by_side, to_rgb

INFO = DatasetInfo("two", ("road", "car"), ((10, 20, 30), (200, 100, 50)))
LABEL = np.array([[0, 1], [255, 0]], np.uint8)


def test_colorize_uses_the_classes_colors_and_black_for_ignored():
    expected = [[[10, 20, 30], [200, 100, 50]], [[0, 0, 0], [10, 20, 30]]]
    np.testing.assert_array_equal(colorize(LABEL, INFO.colors), expected)


def test_a_palette_image_keeps_values_and_shows_colors(tmp_path):
    palette_image(LABEL, INFO.colors).save(tmp_path / "label.png")
    with Image.open(tmp_path / "label.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), LABEL)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colorize(LABEL, INFO.colors))


def test_overlay_mixes_by_alpha_and_leaves_ignored_pixels_alone():
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = overlay(image, LABEL, INFO.colors, alpha=0.25)
    road, car = [78, 80, 82], [125, 100, 88]  # 77.5, 80, 82.5 and 125, 100, 87.5, rounded to even
    np.testing.assert_array_equal(mixed, [[road, car], [[100, 100, 100], road]])


def test_side_by_side_has_three_enlarged_panels_and_a_legend_of_the_present_classes():
    image = np.full((2, 2, 3), 100, np.uint8)
    without_car = np.zeros((2, 2), np.uint8)
    picture = np.asarray(side_by_side(image, {"truth": LABEL, "prediction": without_car}, INFO))
    middles = [60, 180]  # of the two enlarged pixels, 120 pixels each
    for panel, expected in enumerate((image, colorize(LABEL, INFO.colors), colorize(without_car, INFO.colors))):
        found = picture[18:][np.ix_(middles, [panel * 246 + x for x in middles])]
        np.testing.assert_array_equal(found, expected)
    legend = picture[18 + 240 :].reshape(-1, 3)
    assert (legend == INFO.colors[0]).all(-1).any()
    assert (legend == INFO.colors[1]).all(-1).any()
    legend = np.asarray(side_by_side(image, {"truth": without_car, "prediction": without_car}, INFO))[18 + 240 :].reshape(-1, 3)
    assert not (legend == INFO.colors[1]).all(-1).any()


def test_a_contact_sheet_has_each_image_under_its_name_and_a_legend_of_the_present_classes():
    wide = {"image": np.full((10, 20, 3), 100, np.uint8), "label": np.zeros((10, 20), np.uint8), "name": "wide"}
    tall = {"image": np.full((20, 10, 3), 100, np.uint8), "label": np.full((20, 10), 255, np.uint8), "name": "tall"}
    picture = np.asarray(contact_sheet([wide, tall, wide], INFO, columns=2))
    road = [55, 60, 65]  # half of 10, 20, 30 and half of 100
    np.testing.assert_array_equal(picture[18 + 100, 200], road)
    np.testing.assert_array_equal(picture[18 + 300, 406 + 100], [100, 100, 100])  # ignored: the image alone
    np.testing.assert_array_equal(picture[18 + 400 + 18 + 100, 200], road)
    legend = picture[18 + 400 + 18 + 200 :].reshape(-1, 3)
    assert (legend == INFO.colors[0]).all(-1).any()
    assert not (legend == INFO.colors[1]).all(-1).any()


def test_pictures_show_three_channels_scaled_to_8_bits():
    ramp = np.arange(101, dtype=np.uint16).repeat(4)[:, None, None].repeat(4, 1)  # every fourth row and column is sampled
    expected = np.rint((np.clip(np.arange(101).repeat(4), 2, 98) - 2) * (255 / 96))
    bands = np.concatenate([ramp * 100, ramp * 100, ramp * 100, ramp * 0], 2)
    np.testing.assert_array_equal(to_rgb(bands), expected[:, None, None] * np.ones((1, 4, 3)))
    np.testing.assert_array_equal(to_rgb(ramp.astype(np.float32) / 8), expected[:, None, None] * np.ones((1, 4, 3)))
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    np.testing.assert_array_equal(to_rgb(rgb), rgb[..., :3])
    np.testing.assert_array_equal(to_rgb(np.full((4, 4, 1), 7, np.uint16)), np.zeros((4, 4, 3)))


def test_a_long_caption_ends_before_the_next_panel():
    """Between the captions of two panels, nothing is drawn."""
    image = np.full((2, 2, 3), 100, np.uint8)
    sheets = [
        np.asarray(contact_sheet([{"image": image, "label": LABEL, "name": name}] * 3, INFO))
        for name in ("x" * 200 + "end", "end")
    ]
    width = sheets[0].shape[1] // 3
    gaps = [sheet[:16, width - 4 : width + 1] for sheet in sheets]
    assert sheets[0].shape == sheets[1].shape
    np.testing.assert_array_equal(*gaps)
