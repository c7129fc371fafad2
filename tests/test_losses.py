import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.losses import auxiliary_weight, count_labeled, cross_entropy

# softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
LOGITS = jnp.log(jnp.array([1.0, 2.0, 5.0])) + jnp.array(
    [[[[0.0], [100.0], [-3.0]]]]
)  # f32[1, 1, 3, 3]: a shift changes nothing


def test_cross_entropy_by_hand():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    # ln 8 + ln (8/5), and nothing for the third pixel
    np.testing.assert_allclose(cross_entropy(LOGITS, labels), 2.0794415 + 0.4700036, rtol=1e-6)
    assert count_labeled(labels) == 2


def test_gradient_is_softmax_minus_one_hot_and_nothing_where_ignored():
    labels = jnp.array([[[0, 2, 255]]], jnp.uint8)
    gradient = jax.grad(cross_entropy)(LOGITS, labels)[0, 0]
    np.testing.assert_allclose(gradient[0], [1 / 8 - 1, 2 / 8, 5 / 8], rtol=1e-5)
    np.testing.assert_allclose(gradient[1], [1 / 8, 2 / 8, 5 / 8 - 1], rtol=1e-5)
    np.testing.assert_array_equal(gradient[2], 0)


@pytest.mark.parametrize("logits", [LOGITS, jnp.full((1, 1, 3, 3), 1e30)])
def test_batch_without_a_labeled_pixel_gives_zero_not_nan(logits):
    labels = jnp.full((1, 1, 3), 255, jnp.uint8)
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, labels) / count_labeled(labels))(logits)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros((1, 1, 3, 3)))


def test_a_label_that_is_no_class_makes_the_loss_nan_so_that_it_cannot_go_unseen():
    assert np.isnan(cross_entropy(LOGITS, jnp.array([[[0, 2, 3]]], jnp.uint8)))


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [("constant", {0: 0.4, 50: 0.4, 100: 0.4}), ("linear", {0: 0.4, 25: 0.3, 50: 0.2, 99: 0.004, 100: 0.0, 101: 0.0})],
)
def test_auxiliary_weight(schedule, weights):
    loss = base_config().loss
    loss.auxiliary_schedule = schedule
    weight = auxiliary_weight(loss, total_steps=100)
    np.testing.assert_allclose([weight(step) for step in weights], list(weights.values()), rtol=1e-5, atol=1e-9)
