import pathlib
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pspnet_jax import models, optimizers
from pspnet_jax.config import load_recipe
from pspnet_jax.errors import UserError
from tests.train import tiny_config

RECIPES = {path.stem: path for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")}

# base * (1 - x)^0.9 for x = s / total and s = 0..9, as base * (1 - 0.9 x - 0.045 x^2 - 0.0165 x^3), rounded to 11 places
BY_HAND = {
    "ade20k": """0.01000000000 0.00999994000 0.00999988000 0.00999982000 0.00999976000
        0.00999970000 0.00999964000 0.00999958000 0.00999952000 0.00999946000""",  # 150,000 steps
    "cityscapes": """0.01000000000 0.00999990000 0.00999980000 0.00999970000 0.00999960000
        0.00999950000 0.00999940000 0.00999930000 0.00999920000 0.00999910000""",  # 90,000 steps
    "voc2012": """0.01000000000 0.00999970000 0.00999940000 0.00999910000 0.00999879999
        0.00999849999 0.00999819998 0.00999789998 0.00999759997 0.00999729996""",  # 30,000 steps
    "camvid": """0.05000000000 0.04994374648 0.04988748592 0.04983121832 0.04977494365
        0.04971866191 0.04966237309 0.04960607718 0.04954977418 0.04949346406""",  # base 0.05, 800 steps
    "quickstart": """0.00300000000 0.00298311971 0.00296622881 0.00294932721 0.00293241485
        0.00291549165 0.00289855755 0.00288161246 0.00286465631 0.00284768904""",  # base 0.003, 160 steps
}


def first_rates(recipe):
    config = load_recipe(str(RECIPES[recipe]))
    rate = optimizers.learning_rate(config.optimizer, config.total_steps)
    return config, [float(rate(step)) for step in range(10)]


# One step of the longest schedule changes the rate by 6e-8; float32 near 0.01 is exact to 5e-10
@pytest.mark.parametrize("recipe", BY_HAND)
def test_first_ten_rates_worked_out_by_hand(recipe):
    _, rates = first_rates(recipe)
    np.testing.assert_allclose(rates, np.array(BY_HAND[recipe].split(), np.float64), rtol=2e-7)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_first_ten_rates_of_each_recipe_computed_with_forty_digits(recipe):
    config, rates = first_rates(recipe)
    optimizer, total = config.optimizer, Decimal(config.total_steps)
    base, end, power = (Decimal(str(x)) for x in (optimizer.learning_rate, optimizer.end_rate, optimizer.power))
    warmup = Decimal(config.optimizer.warmup_steps or 1)
    with localcontext(prec=40):
        expected = [
            float((end + (base - end) * (1 - step / total) ** power) * min(1, (step + 1) / warmup)) for step in range(10)
        ]
    np.testing.assert_allclose(rates, expected, rtol=2e-7)


def test_poly_ends_at_zero_and_is_multiplied_by_the_warm_up():
    config = tiny_config().optimizer
    config.update(learning_rate=0.01, power=1.0, warmup_steps=4)
    rate = optimizers.learning_rate(config, 10)
    # 0.01 x (1, 0.9, 0.8, 0.7, 0.6, 0.5) x (1/4, 2/4, 3/4, 1, 1, 1); 0 at the end
    expected = [0.0025, 0.0045, 0.006, 0.007, 0.006, 0.005]
    np.testing.assert_allclose([rate(step) for step in range(6)], expected, rtol=1e-6)
    assert rate(10) == 0
    config.update(end_rate=0.002, warmup_steps=0)
    rate = optimizers.learning_rate(config, 10)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10)], [0.01, 0.006, 0.002], rtol=1e-6)


PARAMS = {
    "backbone": {"stem_conv1": {"conv": {"kernel": [0.3, -0.2]}, "bn": {"scale": [1.0, 0.9], "bias": [0.1, -0.1]}}},
    "head_bn": {"scale": [1.1, 0.8], "bias": [0.2, 0.0]},
    "classifier": {"kernel": [0.5, -0.4], "bias": [0.05, -0.05]},
}


def torch_sgd(params, gradients, config, total_steps):
    """torch.optim.SGD after clip_grad_norm_, with two parameter groups and the poly schedule, in float64 over flat dicts."""
    params, buffers = dict(params), {name: 0.0 for name in params}
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        rate = config.learning_rate * (1 - step / total_steps) ** config.power
        for name, p in params.items():
            d = clip * gradient[name]
            if config.decay_norm or not name.split("/")[-2].endswith("bn"):
                d = d + config.weight_decay * p
            buffers[name] = config.momentum * buffers[name] + d
            params[name] = p - (rate if name.startswith("backbone") else config.head_multiplier * rate) * buffers[name]
    return params


@pytest.mark.parametrize("decay_norm", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_sgd_equals_torchs_rule(decay_norm, clip_norm):
    config = tiny_config().optimizer
    config.update(weight_decay=0.05, decay_norm=decay_norm, clip_norm=clip_norm, warmup_steps=0)
    flat = {k: np.array(v) for k, v in traverse_util.flatten_dict(PARAMS, sep="/").items()}
    random = np.random.default_rng(0)
    gradients = [{k: scale * random.normal(size=2) for k in flat} for scale in (0.2, 0.5, 0.8, 1.4, 1.8)]
    norms = [np.linalg.norm(list(g.values())) for g in gradients]
    assert min(norms) < 2 < max(norms)  # some are clipped and some are not

    optimizer = optimizers.build(config, total_steps=8)
    params = traverse_util.unflatten_dict({k: jnp.array(v, jnp.float32) for k, v in flat.items()}, sep="/")
    state = optimizer.transformation.init(params)
    for gradient in gradients:
        tree = traverse_util.unflatten_dict({k: jnp.array(v, jnp.float32) for k, v in gradient.items()}, sep="/")
        updates, state = optimizer.transformation.update(tree, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    ours, expected = traverse_util.flatten_dict(params, sep="/"), torch_sgd(flat, gradients, config, 8)
    for name in flat:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("decay_norm", [False, True])
def test_parameter_groups_of_the_whole_network(decay_norm):
    """If the gradient is 0 and all parameters are 1, an update is -rate * multiplier * decay."""
    config = tiny_config()
    config.optimizer.update(learning_rate=0.5, weight_decay=0.25, decay_norm=decay_norm, clip_norm=0.0, warmup_steps=0)
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    model = models.build(config.model, 3)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    params = jax.tree.map(lambda x: np.ones(1, np.float32), variables["params"])  # the path alone decides
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    transformation = optimizer.transformation
    updates, _ = transformation.update(jax.tree.map(np.zeros_like, params), transformation.init(params), params)

    normalized = {path[:-1] for path in traverse_util.flatten_dict(variables["batch_stats"])}
    expected = {
        path: -0.125 * (1 if path[0] == "backbone" else 10) * (decay_norm or path[:-1] not in normalized)
        for path in traverse_util.flatten_dict(params)
    }
    assert {path: float(u[0]) for path, u in traverse_util.flatten_dict(updates).items()} == expected


def test_layer_decay_and_freezing_by_hand():
    """The rate of each stage is 0.5 times that of the next; if the gradient is 0 and all parameters are 1, only decay moves."""
    stages = ("stem_conv1", "layer1_block0", "layer2_block0", "layer3_block1", "layer4_block0", "mine")
    params = {"backbone": {stage: {"kernel": jnp.ones(1)} for stage in stages}, "classifier": {"kernel": jnp.ones(1)}}
    config = tiny_config().optimizer
    config.update(learning_rate=1.0, weight_decay=0.25, clip_norm=0.0, warmup_steps=0, layer_decay=0.5, freeze="layer1")
    for name, rate in (("sgd", 0.25), ("adamw", 0.25), ("lars", 0.001)):  # lars: trust coefficient
        config.name = name
        transformation = optimizers.build(config, 1000).transformation
        state = transformation.init(params)
        for gradient in (0.0, 1.0, 2.0):  # frozen parameters stay exactly the same
            updates, state = transformation.update(jax.tree.map(lambda p, g=gradient: g * p, params), state, params)
            flat = {path[-2]: float(u[0]) for path, u in traverse_util.flatten_dict(updates).items()}
            assert flat["stem_conv1"] == flat["layer1_block0"] == 0
            if not gradient:
                multipliers = {"layer2_block0": 0.125, "layer3_block1": 0.25, "layer4_block0": 0.5, "mine": 1, "classifier": 10}
                np.testing.assert_allclose([flat[k] for k in multipliers], [-rate * m for m in multipliers.values()], rtol=1e-6)
    config.freeze = ""
    rates = optimizers.by_path(optimizers.rate_rules(config), params)
    assert (rates["backbone"]["stem_conv1"]["kernel"], rates["backbone"]["layer1_block0"]["kernel"]) == (1 / 32, 1 / 16)


def test_optimizer_state_has_one_structure_for_all_options_so_that_a_run_can_resume_with_other_ones():
    params = jax.tree.map(jnp.asarray, PARAMS, is_leaf=lambda x: isinstance(x, list))
    config = tiny_config().optimizer
    structures = set()
    for changed in (
        {},
        {"decay_norm": True},
        {"clip_norm": 0.0},
        {"warmup_steps": 0},
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"freeze": "layer2", "layer_decay": 0.5},
    ):
        options = config.copy_and_resolve_references()
        options.update(changed)
        structures.add(jax.tree.structure(optimizers.build(options, 8).transformation.init(params)))
    assert len(structures) == 1


def updates_of(config, gradients, steps=1):
    """Returns the updates of the last of `steps` steps with the same gradients."""
    transformation = optimizers.build(config, total_steps=1000).transformation
    params = jax.tree.map(jnp.asarray, PARAMS, is_leaf=lambda x: isinstance(x, list))
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(gradients, state, params)
    return {name: np.asarray(u) for name, u in traverse_util.flatten_dict(updates, sep="/").items()}


def test_adamw_by_hand():
    """Adam's first update is rate * gradient / |gradient|; the decay is added to it, except for BatchNorm."""
    config = tiny_config().optimizer
    config.update(name="adamw", learning_rate=0.01, weight_decay=0.5, clip_norm=0.0, warmup_steps=0, head_multiplier=10.0)
    gradients = jax.tree.map(lambda x: jnp.array([0.2, -3.0]), PARAMS, is_leaf=lambda x: isinstance(x, list))
    updates = updates_of(config, gradients)
    sign = np.array([1.0, -1.0])
    np.testing.assert_allclose(updates["backbone/stem_conv1/bn/scale"], -0.01 * sign, rtol=1e-5)
    kernel = np.array(PARAMS["backbone"]["stem_conv1"]["conv"]["kernel"])
    np.testing.assert_allclose(updates["backbone/stem_conv1/conv/kernel"], -0.01 * (sign + 0.5 * kernel), rtol=1e-5)
    kernel = np.array(PARAMS["classifier"]["kernel"])
    np.testing.assert_allclose(updates["classifier/kernel"], -0.1 * (sign + 0.5 * kernel), rtol=1e-5)


def test_lars_by_hand():
    """An update is rate * trust * |p| / |g + decay p| * (g + decay p); that of a bias rate * (g + decay p), also if p is 0.

    BatchNorm's parameters have no decay.
    """
    config = tiny_config().optimizer
    config.update(name="lars", learning_rate=0.01, weight_decay=0.5, clip_norm=0.0, warmup_steps=0, head_multiplier=10.0)
    gradient = np.array([0.2, -3.0])
    gradients = jax.tree.map(lambda x: jnp.asarray(gradient), PARAMS, is_leaf=lambda x: isinstance(x, list))
    updates = updates_of(config, gradients)
    np.testing.assert_allclose(updates["head_bn/scale"], -0.1 * gradient, rtol=1e-5)
    kernel = np.array(PARAMS["classifier"]["kernel"])
    direction = gradient + 0.5 * kernel
    expected = -0.1 * 0.001 * np.linalg.norm(kernel) / np.linalg.norm(direction) * direction
    np.testing.assert_allclose(updates["classifier/kernel"], expected, rtol=1e-5)
    bias = np.array(PARAMS["classifier"]["bias"])
    np.testing.assert_allclose(updates["classifier/bias"], -0.1 * (gradient + 0.5 * bias), rtol=1e-5)
    transformation, zeros = optimizers.build(config, total_steps=1000).transformation, {"mine": {"bias": jnp.zeros(2)}}
    found, _ = transformation.update({"mine": {"bias": jnp.asarray(gradient)}}, transformation.init(zeros), zeros)
    np.testing.assert_allclose(found["mine"]["bias"], -0.1 * gradient, rtol=1e-5)
    twice = updates_of(config, gradients, steps=2)
    ratio = twice["classifier/kernel"] / expected  # momentum 0.9 after the rate, which falls by 0.9/1000 a step
    np.testing.assert_allclose(ratio, 1 + 0.9, rtol=2e-3)


def test_the_first_rule_that_matches_the_whole_path_decides_and_every_parameter_needs_one():
    params = jax.tree.map(jnp.asarray, PARAMS, is_leaf=lambda x: isinstance(x, list))
    values = optimizers.by_path(
        (("backbone/.*/kernel", 1.0), (".*bn/.*", 2.0), ("classifier", 9.0), ("classifier/.*", 3.0)), params
    )
    flat = traverse_util.flatten_dict(values, sep="/")
    assert flat == {
        "backbone/stem_conv1/conv/kernel": 1.0,
        "backbone/stem_conv1/bn/scale": 2.0,
        "backbone/stem_conv1/bn/bias": 2.0,
        "head_bn/scale": 2.0,
        "head_bn/bias": 2.0,
        "classifier/kernel": 3.0,
        "classifier/bias": 3.0,
    }
    with pytest.raises(UserError, match=r"no rule covers the parameter classifier/bias; the patterns are backbone/.*, .*bn/"):
        optimizers.by_path((("backbone/.*", 1.0), (".*bn/.*", 2.0)), params)


def test_an_unknown_optimizer_is_refused_with_the_choices():
    config = tiny_config().optimizer
    config.name = "adam"
    with pytest.raises(UserError, match=r"optimizer.name='adam': expected one of sgd, adamw, lars"):
        optimizers.build(config, 10)
