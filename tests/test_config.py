"""Wrong values are refused with the allowed ones; saved configs come back as they were; recipes hold the published numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, models

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
# What the paper (or else the authors' code, hszhao/semseg) trains and tests with on all three benchmarks.
PUBLISHED = {
    "batch_size": 16,
    "model.width": 64,
    "model.stem": "deep",
    "model.output_stride": 8,
    "model.bins": (1, 2, 3, 6),
    "model.pool": "average",
    "model.auxiliary": True,
    "model.dropout": 0.1,
    "augment.scale": (0.5, 2.0),
    "augment.rotate_degrees": 10.0,
    "augment.mirror_probability": 0.5,
    "loss.auxiliary_weight": 0.4,
    "loss.auxiliary_schedule": "constant",
    "optimizer.learning_rate": 0.01,
    "optimizer.power": 0.9,
    "optimizer.head_multiplier": 10.0,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_norm": False,
    "eval.inference": "windows",
    "eval.flip": True,
}
BENCHMARKS = {  # recipe: classes, parameters, crop, depth, steps, probability of rotation and blur, base size
    "ade20k": (150, 49_180_908, 473, 50, 150_000, 0.5, 512),
    "voc2012": (21, 68_073_706, 473, 101, 30_000, 0.5, 512),
    "cityscapes": (19, 68_072_166, 713, 101, 90_000, 0.0, 2048),
}


def recipe(name: str) -> ConfigDict:
    return configs.load_recipe(str(FOLDER / f"{name}.py"))


def changed(overrides: dict[str, object]) -> ConfigDict:
    """base_config() with fields changed, such as {"model.depth": 18}."""
    config = configs.base_config()
    config.update_from_flattened_dict(overrides)
    return config


def test_the_default_config_is_possible_on_as_many_devices_as_divide_its_batch():
    configs.validate(configs.base_config(), num_devices=16)
    with pytest.raises(ValueError, match="batch_size=16: expected a multiple of 32"):
        configs.validate(configs.base_config(), num_devices=32)


@pytest.mark.parametrize("field", configs.CHOICES)
def test_a_value_outside_its_choices_is_refused_with_all_of_them(field):
    choices = configs.CHOICES[field]
    value = 7 if isinstance(choices[0], int) else "other"
    with pytest.raises(ValueError) as error:
        configs.validate(changed({field: value}))
    assert str(error.value) == f"{field}={value!r}: expected one of {', '.join(map(repr, choices))}"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("batch_size", 0, "more than 0"),
        ("total_steps", 0, "more than 0"),
        ("model.width", 12, "a multiple of 8"),
        ("model.output_stride", 0, "one of 8, 16, 32"),
        ("model.bins", (0, 1), "bins of 1 or more"),
        ("model.bins", (1.5, 2), "values of type int"),
        ("model.dropout", 1.0, "a value from 0 up to, not including, 1"),
        ("augment.scale", (2.0, 0.5), "0 < low <= high"),
        ("augment.scale", (0.5,), "2 values of type float"),
        ("augment.mirror_probability", 1.5, "a value from 0 to 1"),
        ("augment.crop", (32, 473), "each at least 33 pixels"),
        ("augment.crop", (473,), "2 values of type int"),
        ("augment.crop", ("473", "473"), "2 values of type int"),
        ("eval.crop", (473, 32), "each at least 33 pixels"),
        ("eval.scales", (), "one or more scales above 0"),
        ("normalize.std", (58.0, 57.0), "3 values of type float"),
        ("optimizer.learning_rate", 0.0, "more than 0"),
        ("optimizer.accumulate", 0, "more than 0"),
        ("optimizer.momentum", 1.0, "a value from 0 up to, not including, 1"),
        ("optimizer.weight_decay", -1e-4, "0 or more"),
        ("every.eval", -1, "0 or more"),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        configs.validate(changed({field: value}))
    problem = str(error.value)
    assert problem.startswith(f"{field}={value}: expected ")
    assert allowed in problem
    assert "\n" not in problem


@pytest.mark.parametrize("field", ["augment.crop", "eval.crop"])
def test_bins_may_not_exceed_the_feature_map(field):
    for output_stride, crop in ((8, 40), (16, 80), (32, 160)):  # 5 features
        with pytest.raises(ValueError, match=r"model\.bins=\(1, 2, 3, 6\): the largest bin exceeds the feature map of 5 "):
            configs.validate(changed({field: (473, crop), "model.output_stride": output_stride}))
        configs.validate(changed({field: (473, crop + 1), "model.output_stride": output_stride}))
        configs.validate(changed({field: (crop, 473), "model.output_stride": output_stride, "model.bins": (1, 2, 3)}))
    configs.validate(changed({field: (33, 33), "model.bins": ()}))


def test_a_batch_is_shared_out_over_devices_and_parts():
    for batch, devices, accumulate, unit in ((12, 8, 1, 8), (16, 8, 4, 32), (16, 1, 3, 3)):
        config = changed({"batch_size": batch, "optimizer.accumulate": accumulate})
        with pytest.raises(ValueError, match=rf"^batch_size={batch}: expected a multiple of {unit} \({devices} device"):
            configs.validate(config, devices)
        config.batch_size = 2 * unit
        configs.validate(config, devices)


def test_batch_norm_over_one_image_is_refused_unless_it_can_work():
    for one_image in ({"batch_size": 1}, {"optimizer.accumulate": 16}):
        with pytest.raises(
            ValueError, match=r"variance is 0.*2 or more images, model\.norm='frozen', or model\.bins without 1"
        ):
            configs.validate(changed(one_image))
        configs.validate(changed(one_image | {"model.norm": "frozen"}))
        configs.validate(changed(one_image | {"model.bins": (2, 3, 6)}))


def test_all_problems_are_listed_at_once():
    wrong = {"batch_size": 3, "model.depth": 51, "augment.crop": (1, 1), "eval.protocol": "other", "every.log": 0}
    with pytest.raises(ValueError) as error:
        configs.validate(changed(wrong), num_devices=2)
    assert {line.split("=")[0] for line in str(error.value).splitlines()} == set(wrong)


def test_a_misspelt_field_or_a_wrong_type_is_refused_by_name():
    config = recipe("ade20k")
    with pytest.raises(AttributeError, match='Did you mean "depth" instead of "dept"'):
        config.model.dept = 18
    with pytest.raises(TypeError, match=r"'depth'.*<class 'str'> and cannot be casted to type <class 'int'>"):
        config.model.depth = "18"
    with pytest.raises(TypeError, match=r"'bins'.*<class 'int'> and cannot be casted to type <class 'tuple'>"):
        config.model.bins = 6


@pytest.mark.parametrize(
    ("line", "problem"), [("config.model.dept = 18", "dept.*depth"), ("config.model.depth = '18'", "depth.*str.*int")]
)
def test_a_recipe_with_a_misspelt_field_or_a_wrong_type_is_refused(tmp_path, line, problem):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from pspnet_jax.config import base_config\ndef get_config():\n  config = base_config()\n  {line}\n  return config\n"
    )
    with pytest.raises(ValueError, match=f"(?s)mine.py: .*{problem}"):
        configs.load_recipe(str(path))


def test_a_recipe_that_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py: no such file; the recipes are in configs/"):
        configs.load_recipe("nowhere.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py: has no function get_config"):
        configs.load_recipe(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match=r"camvid\.py:101: "):  # it takes no argument
        configs.load_recipe(str(FOLDER / "camvid.py:101"))


def assert_same(config: ConfigDict, other: ConfigDict) -> None:
    for (field, value), (other_field, other_value) in zip(configs.leaves(config), configs.leaves(other), strict=True):
        assert (field, value, type(value)) == (other_field, other_value, type(other_value))


def test_a_saved_config_comes_back_with_its_types():
    colors = ((1, 2, 3), (4, 5, 6))
    config = changed({"dataset.class_names": ("a", "b"), "dataset.colors": colors, "model.bins": (), "eval.scales": (1.0, 1.5)})
    restored = configs.from_dict(json.loads(configs.to_json(config)))
    assert_same(restored, config)
    assert restored.dataset.colors == colors
    assert restored.is_locked


def test_a_saved_config_takes_new_fields_from_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"batch_size": 4, "model": {"depth": 18}}')
    expected = changed({"batch_size": 4, "model.depth": 18})
    assert_same(configs.read(tmp_path / "config.json"), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_possible_and_can_be_saved(name):
    config = recipe(name)
    configs.validate(config)
    assert config.is_locked
    assert config.name.startswith(name)
    assert_same(configs.from_dict(json.loads(configs.to_json(config))), config)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_recipes_hold_the_published_values(name):
    classes, parameters, crop, depth, steps, probability, base_size = BENCHMARKS[name]
    config = recipe(name)
    expected = PUBLISHED | {
        "model.depth": depth,
        "total_steps": steps,
        "augment.crop": (crop, crop),
        "augment.rotate_probability": probability,
        "augment.blur_probability": probability,
        "eval.crop": (crop, crop),
        "eval.base_size": base_size,
    }
    values = dict(configs.leaves(config))
    assert {field: values[field] for field in expected} == expected
    assert datasets.describe(config.dataset).num_classes == classes
    network, images = models.build(config.model, classes), jax.ShapeDtypeStruct((1, crop, crop, 3), jnp.float32)
    params = jax.eval_shape(lambda key, x: network.init(key, x, train=False), jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_recipes_take_another_depth(name):
    config = configs.load_recipe(f"{FOLDER / name}.py:152")
    assert (config.model.depth, config.name) == (152, f"{name}_152")
    with pytest.raises(ValueError, match=r"model\.depth=51: expected one of 18, "):
        configs.validate(configs.load_recipe(f"{FOLDER / name}.py:51"))
