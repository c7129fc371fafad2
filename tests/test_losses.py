import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from pspnet_jax import losses, models, parallel
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.losses import SCHEDULES, Term
from pspnet_jax.models import layers

pytestmark = pytest.mark.slow

# softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
# f32[1, 1, 3, 3]: adding a constant to a pixel's logits changes nothing
LOGITS = jnp.log(jnp.array([1.0, 2.0, 5.0])) + jnp.array([[[[0.0], [100.0], [-3.0]]]])


def options(**changes) -> ConfigDict:
    loss = base_config().loss
    loss.update(changes)
    return loss


def recipe(**changes) -> ConfigDict:
    """A config with these fields of its loss, 10 steps, and a log line every 5."""
    config = base_config()
    config.loss.update(changes)
    config.total_steps, config.every.log = 10, 5
    return config


def cross_entropy(logits, labels):
    return losses.cross_entropy(logits, labels, options())[0]


def test_cross_entropy_by_hand():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    # ln 8 + ln (8/5), and nothing for the third pixel
    np.testing.assert_allclose(cross_entropy(LOGITS, labels), 2.0794415 + 0.4700036, rtol=1e-6)
    assert losses.cross_entropy(LOGITS, labels, options())[1] == 2


def test_gradient_is_softmax_minus_one_hot_and_zero_where_ignored():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    gradient = jax.grad(cross_entropy)(LOGITS, labels)[0, 0]
    np.testing.assert_allclose(gradient[0], [1 / 8 - 1, 2 / 8, 5 / 8], rtol=1e-5)
    np.testing.assert_allclose(gradient[1], [1 / 8, 2 / 8, 5 / 8 - 1], rtol=1e-5)
    np.testing.assert_array_equal(gradient[2], 0)


@pytest.mark.parametrize("logits", [LOGITS, jnp.full((1, 1, 3, 3), 1e30)])
def test_batch_without_a_labeled_pixel_gives_zero_not_nan(logits):
    labels = jnp.full((1, 1, 3), 255, jnp.uint8)

    def mean(logits, kind):
        term = Term(*losses.LOSSES[kind](logits, labels, options()))
        return term.mean(term.weight)

    for kind in losses.LOSSES:
        loss, gradient = jax.value_and_grad(mean)(logits, kind)
        assert loss == 0
        np.testing.assert_array_equal(gradient, np.zeros((1, 1, 3, 3)), err_msg=kind)


@pytest.mark.parametrize("devices", [None, (2, 1), (2, 2)])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("height", "width", "classes"), [(53, 70, 5), (64, 9, 150), (1, 1, 2)])
def test_losses_by_rows_equal_those_of_upsampled_logits(height, width, classes, align_corners, devices, monkeypatch):
    """All losses, with ignored pixels, class weights and smoothing: values and gradients agree to rounding.

    The rows are divided into several blocks and, on 2 x 2 devices, among the devices.
    """
    monkeypatch.setattr(layers, "BLOCK", 10 * width * classes)
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(0, 3, (2, 7, 9, classes)), jnp.float32)
    labels = rng.integers(-1, classes, (2, height, width)).astype(np.uint8)  # -1 becomes 255
    labels[0, 0, 0] = 0
    weights = tuple(rng.uniform(0.1, 2, classes).tolist())
    choices = options(class_weights=weights, label_smoothing=0.1, ohem_min_kept=height * width // 3 + 1)
    mesh = devices and parallel.make_mesh(jax.devices()[: math.prod(devices)], spatial=devices[1])
    arrays = jax.device_put((scores, labels), parallel.batch_sharding(mesh) if mesh else None)

    def total(scores, labels, upsampled):
        logits = models.CoarseLogits(scores, height, width, align_corners, mesh)
        pairs = [loss(logits.upsample() if upsampled else logits, labels, choices) for loss in losses.LOSSES.values()]
        return sum(sum_ / weight for sum_, weight in pairs), pairs

    compute = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)
    ((_, plain), plain_gradient), ((_, by_rows), gradient) = (compute(*arrays, upsampled) for upsampled in (True, False))
    worst = np.abs(gradient - plain_gradient).max() / np.abs(plain_gradient).max()
    print(f"gradients of the losses by rows and of upsampled logits differ by {worst:.1e} of the largest")
    np.testing.assert_allclose(by_rows, plain, rtol=2e-6)
    assert worst < 1e-6


def test_losses_by_rows_need_a_fraction_of_the_memory_of_upsampled_logits():
    scores, labels = jnp.zeros((2, 40, 40, 150)), jnp.zeros((2, 320, 320), jnp.uint8)

    def temporary_bytes(upsampled):
        def total(scores):
            logits = models.CoarseLogits(scores, 320, 320, align_corners=True)
            return losses.cross_entropy(logits.upsample() if upsampled else logits, labels, options())[0]

        return jax.jit(jax.grad(total)).lower(scores).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(False) < 0.25 * temporary_bytes(True)


@pytest.mark.parametrize("kind", ["cross_entropy", "ohem", "focal"])
@pytest.mark.parametrize("class_weights", [(), (1.0, 2.0, 3.0)])
@pytest.mark.parametrize("wrong", [3, -1])
def test_an_invalid_label_makes_the_loss_nan_so_that_it_is_noticed(kind, class_weights, wrong):
    labels = jnp.array([[[0, 2, wrong]]], jnp.uint8 if wrong > 0 else jnp.int32)
    assert np.isnan(losses.LOSSES[kind](LOGITS, labels, options(class_weights=class_weights))[0])


def test_class_weights_and_label_smoothing_by_hand():
    """As torch.nn.CrossEntropyLoss, with weights (sum(w l) / sum(w)) or with label_smoothing."""
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    total, weight = losses.cross_entropy(LOGITS, labels, options(class_weights=(0.5, 7.0, 3.0)))
    np.testing.assert_allclose([total, weight], [0.5 * np.log(8) + 3 * np.log(8 / 5), 3.5], rtol=1e-5)
    uniform = (np.log(8) + np.log(4) + np.log(8 / 5)) / 3  # cross-entropy with (1/3, 1/3, 1/3)
    total, _ = losses.cross_entropy(LOGITS, labels, options(label_smoothing=0.1))
    np.testing.assert_allclose(total, 0.9 * (np.log(8) + np.log(8 / 5)) + 0.1 * 2 * uniform, rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"),
    [(0.2, 1, [0]), (0.3, 1, [0, 1]), (0.01, 2, [0, 1]), (0.01, 1, [0]), (0.01, 9, [0, 1, 2])],
)
def test_ohem_keeps_the_pixels_below_the_threshold_and_at_least_min_kept(threshold, min_kept, kept):
    """The true classes have probabilities 1/8, 2/8 and 5/8; the fourth pixel is ignored."""
    logits = jnp.concatenate([LOGITS, LOGITS[:, :, :1]], axis=2)
    labels = jnp.array([[[0, 1, 2, 255]]], jnp.uint8)
    total, weight = losses.ohem(logits, labels, options(ohem_threshold=threshold, ohem_min_kept=min_kept))
    assert weight == len(kept)
    np.testing.assert_allclose(total, -np.log(np.array([1 / 8, 2 / 8, 5 / 8]))[kept].sum(), rtol=1e-5)


def test_focal_by_hand():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    total, weight = losses.focal(LOGITS, labels, options(focal_gamma=2.0))
    np.testing.assert_allclose(total, (7 / 8) ** 2 * np.log(8) + (3 / 8) ** 2 * np.log(8 / 5), rtol=1e-5)
    assert weight == 2
    plain, _ = losses.focal(LOGITS, labels, options(focal_gamma=0.0))
    np.testing.assert_allclose(plain, cross_entropy(LOGITS, labels), rtol=1e-6)


def test_dice_by_hand():
    """Two images: the first has classes 0 and 2, the second has no labels. P is (1/8, 2/8, 5/8) at each pixel."""
    logits, labels = jnp.concatenate([LOGITS, LOGITS]), jnp.array([[[0, 2, 255]], [[255, 255, 255]]], jnp.uint8)
    total, weight = losses.dice(logits, labels, options())
    scores = [2 * (1 / 8) / (2 / 8 + 1), 2 * (5 / 8) / (10 / 8 + 1)]
    np.testing.assert_allclose([total, weight], [1 - np.mean(scores), 1], rtol=1e-5)


def test_terms_are_added_up_for_head_and_auxiliary_head():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    loss = losses.build(recipe(terms="cross_entropy+dice", auxiliary_weight=0.25))
    terms, metrics = loss((LOGITS, 2 * LOGITS), {"label": labels}, jnp.int32(4))
    assert list(terms) == ["cross_entropy", "dice", "auxiliary_cross_entropy", "auxiliary_dice"]
    assert [float(term.scale) for term in terms.values()] == [1, 1, 0.25, 0.25]
    np.testing.assert_allclose(terms["auxiliary_cross_entropy"].sum, cross_entropy(2 * LOGITS, labels), rtol=1e-6)
    # predictions are class 2 everywhere; truth 0, 2: IoU 0, 1/2 and none
    assert metrics["mean_iou"].compute() == 0.25
    for step, counted in ((3, 0), (5, 0), (9, 2)):  # steps 5 and 10, counted from 1, are logged
        terms, metrics = loss((LOGITS, None), {"label": labels}, jnp.int32(step))
        assert list(terms) == ["cross_entropy", "dice"]
        assert metrics["mean_iou"].matrix.sum() == counted
    with pytest.raises(UserError, match=r"'crossentropy' is unknown; expected one of cross_entropy, ohem, focal, dice"):
        losses.build(recipe(terms="crossentropy"))


def test_class_weights_from_frequencies_by_hand():
    pixels, image_pixels = np.array([60, 30, 0, 10]), np.array([100, 50, 0, 100])
    weights = losses.class_weights("inverse", pixels, image_pixels)
    np.testing.assert_allclose(weights, [100 / 3 / 60, 100 / 3 / 30, 0, 100 / 3 / 10])
    weights = losses.class_weights("median", pixels, image_pixels)  # frequencies 0.6, 0.6 and 0.1
    np.testing.assert_allclose(weights, [1, 1, 0, 6])


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", {0: 0.4, 50: 0.4, 100: 0.4}), ("linear", {0: 0.4, 25: 0.3, 50: 0.2, 99: 0.004, 100: 0.0, 101: 0.0})],
)
def test_auxiliary_weight(schedule, weights):
    weight = SCHEDULES[schedule](base_config().loss.auxiliary_weight, 100)
    np.testing.assert_allclose([weight(step) for step in weights], list(weights.values()), rtol=1e-5, atol=1e-9)
