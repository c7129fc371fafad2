"""Images that cannot fit into memory are refused before anything compiles."""

import itertools

import jax
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.infer import memory
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.protocols import PROTOCOLS

GIB = 2**30


def protocol(**fields):
    config = base_config()
    config.eval.update({"crop": (50, 40), "base_size": 0, "batch_size": 3, "flip": True} | fields)
    return PROTOCOLS[config.eval.protocol](config)


def test_the_estimate_by_hand():
    """An image of 100x80 at scale 2: a canvas of 200x160, whose scores take 225x193, and 3 windows of 50x40, with 4 classes."""
    host, device = memory.estimate(100, 80, protocol(scales=(2.0,)), 4, devices=1)
    assert host == 4 * 3 * (200 * 160 + 3 * 50 * 40)
    assert device == 4 * (2 * 3 * 50 * 40 * (3 + 4) + 4 * 225 * 193)


def test_flipped_views_have_scores_of_their_own():
    """mmseg's flipped images; semseg flips each window."""
    scores = {}
    for name, flip in itertools.product(("mmseg", "semseg"), (False, True)):
        settings = protocol(protocol=name, flip=flip, batch_size=1, crop=(5, 5))
        scores[name, flip] = memory.estimate(1024, 2048, settings, 19, devices=1)[1]
    assert scores["mmseg", True] == pytest.approx(2 * scores["mmseg", False], rel=0.01)
    assert scores["semseg", True] == pytest.approx(scores["semseg", False], rel=0.01)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scales": (300.0,), "base_size": 512}, r"eval\.scales=\(300\.0,\)"),
        ({"crop": (20000, 20000), "base_size": 20000}, r"eval\.crop=\(20000, 20000\)"),
        ({"batch_size": 10**6}, "eval.batch_size=1000000"),
        ({"inference": "whole", "base_size": 100_000}, "eval.base_size=100000, or use eval.inference=windows"),
        ({"scales": (1e12,)}, "eval.scales"),
    ],
)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_settings_that_need_more_than_the_machine_has(monkeypatch, name, fields, named):
    monkeypatch.setattr(memory, "host_limit", lambda: 8 * GIB)
    traced, config = [], base_config()
    config.eval.update(protocol(protocol=name, **fields).settings.to_dict())
    predictor = Predictor(lambda w, x: traced.append(x) or x @ w, config, 19, jax.devices()[:1])
    message = rf"an image of 480x360 needs at least [\d,.]+ GiB .*, but this machine has 8\.0 GiB; lower one of .*{named}"
    with pytest.raises(UserError, match=message):
        predictor.labels(np.eye(3, 19), [np.zeros((360, 480, 3), np.uint8)])
    assert traced == []


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_scales_that_are_not_finite(name, scale):
    with pytest.raises(UserError, match=r"eval\.scales=\((inf|nan),\): an image of 20x10 cannot be scaled by (inf|nan)"):
        memory.estimate(10, 20, protocol(protocol=name, scales=(scale,)), 4, 1)


def test_a_device_with_its_own_memory(monkeypatch):
    monkeypatch.setattr(memory, "_device_limit", lambda device: 1000)
    with pytest.raises(UserError, match=r"but a device has 0\.0 GiB"):
        memory.check(100, 80, protocol(), 4, jax.devices()[:1])


def test_the_default_batch_size_by_hand(monkeypatch):
    """Half of 8 MiB at 1 KiB per pixel is 4096 pixels per device: two windows of 40x50, or one that is larger than that."""
    devices = jax.devices()[:3]
    monkeypatch.setattr(memory, "_device_limit", lambda device: 8 * 2**20)
    assert memory.choose_batch_size((40, 50), devices, lambda: 1024.0) == 3 * 2
    assert memory.choose_batch_size((80, 80), devices, lambda: 1024.0) == 3 * 1
    monkeypatch.setattr(memory, "_device_limit", lambda device: 2**50)  # more pixels than are of any use
    assert memory.choose_batch_size((473, 473), devices, lambda: 1024.0) == 3 * 8
    assert memory.choose_batch_size((713, 713), devices, lambda: 1024.0) == 3 * 4


def test_without_a_known_limit_the_default_is_four_windows_on_all_cpus_or_on_each_other_device():
    def never():
        raise AssertionError

    class Other:
        platform = "other"

        def memory_stats(self):
            return None

    assert memory.choose_batch_size((473, 473), jax.devices()[:2], never) == 4
    assert memory.choose_batch_size((473, 473), [Other(), Other()], never) == 8


def test_room_for_images_by_hand(monkeypatch):
    """Scores of the canvas of 200x160, which take 225x193, with 4 classes: 695 kB per image."""
    one = 4 * 4 * 225 * 193
    for images, expected in ((0.5, 1), (3.99, 2), (4, 4)):
        monkeypatch.setattr(memory, "_device_limit", lambda device, images=images: 4 * images * one)
        assert memory.room_for_images(100, 80, protocol(scales=(2.0,)), 4, jax.devices()[:1]) == expected


@pytest.mark.parametrize(
    ("given", "used", "advice"),
    [
        (3, 3, r"lower one of eval\.batch_size=3, eval\.scales="),
        (0, 32, r"lower one of eval\.batch_size=32 \(chosen because it is 0\), eval\.scales="),
        (0, 0, r"lower one of eval\.scales="),  # memory ran out before it was chosen
    ],
)
def test_the_advice_names_the_batch_size_that_was_used(given, used, advice):
    settings = protocol(batch_size=given).settings
    with pytest.raises(UserError, match=advice), memory.explain_out_of_memory([], settings, used):
        raise MemoryError


def test_usual_settings_fit():
    """The paper's settings for Cityscapes at six scales."""
    six = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    host, device = memory.estimate(1024, 2048, protocol(crop=(713, 713), base_size=2048, scales=six, batch_size=4), 19, 1)
    assert host + device < 2 * GIB


def test_other_errors_pass_through():
    settings = protocol().settings
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explain_out_of_memory([], settings, 3):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    images = [np.zeros((2, 3, 3))]
    with pytest.raises(UserError, match="memory ran out"), memory.explain_out_of_memory(images, settings, 3):
        raise MemoryError("Unable to allocate 3 GiB")
