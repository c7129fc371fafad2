import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import losses, models, parallel
from pspnet_jax.metrics import MeanIoU
from pspnet_jax.models.layers import convolve
from pspnet_jax.train.step import make_init_state, make_train_step
from tests.train import OneLayer, make_batch, parts_of, tiny_config

pytestmark = pytest.mark.slow

# Float32 rounding is 6e-8; a different order of sums in about twenty normalized layers and three steps gives up to 3e-6.
TOLERANCE = 3e-5


def mesh_of(devices):
    return parallel.make_mesh(jax.devices()[:devices])


def prepare(config, devices=8, **changed):
    """Returns the train step and its initial state for a mesh of `devices` devices."""
    mesh, parts = mesh_of(devices), parts_of(config) | changed
    state = make_init_state(config, parts["model"], parts["optimizer"], mesh, (33, 33, 3))()
    return make_train_step(config, **parts, mesh=mesh), state


def values_of(metrics):
    """Returns the values of metrics by name; for "mean_iou", its confusion matrix."""
    return {name: m.matrix if isinstance(m, MeanIoU) else m.compute() for name, m in metrics.items()}


def place(batch, devices=8):
    return next(parallel.to_devices([batch], mesh_of(devices)))


def copied(tree):
    """Copies a tree to the host, before its buffers are donated."""
    return jax.tree.map(np.array, tree)


def largest_difference(tree, other):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0), tree, other)))


def train(devices, steps=3):
    step, state = prepare(tiny_config(), devices)
    states, scalars = [copied(state)], []
    for i in range(steps):
        state, values = step(state, place(make_batch(i), devices))
        states.append(copied(state))
        scalars.append(copied(values_of(values)))
    return step, states, scalars


@pytest.fixture(scope="module")
def run():
    """Three steps on 8 devices: the compiled step, the four states, and the metrics of the three steps."""
    return train(8)


def step_from(run, batch, index=0, **changes):
    """Runs the compiled step once more, from state `index` of the run with some changes."""
    step, states, _ = run
    state = states[index].replace(**changes)
    state = jax.device_put(jax.tree.map(jnp.array, state), parallel.replicated(mesh_of(8)))
    state, metrics = step(state, place(batch))
    return copied(state), copied(values_of(metrics))


def test_one_device_equals_eight(run):
    """Dropout masks do not depend on the devices, and BatchNorm statistics are computed over all 8 images."""
    _, eight, eight_scalars = run
    _, one, one_scalars = train(1)
    assert largest_difference(one[0], eight[0]) == 0  # the same initial weights, bit for bit
    parts = {
        "loss": largest_difference(one_scalars, eight_scalars),
        "parameters": largest_difference(one[3].params, eight[3].params),
        "gradients (momentum)": largest_difference(one[1].opt_state, eight[1].opt_state),
        "BatchNorm statistics": largest_difference(one[3].batch_stats, eight[3].batch_stats),
        "moving average": largest_difference(one[3].ema, eight[3].ema),
    }
    moved = largest_difference(eight[3].params, eight[0].params)
    print(f"\nlargest differences, 1 device and 8, after 3 steps (parameters moved up to {moved:.3f}): {parts}")
    assert moved > 1000 * TOLERANCE
    assert max(parts.values()) < TOLERANCE


def test_dropout_depends_only_on_seed_and_step(run):
    _, same = step_from(run, make_batch(2), index=2)
    _, other = step_from(run, make_batch(2), index=2, step=jnp.int32(7))
    assert same["loss"] == run[2][2]["loss"]
    assert abs(same["loss"] - other["loss"]) > 1e-4  # only the masks differ


def test_the_step_is_deterministic(run):
    _, states, _ = run
    state, _ = step_from(run, make_batch(2), index=2)
    assert largest_difference(state, states[3]) == 0


def test_one_compilation_for_all_steps(run):
    step, *_ = run
    step_from(run, make_batch(0))
    assert step._cache_size() == 1


def test_the_state_is_donated():
    step, state = prepare(tiny_config())
    step(state, place(make_batch(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_loss_is_the_mean_over_labeled_pixels_of_main_and_weighted_auxiliary_loss(run):
    """Compares the step with a plain forward pass and a loss in NumPy; half of the crops are ignored entirely."""
    config, batch = tiny_config(), make_batch(0)
    batch["label"][4:] = 255
    model = models.build(config.model, 3)
    state, scalars = step_from(run, batch)
    before = run[1][0]

    @jax.jit
    def forward(images):
        key = jax.random.fold_in(jax.random.key(config.seed), before.step)
        variables = {"params": before.params, "batch_stats": before.batch_stats}
        outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return [logits.upsample() for logits in outputs], updates

    (logits, auxiliary), updates = forward(models.normalize(batch["image"], config.normalize))

    def mean_loss(logits):
        logits = np.asarray(logits[:4], np.float64)
        labels = batch["label"][:4].astype(int)
        chosen = np.take_along_axis(logits, np.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - chosen)[labels != 255].mean()

    np.testing.assert_allclose(scalars["auxiliary_cross_entropy"], mean_loss(auxiliary), rtol=1e-5)
    np.testing.assert_allclose(scalars["loss"], mean_loss(logits) + 0.4 * mean_loss(auxiliary), rtol=1e-5)
    assert largest_difference(state.batch_stats, copied(updates["batch_stats"])) < 1e-5
    truth = np.bincount(batch["label"].ravel(), minlength=256)[:3]
    np.testing.assert_array_equal(scalars["mean_iou"].sum(1), truth)


def test_batch_without_any_labeled_pixel_only_decays_the_weights(run):
    before = run[1][0]
    batch = make_batch(0) | {"label": np.full((8, 33, 33), 255, np.uint8)}
    state, scalars = step_from(run, batch)
    assert scalars["loss"] == scalars["auxiliary_cross_entropy"] == scalars["gradient_norm"] == scalars["mean_iou"].sum() == 0
    # learning rate 0.5 x 1/2 (warmup), times 10 outside the backbone; weight decay 1e-4, none for BatchNorm
    kernel = before.params["classifier"]["kernel"]
    np.testing.assert_allclose(state.params["classifier"]["kernel"], kernel * (1 - 0.25 * 10 * 1e-4), rtol=1e-6)
    scale = before.params["backbone"]["stem_conv1"]["bn"]["scale"]
    np.testing.assert_array_equal(state.params["backbone"]["stem_conv1"]["bn"]["scale"], scale)


def test_the_learning_rate_and_step_of_each_state(run):
    _, states, scalars = run
    # 0.5 x (1 - s/12)^0.9 x min(1, (s + 1) / 2)
    np.testing.assert_allclose([s["learning_rate"] for s in scalars], [0.25, 0.4623387554, 0.4243330734], rtol=1e-6)
    assert [int(s.step) for s in states] == [0, 1, 2, 3]


def test_moving_average_equals_its_formula(run):
    _, states, _ = run
    assert largest_difference(states[0].ema, {"params": states[0].params, "batch_stats": states[0].batch_stats}) == 0
    for before, after in itertools.pairwise(states):
        new = {"params": after.params, "batch_stats": after.batch_stats}
        expected = jax.tree.map(lambda average, x: 0.75 * average + 0.25 * x, before.ema, new)
        assert largest_difference(after.ema, expected) < 1e-6
        assert after.variables is after.ema


def one_step_in_parts(parts, frozen, **changed):
    """Returns a batch of 16 images, the states before and after a step, and the metrics of the step.

    Every second image, which accumulation puts into the same part, has a tenth of the labels of the others.
    """
    config, batch = tiny_config(), make_batch(0, size=16)
    batch["label"][1::2, 3:] = 255
    config.optimizer.update(accumulate=parts, ema_decay=0.0)
    step, state = prepare(config, model=OneLayer(frozen), **changed)
    before = copied(state)
    state, metrics = step(state, place(batch))
    return batch, before, copied(state), copied(values_of(metrics))


def test_accumulation_equals_the_whole_batch_with_frozen_statistics():
    """The parts have different numbers of labeled pixels, so the mean of their means would be wrong."""
    _, before, whole, whole_scalars = one_step_in_parts(1, frozen=True)
    _, _, summed, summed_scalars = one_step_in_parts(2, frozen=True)
    difference = largest_difference(whole.params, summed.params)
    moved = largest_difference(whole.params, before.params)
    print(f"\nlargest difference, 1 part and 2 (parameters moved up to {moved:.4f}): {difference}")
    assert difference < 1e-6 < 1e-3 < moved
    np.testing.assert_array_equal(whole_scalars["mean_iou"], summed_scalars["mean_iou"])
    for name in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(whole_scalars[name], summed_scalars[name], rtol=1e-5)
    assert largest_difference(whole.batch_stats, before.batch_stats) == 0


@pytest.mark.parametrize("terms", ["ohem", "dice", "cross_entropy+dice", "focal"])
def test_accumulation_equals_the_whole_batch_for_each_loss(terms):
    """Also if the weights of the loss depend on the network's outputs, as with OHEM."""
    config = tiny_config()
    config.loss.update(terms=terms, ohem_threshold=0.4, ohem_min_kept=50, class_weights=(1.0, 0.5, 2.0))
    _, before, whole, whole_values = one_step_in_parts(1, frozen=True, loss=losses.build(config))
    _, _, summed, summed_values = one_step_in_parts(4, frozen=True, loss=losses.build(config))
    difference = largest_difference(whole.params, summed.params)
    print(f"\nlargest difference, 1 part and 4: {difference}")
    assert difference < 1e-6 < 1e-3 < largest_difference(whole.params, before.params)
    np.testing.assert_allclose(whole_values["loss"], summed_values["loss"], rtol=1e-5)


def test_the_first_pass_of_accumulation_is_free_if_loss_weights_depend_only_on_labels():
    """Cross-entropy weights do not need the network, so the compiled step has the matrix products of a single pass."""

    def products(terms):
        config = tiny_config()
        config.optimizer.accumulate = 2
        config.loss.terms = terms
        step, state = prepare(config, devices=1, model=OneLayer())
        text = step.lower(state, place(make_batch(0), devices=1)).compile().as_text()
        return len(re.findall(r" (?:convolution|dot)\(", text)) + text.count("__onednn") + text.count("__eigen")

    assert products("cross_entropy") < products("ohem")


def test_accumulation_updates_running_statistics_once_per_part():
    batch, before, after, _ = one_step_in_parts(2, frozen=False)
    mean, variance = np.zeros(8), np.ones(8)
    for part in (batch["image"][0::2], batch["image"][1::2]):
        images = models.normalize(part, tiny_config().normalize)
        features = convolve(images, before.params["layer"]["conv"]["kernel"])
        mean = 0.9 * mean + 0.1 * np.mean(features, (0, 1, 2))
        variance = 0.9 * variance + 0.1 * np.var(features, (0, 1, 2))
    statistics = after.batch_stats["layer"]["bn"]
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["var"], variance, rtol=1e-4)


def test_a_batch_of_one_image_is_refused():
    config = tiny_config()
    config.batch_size = 1
    step, state = prepare(config, devices=1)
    with pytest.raises(ValueError, match="pyramid/level0/bn sees one value per channel, whose variance is 0"):
        step(state, place(make_batch(0, size=1), devices=1))
