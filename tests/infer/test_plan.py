"""Positions of windows, contents of batches, and number of compiled shapes."""

import itertools

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.infer.plan import bucket, canvas_to_image, image_to_canvas, plan_images, views_of, window_starts
from pspnet_jax.infer.protocols import PROTOCOLS

SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def make(**fields):
    """Returns a protocol with these settings."""
    config = base_config()
    config.eval.update({"crop": (473, 473), "base_size": 512, "scales": SIX, "flip": True} | fields)
    config.normalize.mean = (1.5, 2.5, 3.25)
    return PROTOCOLS[config.eval.protocol](config)


def plan_on(images, protocol, devices=1, windows=8):
    """Returns a plan with at most `windows` windows per device and forward pass."""
    return plan_images(images, protocol, devices, lambda size: windows)


def blank(height, width):
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "crop", "starts"),
    [
        (1024, 713, [0, 311]),  # stride 476
        (2048, 713, [0, 476, 952, 1335]),
        (473, 473, [0]),
        (474, 473, [0, 1]),
        (512, 473, [0, 39]),
        (896, 473, [0, 316, 423]),  # stride 316
        (789, 473, [0, 316]),  # the second ends exactly at the end
        (790, 473, [0, 316, 317]),
        (480, 241, [0, 161, 239]),
    ],
)
def test_window_starts_by_hand(size, crop, starts):
    assert window_starts(size, crop) == starts


def test_window_starts_with_a_stride():
    """Cityscapes in mmsegmentation: windows of 769 at stride 513 in 1024 x 2048."""
    assert window_starts(1024, 769, 513) == [0, 255]
    assert window_starts(2048, 769, 513) == [0, 513, 1026, 1279]


@pytest.mark.parametrize(("protocol", "base", "before"), [("semseg", 8, 1), ("caffe", 7, 0)])
def test_padding_is_on_both_sides_or_after_the_image_in_the_mean_color(protocol, base, before):
    """8 pixels in a window of 11: of the three missing, one comes before and two after, or all come after."""
    protocol = make(protocol=protocol, crop=(11, 11), base_size=base, scales=(1.0,))
    (view,) = views_of(8, 8, protocol)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    canvas = image_to_canvas(image, view, protocol)
    expected = np.tile(np.array([1.5, 2.5, 3.25], np.float32), (11, 11, 1))
    expected[before : before + 8, before : before + 8] = image
    np.testing.assert_array_equal(canvas, expected)


def test_caffe_pads_an_image_larger_than_the_window_with_whole_gray_levels():
    protocol = make(protocol="caffe", crop=(11, 11), base_size=19, scales=(1.0,))
    (view,) = views_of(8, 20, protocol)
    canvas = image_to_canvas(blank(8, 20), view, protocol)
    assert canvas.shape == (11, 20, 3)
    np.testing.assert_array_equal(canvas[8:], np.tile([2, 3, 3], (3, 20, 1)))


def test_only_mmseg_shrinks_the_window_to_a_small_image():
    for protocol, window in (("semseg", (11, 11)), ("caffe", (11, 11)), ("mmseg", (8, 11))):
        (view, *_) = views_of(8, 16, make(protocol=protocol, crop=(11, 11), base_size=16, scales=(1.0,)))
        assert view.window == window


def test_a_flipped_view_by_hand():
    """6 pixels at scale 1, windows of 4 at 0 and 2: pixel 0 is at 5 on the flipped canvas; two pixels are in both windows."""
    protocol = make(protocol="mmseg", crop=(4, 4), stride=(2, 2), base_size=0, scales=(1.0,))
    plain, flipped = views_of(6, 6, protocol)
    assert (plain.columns.flipped, flipped.columns.flipped, flipped.rows.flipped) == (False, True, False)
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image_to_canvas(image, flipped, protocol), image[:, ::-1])
    to_image = canvas_to_image(flipped.columns, protocol)
    assert list(to_image.indices[:, 0]) == [5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(to_image.weight[:, 0], [1, 1, 0.5, 0.5, 1, 1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_window_is_in_one_batch(protocol):
    """Four images with 4 or 8 views each, on two devices."""
    protocol = make(protocol=protocol, crop=(40, 40), base_size=64, scales=(0.5, 1.0, 2.0, 0.25))
    sizes = [(48, 64), (64, 40), (50, 50), (20, 64)]
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    plan = plan_on(images, protocol, devices=2, windows=3)
    image_at, found = dict(zip(plan.rows, range(4), strict=True)), []
    for batch in plan.batches:
        pixels, positions = (x.reshape(2, -1, *x.shape[1:]) for x in (batch.pixels, batch.positions))
        assert positions.shape[1] <= 3
        for view, bounds in batch.parts:
            for device in range(2):
                for i in range(*bounds[device]):
                    slot, y, x = positions[device, i]
                    found.append((view, image_at[2 * device + slot], (y, x), pixels[device, i]))
    expected = [
        (v, i, (y, x), image_to_canvas(image, view, protocol)[y : y + view.window[0], x : x + view.window[1]])
        for i, image in enumerate(images)
        for v, view in enumerate(views_of(*image.shape[:2], protocol))
        for y, x in itertools.product(view.rows.starts, view.columns.starts)
    ]
    found, expected = (sorted(windows, key=lambda window: window[:3]) for windows in (found, expected))
    assert [window[:3] for window in found] == [window[:3] for window in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours[3], theirs[3])
    assert sum(canvas.num_windows for canvas in plan.canvases) == len(expected)


def test_views_are_kept_or_added_up_whichever_takes_less_memory():
    """K numbers per pixel of six canvases, or of the image and one canvas."""
    assert plan_on([blank(3000, 4000)], make()).held == 6
    assert plan_on([blank(384, 512)], make()).held == 1  # the canvases are 8.7 times as large as the image
    assert plan_on([blank(384, 512)], make(scales=(1.0,))).held == 1  # the only view
    assert plan_on([blank(1500, 2000)], make(protocol="mmseg", base_size=2048, short_size=512)).held == 1


def test_a_dataset_of_many_sizes_has_few_compiled_shapes():
    """As in ADE20K: sides of 200 to 1024 pixels, scaled to long sides of 256, 512 and 896."""
    protocol, images, canvases, windows = make(scales=(0.5, 1.0, 1.75)), set(), set(), set()
    for height, width in itertools.product(range(200, 1025, 75), repeat=2):
        plan = plan_on([blank(height, width)], protocol)
        images.add(plan.shape)
        canvases |= {canvas.size for canvas in plan.canvases}
        windows.add(next(plan.batches).pixels.shape)
    print(f"144 image sizes have {len(images)} image shapes and {len(canvases)} canvas shapes")
    assert windows == {(8, 473, 473, 3)}
    assert len(images) <= 9 * 5
    assert len(canvases) <= 3 * 5


def test_buckets_bound_sizes_closely():
    """The long side grows by up to 31 pixels or a quarter; the other by a quarter of it, or to its double, plus 31."""
    assert bucket(1500, 2000) == (1536, 2048)
    assert bucket(1024, 2048) == (1024, 2048)
    assert bucket(181, 241) == (192, 256)
    assert bucket(100, 10) == (128, 32)
    assert bucket(200, 20000) == (320, 20480)
    for height, width in itertools.product(range(1, 1100, 37), repeat=2):
        found = bucket(height, width)
        long = max(found)
        assert all(n % 32 == 0 for n in found)
        assert max(height, width) <= long <= max(max(height, width) * 1.25, max(height, width) + 31)
        assert all(
            side <= n <= max(side + long / 4 + 31, 2 * side + 31) for side, n in zip((height, width), found, strict=True)
        )
