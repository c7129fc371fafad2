"""Predictions do not depend on batches, devices, sizes or memory; test_protocols.py tests the protocols themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.infer import memory, plan
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.protocols import PROTOCOLS
from tests.infer import reference
from tests.infer.reference import CLASSES

pytestmark = pytest.mark.slow

ONE = np.float32(1)


def asymmetric(factor, x):
    """A network that depends on position in the window and on orientation."""
    return factor * reference.network(x, jnp)


def settings(**fields):
    config = base_config()
    config.eval.update({"crop": (11, 9), "base_size": 20, "scales": (1.0,), "batch_size": 4, "flip": True} | fields)
    return config


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cropped(arrays, images):
    return [x[: image.shape[0], : image.shape[1]] for x, image in zip(np.asarray(arrays), images, strict=False)]


def probabilities(apply, variables, images, config, devices=1):
    predictor = Predictor(apply, config, CLASSES, jax.devices()[:devices])
    return cropped(predictor.probabilities(predictor.place(variables), images), images)


@pytest.mark.parametrize("protocol", ["semseg", "mmseg"])
def test_predictions_do_not_depend_on_sizes_batches_and_devices(protocol):
    """Three images, 38 windows at two scales: together and alone, in batches of 1, 5, 64 and 8, on 1 and 8 devices."""
    images = [picture(14, 18), picture(30, 12, 1), picture(6, 41, 2)]
    config = settings(protocol=protocol, scales=(1.0, 1.5), batch_size=1)
    one_by_one = [probabilities(asymmetric, ONE, [image], config)[0] for image in images]
    for batch_size, devices in ((5, 1), (64, 1), (8, 8)):
        config.eval.batch_size = batch_size
        together = probabilities(asymmetric, ONE, images, config, devices)
        for alone, ours in zip(one_by_one, together, strict=True):
            np.testing.assert_allclose(ours, alone, atol=1e-6)


@pytest.mark.parametrize("protocol", ["semseg", "caffe", "mmseg"])
def test_channels_and_pixel_types_make_no_difference(protocol):
    """A network that looks at three of five 16-bit channels predicts what it does from these channels as 8 bits."""

    def apply(factor, x):
        return factor * reference.network(x if x.shape[3] == 3 else x[..., jnp.array([3, 0, 2])], jnp)

    image, five = picture(14, 18), np.zeros((14, 18, 5), np.uint16)
    five[..., [3, 0, 2]] = image
    config = settings(protocol=protocol, scales=(1.0, 1.5))
    (expected,) = probabilities(apply, ONE, [image], config)
    (red, green, blue), (r, g, b) = config.normalize.mean, config.normalize.std
    config.model.channels, config.dataset.image_dtype = 5, "uint16"
    config.normalize.mean, config.normalize.std = (green, 0.0, blue, red, 0.0), (g, 1.0, b, r, 1.0)
    (found,) = probabilities(apply, ONE, [five], config)
    np.testing.assert_allclose(found, expected, atol=0.01 if protocol == "mmseg" else 1e-5)  # it rounds while 8-bit


def test_whole_image_inference_is_the_network_on_the_scaled_image():
    image = picture(16, 10)
    config = settings(inference="whole", base_size=0, flip=False)
    (ours,) = probabilities(asymmetric, ONE, [image], config)
    expected = reference.softmax(reference.network(reference.normalized(image, config)))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_image_inference_with_flip_equals_one_window_of_the_scaled_size(protocol):
    images = [picture(16, 10), picture(12, 17, 1)]
    config = settings(protocol=protocol, inference="whole", scales=(1.6,))
    whole = probabilities(asymmetric, ONE, images, config, devices=2)
    for image, ours in zip(images, whole, strict=True):
        crop = PROTOCOLS[protocol](config).scaled_size(*image.shape[:2], 1.6)
        (window,) = probabilities(asymmetric, ONE, [image], settings(protocol=protocol, crop=crop, scales=(1.6,)))
        np.testing.assert_allclose(ours, window, atol=1e-6)


def test_windows_of_a_pixelwise_network_equal_whole_image_inference():
    """A pixelwise network has no context that a window could cut off; only float32 rounding differs."""
    weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    images = [picture(31, 24), picture(31, 24, 1)]
    found = [
        np.stack(probabilities(lambda w, x: x @ w, weights, images, settings(inference=inference, scales=(0.5, 2.0))))
        for inference in ("windows", "whole")
    ]
    np.testing.assert_allclose(*found, atol=5e-7)


def test_padding_does_not_affect_scores():
    """A network that predicts class 2 with a huge score where its input is exactly the mean, here only in the padding."""

    def network(_, x):
        return jnp.where((x == 0).all(-1, keepdims=True), jnp.array([0.0, 0, 1e4]), jnp.array([1e4, 0, 0]))

    image = np.full((7, 5, 3), 200, np.uint8)
    (ours,) = probabilities(network, {}, [image], settings(base_size=7, crop=(40, 40)))
    np.testing.assert_array_equal(ours, np.broadcast_to([1, 0, 0], ours.shape))


@pytest.mark.parametrize("held", [1, 6])
def test_labels_are_the_most_probable_classes_whether_views_are_kept_or_added_up(monkeypatch, held):
    monkeypatch.setattr("pspnet_jax.infer.predictor.plan_images", lambda *args: plan.plan_images(*args)._replace(held=held))
    images, config = [picture(14, 18), picture(30, 12, 1)], settings(protocol="mmseg", scales=(0.5, 1.0, 1.5))
    predictor = Predictor(asymmetric, config, CLASSES, jax.devices()[:2])
    labels, confidence = predictor.labels_and_confidence(ONE, images)
    np.testing.assert_array_equal(predictor.labels(ONE, images), labels)
    assert labels.dtype == np.uint8
    expected = probabilities(asymmetric, ONE, images, config)
    for label, highest, p in zip(cropped(labels, images), cropped(confidence, images), expected, strict=True):
        np.testing.assert_array_equal(label, p.argmax(-1))
        np.testing.assert_allclose(highest, p.max(-1), rtol=1e-6)


def test_new_weights_and_most_new_sizes_compile_nothing():
    traces = []

    def counted(factor, x):
        traces.append(x.shape)
        return asymmetric(factor, x)

    predictor = Predictor(counted, settings(base_size=64, crop=(35, 35)), CLASSES, jax.devices()[:1])
    predictor.labels(ONE, [picture(48, 64)])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        predictor.labels(2 * ONE, [picture(48, 64)])
        for size in ((47, 63), (33, 64), (40, 50), (64, 64), (45, 60)):
            predictor.labels(ONE, [picture(*size)])
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/core/compile/backend_compile_duration" not in compiled
    assert traces == [(4, 35, 35, 3)]


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, [[0, 1], [2, 3, 4, 5]]),  # 2 x 3 windows of 11 x 9 per image, except the third, which has 2 x 2
        ({"inference": "whole"}, [[0, 1], [2], [3, 4], [5]]),  # one size at a time
        # 12 windows, with flip, except 8 in the third, which together fill 32 of 36; the last is smaller than the window
        ({"protocol": "mmseg", "flip": True}, [[0], [1], [2, 3, 4], [5]]),
    ],
)
def test_stream_keeps_the_order_and_fills_the_batch(fields, groups):
    sizes = [(16, 20), (16, 20), (15, 15), (16, 20), (16, 20), (8, 20)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    predictor = Predictor(
        lambda w, x: x @ w, settings(**({"batch_size": 12, "base_size": 0, "flip": False} | fields)), CLASSES, jax.devices()[:1]
    )
    weights, normalize = predictor.place(np.eye(3, dtype=np.float32)), base_config().normalize
    found = list(predictor.stream(weights, [{"image": image, "name": i} for i, image in enumerate(images)]))
    assert [[example["name"] for example in group] for group, _, _ in found] == groups
    for group, labels, _ in found:
        group_images = [example["image"] for example in group]
        for image, label in zip(group_images, cropped(labels, group_images), strict=True):
            strongest = ((image - normalize.mean) / normalize.std).argmax(-1)
            np.testing.assert_array_equal(label, strongest)


def test_labels_do_not_depend_on_how_images_are_divided_among_devices():
    """11 images with 2 to 12 windows each, on 1 and 8 devices; each is predicted as by itself."""
    images = [picture(8 + 2 * i, 30, seed=i) for i in range(11)]
    config = settings(protocol="semseg", base_size=0, batch_size=8)
    one, eight = (Predictor(asymmetric, config, CLASSES, jax.devices()[:n]) for n in (1, 8))
    together = eight.labels(ONE, images)
    for image, label in zip(images, cropped(together, images), strict=True):
        np.testing.assert_array_equal(label, cropped(one.labels(ONE, [image]), [image])[0])


def test_windows_and_slots_are_counted():
    """Two images with 6 windows and one with 4, on two devices, one window each per forward pass: 10 windows in 2 x 6 slots."""
    predictor = Predictor(asymmetric, settings(base_size=0, batch_size=2, flip=False), CLASSES, jax.devices()[:2])
    predictor.labels(ONE, [picture(16, 20), picture(15, 15)])
    assert (predictor.windows, predictor.slots) == (10, 12)
    predictor.labels(ONE, [picture(16, 20)])
    assert (predictor.windows, predictor.slots) == (16, 24)


def measuring(monkeypatch, limit, **fields):
    """Returns a predictor on devices with this much memory, with eval.batch_size=0, and the shapes its network is traced at."""
    monkeypatch.setattr(memory, "_device_limit", lambda device: limit)
    traced = []

    def network(factor, x):
        traced.append(x.shape)
        return asymmetric(factor, x)

    fields = {"crop": (40, 40), "base_size": 0, "batch_size": 0} | fields
    return Predictor(network, settings(**fields), CLASSES, jax.devices()[:2]), traced


def test_the_default_batch_size_follows_from_the_memory_of_a_device(monkeypatch):
    """It is the largest power of two of windows that fit into half of the memory; one is compiled to measure."""
    predictor, traced = measuring(monkeypatch, 2**40)
    needed = predictor.bytes_per_pixel(ONE, (40, 40)) * 40 * 40
    scores, pixels = 4 * 40 * 40 * CLASSES, 4 * 40 * 40 * 3
    assert 2 * scores + 3 * pixels < needed < 50 * (2 * scores + 3 * pixels)  # with flip; the network's own memory is small
    for windows, expected in ((0.5, 1), (1.99, 1), (3.99, 2), (4.01, 4)):
        monkeypatch.setattr(memory, "_device_limit", lambda device, windows=windows: 2 * windows * needed)
        assert predictor._max_windows(ONE, (40, 40)) == expected
    predictor.labels(ONE, [picture(60, 60)] * 2)  # 4 windows each
    assert traced == [(2, 40, 40, 3), (2 * 4, 40, 40, 3)]


def test_whole_image_inference_measures_one_size_for_all(monkeypatch):
    predictor, traced = measuring(monkeypatch, 2**40, inference="whole")
    for height, width in ((40, 40), (50, 40), (50, 60)):
        predictor.labels(ONE, [picture(height, width)] * 3)  # two on one device
    assert traced == [(2, 40, 40, 3), (4, 40, 40, 3), (4, 50, 40, 3), (4, 50, 60, 3)]


def test_an_explicit_batch_size_measures_nothing(monkeypatch):
    predictor, traced = measuring(monkeypatch, 2**40, batch_size=6)
    predictor.labels(ONE, [picture(90, 90), picture(90, 90)])
    assert traced == [(6, 40, 40, 3)]


def test_place_takes_weights_from_a_larger_mesh():
    """As in training, weights are replicated over all devices, while the predictor uses only some."""
    variables = {"a": np.arange(3.0), "b": ONE}
    everywhere = jax.device_put(variables, jax.NamedSharding(jax.make_mesh((8,), ("all",)), jax.P()))
    predictor = Predictor(asymmetric, settings(), CLASSES, jax.devices()[2:4])
    placed = predictor.place(everywhere)
    assert {d.id for d in placed["a"].devices()} == {2, 3}
    jax.tree.map(np.testing.assert_array_equal, placed, variables)


def compilations(function):
    """Returns the number of programs that XLA compiles while a function runs."""
    compiled = []

    def listen(name, *_, **__):
        compiled.append(name == "/jax/core/compile/backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.clear_event_listeners()
    return sum(compiled)


def test_whole_image_inference_compiles_only_the_network_for_each_size(monkeypatch):
    """12 sizes in one bucket: only the network is compiled for each. The last 4 networks are kept."""
    monkeypatch.setattr("pspnet_jax.infer.predictor.MAX_NETWORKS", 4)
    config = settings(inference="whole", base_size=0, batch_size=1)
    predictor = Predictor(lambda w, x: x @ w, config, CLASSES, jax.devices()[:1])
    weights = predictor.place(np.eye(3, dtype=np.float32))
    images = [picture(34 + i, 64 - i) for i in range(12)]
    first = compilations(lambda: predictor.labels(weights, images[:1]))
    assert compilations(lambda: [predictor.labels(weights, [image]) for image in images[1:]]) == 11
    assert compilations(lambda: [predictor.labels(weights, [image]) for image in images[-4:]]) == 0
    assert compilations(lambda: predictor.labels(weights, images[:1])) == 1
    print(f"{first} programs for the first size")


def test_programs_of_old_sizes_are_freed(monkeypatch):
    monkeypatch.setattr("pspnet_jax.infer.predictor.MAX_NETWORKS", 2)
    predictor = Predictor(lambda w, x: x @ w, settings(inference="whole", base_size=0), CLASSES, jax.devices()[:1])
    weights, client = predictor.place(np.eye(3, dtype=np.float32)), jax.devices()[0].client
    counts = []
    for i in range(8):
        np.asarray(predictor.labels(weights, [picture(34 + i, 64 - i)]))
        counts.append(len(client.live_executables()))
    assert counts[1:] == counts[1:2] * 7


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("inference", "size"), [("whole", (1, 1)), ("whole", (1, 40)), ("windows", (1, 1))])
def test_images_of_few_pixels_and_tiny_scales(protocol, inference, size):
    image, config = picture(*size), settings(protocol=protocol, inference=inference, base_size=0, scales=(0.01,), flip=False)
    (ours,) = probabilities(asymmetric, ONE, [image], config)
    assert ours.shape == (*size, CLASSES)
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-5)
