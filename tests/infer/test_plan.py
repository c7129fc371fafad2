"""Where windows lie, what a batch holds, and how many shapes are compiled."""

import itertools

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.infer.layout import inward_taps, lay_out, outward_taps, window_starts
from pspnet_jax.infer.plan import bucket, plan_images
from pspnet_jax.infer.protocols import PROTOCOLS

SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def settings(**fields):
    config = base_config()
    config.eval.update({"crop": (473, 473), "base_size": 512, "scales": SIX, "batch_size": 8, "flip": True} | fields)
    return config


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
        (789, 473, [0, 316]),  # the second is flush without moving
        (790, 473, [0, 316, 317]),
        (480, 241, [0, 161, 239]),
    ],
)
def test_window_starts_by_hand(size, crop, starts):
    assert window_starts(size, crop) == starts


def test_window_starts_with_a_stride():
    """Cityscapes in mmsegmentation: 769 with stride 513 in 1024 x 2048."""
    assert window_starts(1024, 769, 513) == [0, 255]
    assert window_starts(2048, 769, 513) == [0, 513, 1026, 1279]


@pytest.mark.parametrize(("protocol", "base", "before"), [("semseg", 8, 1), ("caffe", 7, 0)])
def test_padding_is_centered_or_after_and_has_no_weight(protocol, base, before):
    """8 pixels in a window of 11; of the three missing, the odd one comes after."""
    (view,) = lay_out(8, 8, settings(protocol=protocol, crop=(11, 11), base_size=base, scales=(1.0,)).eval)
    covered = inward_taps(view.rows, False, PROTOCOLS[protocol]).weight.sum(1)
    np.testing.assert_allclose(covered, [0] * before + [1] * 8 + [0] * (3 - before), rtol=1e-6)


def test_windows_of_a_small_image_are_as_large_as_it_is_for_mmseg_alone():
    for protocol, window in (("semseg", (11, 11)), ("caffe", (11, 11)), ("mmseg", (8, 11))):
        (view, *_) = lay_out(8, 16, settings(protocol=protocol, crop=(11, 11), base_size=16, scales=(1.0,)).eval)
        assert (view.rows.window, view.columns.window) == window


def test_mirrored_taps_by_hand():
    """6 pixels, one to one, windows of 4 at 0 and 2: pixel 0 lies at 5 on the mirrored canvas; two are seen twice."""
    settings_ = settings(protocol="mmseg", crop=(4, 4), stride=(2, 2), base_size=0, scales=(1.0,)).eval
    plain, mirrored = lay_out(6, 6, settings_)
    assert (plain.mirrored, mirrored.mirrored) == (False, True)
    inward = inward_taps(mirrored.columns, True, PROTOCOLS["mmseg"])
    outward = outward_taps(mirrored.columns, True, PROTOCOLS["mmseg"], False)
    assert list(inward.pixel[:, 0]) == list(outward.pixel[:, 0]) == [5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(outward.weight[:, 0], [1, 1, 0.5, 0.5, 1, 1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_window_is_in_one_batch(protocol):
    """Four images on two devices, of 4 views or 8; a view is finished in the last batch that has it."""
    config = settings(protocol=protocol, crop=(40, 40), base_size=64, scales=(0.5, 1.0, 2.0, 0.25), batch_size=6)
    sizes = [(48, 64), (64, 40), (50, 50), (20, 64)]
    plan = plan_images([blank(*size) for size in sizes], config, devices=2)
    found, finished = [], []
    for windows, parts, done in plan.batches:
        places, size = windows.place.reshape(2, -1, 3), (windows.rows.pixel.shape[1], windows.columns.pixel.shape[1])
        assert places.shape[1] <= 3
        for view, bounds in parts:
            assert view not in finished
            for device in range(2):
                found += [(view, 2 * device + i, (y, x), size) for i, y, x in places[device, slice(*bounds[device])]]
        finished += done
    expected = [
        (v, i, start, (rows.window, columns.window))
        for i, size in enumerate(sizes)
        for v, (rows, columns, _) in enumerate(lay_out(*size, config.eval))
        for start in itertools.product(rows.starts, columns.starts)
    ]
    assert sorted(found) == sorted(expected)
    assert sorted(finished) == list(range(len(plan.outward)))


def test_the_way_that_takes_less_memory():
    """K numbers a pixel: the canvases of six scales of 512, or the image and two canvases. Mirrored views are kept, too."""
    assert plan_images([blank(3000, 4000)], settings(), 1).together
    assert not plan_images([blank(384, 512)], settings(), 1).together  # canvases 8.7 times as large as the image
    assert plan_images([blank(384, 512)], settings(scales=(1.0,)), 1).together
    assert not plan_images([blank(1500, 2000)], settings(protocol="mmseg", base_size=2048, short_size=512), 1).together


def test_a_data_set_of_many_sizes_has_few_compiled_shapes():
    """As ADE20K has them: sides of 200 to 1024 pixels, scaled to a long side of 512, 896 and so on."""
    config, images, canvases, windows = settings(scales=(0.5, 1.0, 1.75)), set(), set(), set()
    for height, width in itertools.product(range(200, 1025, 75), repeat=2):
        plan = plan_images([blank(height, width)], config, devices=1)
        images.add(plan.images.shape)
        canvases |= set(plan.canvases)
        windows |= {batch.windows.rows.pixel.shape for batch in plan.batches}
    print(f"{len(images)} shapes of images, {len(canvases)} of canvases, for 144 sizes")
    assert windows == {(8, 473, 2)}
    assert len(images) <= 9 * 5
    assert len(canvases) <= 3 * 5


def test_buckets_bound_sizes_closely():
    """The long side by 32 pixels or a quarter, the other by 32 more or a half of the long one."""
    assert bucket(1500, 2000) == (1536, 2048)
    assert bucket(1024, 2048) == (1024, 2048)
    assert bucket(181, 241) == (192, 256)
    assert bucket(100, 10) == (128, 64)
    for height, width in itertools.product(range(1, 1100, 37), repeat=2):
        found = bucket(height, width)
        long = max(found)
        assert all(n % 32 == 0 for n in found)
        assert max(height, width) <= long <= max(max(height, width) * 1.25, max(height, width) + 31)
        assert all(
            side <= n <= max(side + long / 4 + 31, long / 2 + 31) for side, n in zip((height, width), found, strict=True)
        )
