"""The whole network: parameter counts, float64 reference, training mode, precision, error messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from tests.models import reference

pytestmark = pytest.mark.slow

# (depth, stem, K): trainable parameters with and without the auxiliary head, counted from hszhao/semseg (stem "deep")
# and open-mmlab/mmsegmentation ("deep32").
PARAMETERS = {
    (50, "deep", 150): (49_180_908, 46_782_550),
    (50, "deep", 19): (49_080_038, 46_715_347),
    (101, "deep", 19): (68_072_166, 65_707_475),
    (101, "deep", 21): (68_073_706, 65_708_501),
    (152, "deep", 150): (83_816_684, 81_418_326),
    (18, "deep32", 21): (12_790_474, 12_641_525),
    (50, "deep32", 21): (48_977_034, 46_611_829),
    (101, "deep32", 21): (67_969_162, 65_603_957),
}
# Largest error of float32 against float64, in standard deviations of the logits, by `train`. Observed: 4e-6 with running
# statistics, 4e-5 with batch statistics of few values. The 1x1 level has the fewest: one value per image and channel. If their
# mean is r times their standard deviation, the one-pass variance has an error of r^2 x 6e-8. With three images, r reached 76 in
# one channel, and the error was 3e-5 to 2e-4, depending on how a JAX version rounds. With four images, r is at most 20, and all
# JAX versions agree.
TOLERANCE = {False: 2e-5, True: 1e-4}
IMAGES = 4
VARIANTS = [  # (train, size, overrides of config.model); together they cover every value of every option
    (True, (33, 47), {}),
    (
        True,
        (50, 65),
        {
            "stem": "deep32",
            "output_stride": 32,
            "reduce_channels": False,
            "head_kernel": 1,
            "align_corners": False,
            "auxiliary": False,
        },
    ),
    (
        False,
        (65, 50),
        {"output_stride": 16, "first_block_dilation": "half", "bins": (1,), "pool": "max", "align_corners": False},
    ),
    (False, (41, 48), {"depth": 50, "stride_in": "conv1x1", "first_block_dilation": "half", "stem": "conv7", "bins": ()}),
    (False, (57, 40), {"depth": 50, "factored_head": False}),
]


def small(**overrides: object) -> models.PSPNet:
    return models.build(small_config(**overrides), num_classes=5)


def small_config(**overrides: object) -> ConfigDict:
    model = base_config().model
    model.update({"depth": 18, "width": 8, "dropout": 0.0} | overrides)
    return model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def shapes(network: models.PSPNet, size: tuple[int, int] = (65, 65)) -> dict:
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: network.init(key, x, train=False), jax.random.key(0), images)


def count(tree: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("depth", "stem", "num_classes"), PARAMETERS)
def test_parameter_counts_are_those_of_the_reference_implementations(depth, stem, num_classes):
    model = base_config().model
    model.update(depth=depth, stem=stem)
    params = shapes(models.build(model, num_classes))["params"]
    without = {name: tree for name, tree in params.items() if not name.startswith("auxiliary")}
    assert (count(params), count(without)) == PARAMETERS[depth, stem, num_classes]


def test_without_the_auxiliary_head_only_its_variables_are_missing():
    variables, without = shapes(small()), shapes(small(auxiliary=False))
    for part, missing in (("params", {"auxiliary_conv", "auxiliary_classifier"}), ("batch_stats", {"auxiliary_conv"})):
        assert set(variables[part]) - set(without[part]) == missing
        assert without[part] == {name: variables[part][name] for name in without[part]}


def test_depth_269_has_the_parameters_of_152_plus_the_extra_blocks():
    def block(width: int) -> int:  # two 1x1, one 3x3, their norms; identity shortcut
        return 4 * width * width * 2 + 9 * width * width + 2 * (width + width + 4 * width)

    model = base_config().model
    model.depth = 269
    extra = (30 - 8) * block(128) + (48 - 36) * block(256) + (8 - 3) * block(512)
    assert count(shapes(models.build(model, 150))["params"]) == 83_816_684 + extra


@pytest.mark.parametrize(("train", "size", "overrides"), VARIANTS)
def test_network_equals_the_float64_reference(train, size, overrides):
    network, images = small(**overrides), noise(IMAGES, *size, 3)
    variables = reference.random_variables(network, images, False)
    apply = jax.jit(lambda v, x: network.apply(v, x, train=train, mutable=["batch_stats"]))
    outputs, updates = apply(variables, images)

    model = reference.Network(small_config(**overrides), variables, train)
    outputs = [logits and logits.upsample() for logits in outputs] if train else (outputs, None)
    for output, expected in zip(outputs, model(images), strict=True):
        assert (output is None) == (expected is None)
        if output is not None:
            error = reference.relative_error(output, expected)
            print(f"float32 against float64, in standard deviations: {error:.1e}")
            assert output.shape == (IMAGES, *size, 5)
            assert error < TOLERANCE[train]
    statistics = traverse_util.flatten_dict(updates["batch_stats"], sep="/")
    for path, expected in model.statistics.items():
        np.testing.assert_allclose(statistics[path], expected, atol=1e-4 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (96, 64), (473, 713)])
def test_any_input_size_gives_logits_of_that_size(size):
    network = small()
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    logits = jax.eval_shape(lambda v, x: network.apply(v, x, train=False), shapes(network), images)
    assert logits.shape == (2, *size, 5)


def train_shapes(images: int, **overrides: object) -> jax.ShapeDtypeStruct:
    network = small(**overrides)
    x = jax.ShapeDtypeStruct((images, 41, 41, 3), jnp.float32)
    (logits, _), _ = jax.eval_shape(lambda v, x: network.apply(v, x, train=True, mutable=["batch_stats"]), shapes(network), x)
    return jax.eval_shape(models.CoarseLogits.upsample, logits)


def test_training_on_one_image_is_refused_only_where_batch_norm_has_one_value():
    with pytest.raises(
        ValueError, match=r"pyramid/level0/bn sees one value per channel.*frozen statistics, or without the 1x1"
    ):
        train_shapes(1)
    for overrides in ({"norm": "frozen"}, {"bins": (2, 3, 6)}, {"bins": ()}):
        assert train_shapes(1, **overrides).shape == (1, 41, 41, 5)
    assert train_shapes(2).shape == (2, 41, 41, 5)


def test_frozen_training_equals_inference_except_for_dropout():
    images = noise(1, 41, 41, 3)
    network, dropping = small(norm="frozen"), small(norm="frozen", dropout=0.5)
    variables = reference.random_variables(network, images, False)

    @jax.jit
    def compute(seed):
        inferred = dropping.apply(variables, images, train=False)
        (trained, _), updates = network.apply(variables, images, train=True, mutable=["batch_stats"])
        dropped = dropping.apply(variables, images, train=True, rngs={"dropout": jax.random.key(seed)})
        return inferred, trained.upsample(), updates["batch_stats"], [logits.upsample() for logits in dropped]

    inferred, trained, statistics, dropped = compute(0)
    assert reference.relative_error(trained, inferred) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, statistics, variables["batch_stats"])
    for head, other_seed in zip(dropped, compute(1)[-1], strict=True):
        assert reference.relative_error(head, other_seed) > 0.1


def test_recomputing_for_the_gradient_stores_less_and_changes_nothing():
    """What is stored, not what is allocated: on CPUs, XLA merges equal computations and so stores the values all the same."""
    images = noise(2, 65, 65, 3)
    variables = reference.random_variables(small(), images, False)
    key = jax.random.key(0)

    def compute(remat):
        network = small(remat=remat, dropout=0.1)

        def total(params):
            both = {"params": params, "batch_stats": variables["batch_stats"]}
            outputs, updates = network.apply(both, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
            return sum(jnp.sum(jnp.sin(logits.scores)) for logits in outputs), updates["batch_stats"]

        stored = jax.eval_shape(lambda params: jax.vjp(total, params, has_aux=True)[1], variables["params"])
        size = sum(x.size for x in jax.tree.leaves(stored)) - sum(x.size for x in jax.tree.leaves(variables["params"]))
        return jax.jit(jax.grad(total, has_aux=True))(variables["params"]), size

    expected, most = compute("none")
    for remat, share in (("norm", 0.6), ("block", 0.4)):
        found, stored = compute(remat)
        worst = max(jax.tree.leaves(jax.tree.map(reference.relative_error, found, expected)))
        print(f"{remat}: {stored / most:.2f} of the values; results differ by up to {worst:.1e} standard deviations")
        assert worst < 1e-3
        assert stored < share * most


def test_dropout_drops_whole_channels_in_training_only():
    channels, rate = 400, 0.25
    classifier = models.Classifier(channels, rate)
    variables = {"params": {"kernel": jnp.eye(channels)[None, None], "bias": jnp.zeros(channels)}}  # identity
    x = jnp.ones((2, 3, 5, channels))
    y = np.asarray(classifier.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs((y == 0).mean() - rate) < 0.06  # four standard deviations of the mean of 800
    assert (y[0] != y[1]).any()
    np.testing.assert_array_equal(classifier.apply(variables, x, train=False), x)


def test_classifier_is_initialized_with_standard_deviation_one_hundredth_and_zero_bias():
    params = models.Classifier(100, 0.1).init(jax.random.key(0), jnp.ones((1, 1, 1, 512)), train=False)["params"]
    np.testing.assert_allclose(params["kernel"].std(), 0.01, rtol=0.02)
    np.testing.assert_array_equal(params["bias"], np.zeros(100))


def test_bfloat16_computes_the_same_network_with_float32_parameters_and_logits():
    images = noise(2, 41, 48, 3)
    network = small(dtype="bfloat16")
    variables = reference.random_variables(network, images, False)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(network))} == {np.dtype(np.float32)}
    logits = jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images)
    assert logits.dtype == jnp.float32
    expected, _ = reference.Network(small_config(), variables)(images)
    error = reference.relative_error(logits, expected)
    print(f"bfloat16 against float64, in standard deviations: {error:.1e}")
    assert 1e-3 < error < 0.1  # bfloat16 has 8 bits: a smaller error would mean that it was not used


def test_normalize_by_hand():
    statistics = base_config().normalize
    np.testing.assert_allclose(statistics.mean, np.array([0.485, 0.456, 0.406]) * 255)
    np.testing.assert_allclose(statistics.std, np.array([0.229, 0.224, 0.225]) * 255)
    pixels = models.normalize(jnp.array([[0, 0, 0], [255, 255, 255]], jnp.uint8), statistics)
    expected = [[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]]
    np.testing.assert_allclose(pixels, expected, rtol=1e-6)


@pytest.mark.parametrize("field", models.CHOICES)
def test_a_value_that_is_not_a_choice_is_refused_with_all_choices(field):
    choices = models.CHOICES[field]
    value = 7 if isinstance(choices[0], int) else "other"
    with pytest.raises(UserError) as error:
        small(**{field: value})
    assert str(error.value) == f"model.{field}={value!r}: expected one of {', '.join(map(repr, choices))}"


@pytest.mark.parametrize("bins", [(0, 1), (-2,), (1, 2, 2), (1, 101), (10**9,), tuple(range(1, 18))])
def test_impossible_bins_are_refused(bins):
    with pytest.raises(UserError, match=r"^model\.bins=.*: expected at most 16 distinct numbers from 1 to 100$"):
        small(bins=bins)


def test_a_network_without_classes_is_refused():
    with pytest.raises(UserError, match="num_classes=0: expected 1 or more"):
        models.build(small_config(), num_classes=0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 40, 48, 3), "uint8"),
        ((1, 40, 48, 4), "float32"),
        ((1, 3, 40, 48), "float32"),
        ((40, 48, 3), "float32"),
        ((0, 40, 48, 3), "float32"),
        ((1, 0, 48, 3), "float32"),
    ],
)
def test_images_that_are_not_normalized_are_refused(shape, dtype):
    network = small()
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda v, x: network.apply(v, x, train=False), shapes(network), jax.ShapeDtypeStruct(shape, dtype))
    assert str(error.value).startswith(f"images are {dtype}{list(shape)}: expected float32[N, H, W, 3]")


def test_build_names_every_invalid_value_and_its_choices():
    with pytest.raises(UserError, match=r"(?s)model\.stem='wide': expected one of 'deep', .*model\.dropout=1.0: expected"):
        small(stem="wide", dropout=1.0)
