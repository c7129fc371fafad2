"""Windows, scales and mirror images of whole images, against the protocol written out in NumPy."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.infer import protocol
from pspnet_jax.infer.protocol import PROTOCOLS, bilinear, bucket, mean_of_softmaxes, scaled_size, window_starts
from pspnet_jax.infer.windows import Predictor

CLASSES = 3


class Crooked(nn.Module):
    """A network whose answer depends on where in its window a pixel is, and on left and right."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(CLASSES, (3, 3), kernel_init=nn.initializers.normal(1.0))(x)
        position = np.linspace(-1, 1, x.shape[1])[:, None] + np.linspace(0, 3, x.shape[2])
        return y + position[..., None] * np.arange(CLASSES)


@pytest.fixture(scope="module")
def crooked():
    net = Crooked()
    return net.apply, net.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))


def settings(**fields):
    config = base_config()
    config.eval.update({"crop": (11, 9), "base_size": 20, "scales": (1.0,), "batch_size": 4, "flip": True} | fields)
    return config


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def probabilities(apply, variables, images, config, devices=1):
    predictor = Predictor(apply, config, CLASSES, jax.devices()[:devices])
    out = np.asarray(predictor.probabilities(predictor.place(variables), images))
    return [p[: image.shape[0], : image.shape[1]] for p, image in zip(out, images, strict=False)]


# Section 3's semseg column, written out in float64.


def resize(image, height, width):
    """cv2's INTER_LINEAR by definition: one output pixel at a time."""
    out = np.zeros((height, width, image.shape[2]))
    for i, j in itertools.product(range(height), range(width)):
        y = min(max((i + 0.5) * image.shape[0] / height - 0.5, 0), image.shape[0] - 1)
        x = min(max((j + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
        lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
        out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(net, image, config):
    """`net` takes one normalized window [h, w, 3]."""
    (height, width), (crop_h, crop_w) = image.shape[:2], config.eval.crop
    mean, std = np.array(config.normalize.mean), np.array(config.normalize.std)
    result = np.zeros((height, width, CLASSES))
    for scale in config.eval.scales:
        long = round(scale * (config.eval.base_size or max(height, width)))
        if height > width:
            new_h, new_w = long, round(long / height * width)
        else:
            new_h, new_w = round(long / width * height), long
        scaled = resize(image.astype(np.float64), new_h, new_w)
        top, left = max(crop_h - new_h, 0) // 2, max(crop_w - new_w, 0) // 2
        padded = np.tile(mean, (max(crop_h, new_h), max(crop_w, new_w), 1))
        padded[top : top + new_h, left : left + new_w] = scaled
        total, times = np.zeros((*padded.shape[:2], CLASSES)), np.zeros(padded.shape[:2])
        stride_h, stride_w = int(np.ceil(crop_h * 2 / 3)), int(np.ceil(crop_w * 2 / 3))
        for i, j in itertools.product(
            range(int(np.ceil((padded.shape[0] - crop_h) / stride_h)) + 1),
            range(int(np.ceil((padded.shape[1] - crop_w) / stride_w)) + 1),
        ):
            y, x = min(i * stride_h, padded.shape[0] - crop_h), min(j * stride_w, padded.shape[1] - crop_w)
            window = (padded[y : y + crop_h, x : x + crop_w] - mean) / std
            answer = softmax(net(window))
            if config.eval.flip:
                answer = (answer + softmax(net(window[:, ::-1]))[:, ::-1]) / 2
            total[y : y + crop_h, x : x + crop_w] += answer
            times[y : y + crop_h, x : x + crop_w] += 1
        total = (total / times[..., None])[top : top + new_h, left : left + new_w]
        result += resize(total, height, width)
    return result / len(config.eval.scales)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((10, 16), (1.0,)),
        ((16, 10), (1.0,)),  # tall
        ((5, 33), (1.0,)),  # wide: shorter than the crop at this scale
        ((13, 13), (0.4,)),  # smaller than the crop on both sides, odd padding
        ((14, 18), (0.5, 1.0, 1.7)),
    ],
)
def test_semseg_protocol_written_out(crooked, size, scales, flip):
    apply, variables = crooked
    config, image = settings(scales=scales, flip=flip), picture(*size)
    expected = reference(lambda x: np.asarray(apply(variables, x[None].astype(np.float32)))[0], image, config)
    (ours,) = probabilities(apply, variables, [image], config)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_images_of_any_sizes_batches_and_devices_change_nothing(crooked):
    """Three images, 38 windows at two scales: in one call and alone, in batches of 1, 5 and 64, on 1 and 8 devices."""
    images = [picture(14, 18), picture(30, 12, 1), picture(6, 41, 2)]
    one_by_one = [probabilities(*crooked, [image], settings(scales=(1.0, 1.5), batch_size=1))[0] for image in images]
    for batch_size, devices in ((5, 1), (64, 1), (8, 8)):
        together = probabilities(*crooked, images, settings(scales=(1.0, 1.5), batch_size=batch_size), devices)
        for alone, ours in zip(one_by_one, together, strict=True):
            np.testing.assert_allclose(ours, alone, atol=1e-6)


def test_whole_inference_is_the_network_on_the_scaled_image(crooked):
    apply, variables = crooked
    image = picture(16, 10)
    config = settings(inference="whole", base_size=0, flip=False)
    (ours,) = probabilities(apply, variables, [image], config)
    normalized = (image - np.float32(config.normalize.mean)) / np.float32(config.normalize.std)
    np.testing.assert_allclose(ours, softmax(np.asarray(apply(variables, normalized[None])))[0], atol=1e-6)


def test_whole_inference_with_scales_and_flip_is_one_window_as_large_as_the_scaled_image(crooked):
    images = [picture(16, 10, seed) for seed in range(3)]
    whole = probabilities(*crooked, images, settings(inference="whole", scales=(0.5, 1.6)), devices=2)
    crops = {scale: scaled_size(16, 10, 20, scale, PROTOCOLS["semseg"]) for scale in (0.5, 1.6)}
    windows = [probabilities(*crooked, images, settings(crop=crop, scales=(scale,))) for scale, crop in crops.items()]
    np.testing.assert_allclose(np.stack(whole), np.mean(windows, 0), atol=1e-6)


def test_windows_of_a_translation_equivariant_network_equal_whole_inference():
    """Pixel by pixel there is nothing a window could cut off; they differ by float32 rounding only."""
    weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    images = [picture(31, 24), picture(31, 24, 1)]
    found = [
        np.stack(probabilities(lambda w, x: x @ w, weights, images, settings(inference=inference, scales=(0.5, 2.0))))
        for inference in ("windows", "whole")
    ]
    np.testing.assert_allclose(*found, atol=5e-7)


def test_padding_is_never_counted():
    """A network that shouts class 2 wherever its input is the mean exactly, which only the padding is here."""

    def shout(_, x):
        return jnp.where((x == 0).all(-1, keepdims=True), jnp.array([0.0, 0, 1e4]), jnp.array([1e4, 0, 0]))

    image = np.full((7, 5, 3), 200, np.uint8)
    (ours,) = probabilities(shout, {}, [image], settings(base_size=7, crop=(40, 40)))
    np.testing.assert_array_equal(ours, np.broadcast_to([1, 0, 0], ours.shape))


def test_labels_are_the_most_probable_classes(crooked):
    apply, variables = crooked
    images = [picture(14, 18), picture(30, 12, 1)]
    predictor = Predictor(apply, settings(), CLASSES, jax.devices()[:2])
    labels = np.asarray(predictor.labels(variables, images))
    assert labels.dtype == np.uint8
    for image, label, p in zip(images, labels, probabilities(apply, variables, images, settings()), strict=False):
        np.testing.assert_array_equal(label[: image.shape[0], : image.shape[1]], p.argmax(-1))


def test_new_weights_and_most_new_sizes_compile_nothing(crooked):
    apply, variables = crooked
    traces = []

    def counted(variables, x):
        traces.append(x.shape)
        return apply(variables, x)

    predictor = Predictor(counted, settings(base_size=64, crop=(33, 33)), CLASSES, jax.devices()[:1])
    predictor.labels(variables, [picture(48, 64)])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        predictor.labels(jax.tree.map(lambda x: 2 * x, jax.device_get(variables)), [picture(48, 64)])
        for size in ((47, 63), (33, 64), (40, 50), (64, 64), (45, 60)):
            predictor.labels(jax.device_get(variables), [picture(*size)])
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/core/compile/backend_compile_duration" not in compiled
    assert traces == [(4, 33, 33, 3)]


def test_a_data_set_of_many_sizes_has_few_compiled_shapes():
    """As ADE20K has them: sides of 200 to 1024 pixels, scaled to a long side of 512, 896 and so on."""
    config, shapes = settings(crop=(473, 473), base_size=512, scales=(0.5, 1.0, 1.75)), set()
    for height, width in itertools.product(range(200, 1025, 75), repeat=2):
        plan = protocol.plan_images([picture(height, width)], config.eval, devices=1)
        shapes.add((plan.images.shape[1:3], *(rows.pixel.shape[1] for rows, _ in plan.inward)))
    assert shapes == {((s, s), 512, 512, 896) for s in (224, 320, 384, 448, 512, 640, 768, 896, 1024)}
    assert all(n <= bucket(n) <= max(n * 1.25, n + 31) and bucket(n) % 32 == 0 for n in range(1, 5000))


def test_stream_keeps_the_order_and_fills_the_batch():
    """At 16x20 there are 2 x 3 windows of 11x9, so that two such images fill a batch of 12; at 15x15 there are 2 x 2."""
    images = [picture(*size, seed=i) for i, size in enumerate([(16, 20), (16, 20), (15, 15), (16, 20), (16, 20)])]
    for inference, groups in (("windows", [[0, 1], [2, 3, 4]]), ("whole", [[0, 1], [2], [3, 4]])):
        config = settings(inference=inference, batch_size=12, base_size=0)
        predictor = Predictor(lambda w, x: x @ w, config, CLASSES, jax.devices()[:1])
        weights = predictor.place(np.eye(3, dtype=np.float32))
        found = list(predictor.stream(weights, [{"image": image, "name": i} for i, image in enumerate(images)]))
        assert [[example["name"] for example in group] for group, _ in found] == groups
        for group, labels in found:
            for example, label in zip(group, np.asarray(labels), strict=False):
                height, width = example["image"].shape[:2]
                strongest = ((example["image"] - config.normalize.mean) / config.normalize.std).argmax(-1)
                np.testing.assert_array_equal(label[:height, :width], strongest)


def test_place_takes_weights_from_a_larger_mesh(crooked):
    """As training has them: replicated over all devices, while the predictor uses some."""
    apply, variables = crooked
    everywhere = jax.device_put(variables, jax.NamedSharding(jax.make_mesh((8,), ("all",)), jax.P()))
    predictor = Predictor(apply, settings(), CLASSES, jax.devices()[2:4])
    placed = predictor.place(everywhere)
    assert {d.id for d in jax.tree.leaves(placed)[0].devices()} == {2, 3}
    jax.tree.map(np.testing.assert_array_equal, placed, variables)


def test_resize_by_hand():
    """2 -> 4: centers at -0.25, 0.25, 0.75, 1.25 of the source, the outer two held to its edges; 4 -> 2: at 0.5 and 2.5."""
    up, down = bilinear(4, 2), bilinear(2, 4)
    np.testing.assert_allclose((np.array([0.0, 8.0])[up.pixel] * up.weight).sum(1), [0, 2, 6, 8])
    np.testing.assert_allclose((np.array([0.0, 2.0, 8.0, 100.0])[down.pixel] * down.weight).sum(1), [1, 54])
    np.testing.assert_array_equal(bilinear(5, 1).pixel, 0)


def test_mean_of_softmaxes_by_hand():
    """Two pixels, two classes; log 3 makes 3/4 to 1/4. The mirror image's pixels come in reverse order."""
    log3 = np.log(3)
    logits, mirrored = np.array([[log3, 0], [0, 0]]), np.array([[0, log3], [0, 0]])
    np.testing.assert_allclose(mean_of_softmaxes(logits), [[3 / 4, 1 / 4], [1 / 2, 1 / 2]], rtol=1e-6)
    np.testing.assert_allclose(mean_of_softmaxes(logits, mirrored), [[5 / 8, 3 / 8], [3 / 8, 5 / 8]], rtol=1e-6)


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


@pytest.mark.parametrize(
    ("size", "base", "scale", "scaled"),
    [
        ((360, 480), 512, 1.0, (384, 512)),
        ((480, 360), 512, 1.75, (896, 672)),
        ((1024, 2048), 2048, 0.5, (512, 1024)),
        ((333, 500), 512, 1.0, (341, 512)),  # 340.992
        ((360, 480), 0, 1.25, (450, 600)),
        ((2, 500), 500, 0.1, (1, 50)),  # 0.2 rounds to 0, which is no size
    ],
)
def test_scaled_size_by_hand(size, base, scale, scaled):
    assert scaled_size(*size, base, scale, PROTOCOLS["semseg"]) == scaled


def test_padding_is_centered_and_the_odd_pixel_comes_after():
    axis = protocol.plan_axis(source=8, scaled=8, window=11, protocol=PROTOCOLS["semseg"])
    np.testing.assert_array_equal(axis.inward.weight.sum(1), [0] + [1] * 8 + [0] * 2)
