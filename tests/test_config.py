"""Recipes can be loaded and have the published values; saved configs are restored unchanged."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import datasets, models, validation
from pspnet_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
# Settings of the paper (or else of the authors' code, hszhao/semseg) that all three benchmarks share.
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
    "augment.flip_probability": 0.5,
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


RECIPE = "from pspnet_jax.config import base_config\ndef get_config(config=base_config()):\n  {}\n  return config\n"


def recipe(name: str) -> ConfigDict:
    return configs.load_recipe(str(FOLDER / f"{name}.py"))


def changed(overrides: dict[str, object]) -> ConfigDict:
    """base_config() with fields changed, such as {"model.depth": 18}."""
    config = configs.base_config()
    config.update_from_flattened_dict(overrides)
    return config


def test_a_misspelled_field_or_a_wrong_type_is_refused_by_name():
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
def test_a_recipe_with_a_misspelled_field_or_a_wrong_type_is_refused(tmp_path, line, problem):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from pspnet_jax.config import base_config\ndef get_config():\n  config = base_config()\n  {line}\n  return config\n"
    )
    with pytest.raises(ValueError, match=f"(?s)mine.py: .*{problem}"):
        configs.load_recipe(str(path))


def test_a_recipe_that_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py: no such file or recipe; the recipes are ade20k, camvid, "):
        configs.load_recipe("nowhere.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py: it defines no function get_config"):
        configs.load_recipe(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match=r"camvid\.py:101: "):  # it takes no argument
        configs.load_recipe(str(FOLDER / "camvid.py:101"))


def test_a_file_whose_path_has_colons(tmp_path):
    path = tmp_path / "a:b" / "mine.py"
    path.parent.mkdir()
    path.write_text((FOLDER / "ade20k.py").read_text())
    assert configs.load_recipe(str(path)).model.depth == 50
    assert configs.load_recipe(f"{path}:101").model.depth == 101


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("config.my_field = 3", r'line 4: AttributeError: .Key "my_field" does not exist and cannot be added.{,40}$'),
        ("config.unlock(); config.my_field = 3", "unknown field my_field; --help lists all fields"),
        (
            "config.unlock(); del config.name; config.name = required_placeholder(str)",
            "RequiredValueError: None value found in required",
        ),
    ],
)
def test_fields_that_do_not_exist_or_have_no_value(tmp_path, body, problem):
    path = tmp_path / "mine.py"
    path.write_text(f"from ml_collections.config_dict import *\n{RECIPE.format(body)}")
    with pytest.raises(UserError, match=problem) as refusal:
        configs.load_recipe(str(path))
    assert len(str(refusal.value)) < 300


def test_a_frozen_config_is_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"from ml_collections import FrozenConfigDict\n{RECIPE.format('config = FrozenConfigDict(config)')}")
    assert_same(configs.load_recipe(str(path)), configs.base_config())


def test_wrong_types_and_unknown_fields_in_a_saved_config(tmp_path, caplog):
    path = tmp_path / "config.json"
    path.write_text('{"batch_size": "4", "thoughts": 1}')
    assert configs.read(path).batch_size == 16
    assert [record.getMessage() for record in caplog.records] == [
        "the saved config has batch_size='4', not of the type of 16; the field is ignored",
        "the saved config has thoughts=1, which this version does not know; the field is ignored",
    ]
    path.write_text("[]")
    with pytest.raises(
        UserError, match=r"config.json: cannot be read as a saved config \(not a JSON object\); restore the file"
    ):
        configs.read(path)


def assert_same(config: ConfigDict, other: ConfigDict) -> None:
    for (field, value), (other_field, other_value) in zip(configs.leaves(config), configs.leaves(other), strict=True):
        assert (field, value, type(value)) == (other_field, other_value, type(other_value))


def test_a_saved_config_is_restored_with_its_types():
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
def test_every_recipe_is_valid_and_can_be_saved(name):
    config = recipe(name)
    validation.validate(config)
    assert config.is_locked
    assert config.name.startswith(name)
    assert_same(configs.from_dict(json.loads(configs.to_json(config))), config)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_recipes_have_the_published_values(name):
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
        validation.validate(configs.load_recipe(f"{FOLDER / name}.py:51"))


def test_the_last_value_of_a_field_wins_for_tuples_and_in_all_forms():
    config = configs.override(
        configs.base_config(), ["--config.augment.scale=1.0,2.0", "--config.seed", "-1", "--config.augment.scale=0.25,4.0"]
    )
    assert (config.augment.scale, config.seed) == ((0.25, 4.0), -1)
    assert not configs.override(configs.base_config(), ["--config.eval.flip=true", "--noconfig.eval.flip"]).eval.flip


def test_a_saved_field_that_no_longer_exists_is_ignored_with_a_warning(caplog):
    saved = configs.base_config().to_dict()
    saved["optimizer"]["nesterov"], saved["loss"]["terms"], saved["batch_size"] = True, 7, 4
    restored = configs.from_dict(saved)
    assert restored.batch_size == 4
    assert restored.loss.terms == "cross_entropy"
    assert caplog.messages == [
        "the saved config has loss.terms=7, not of the type of 'cross_entropy'; the field is ignored",
        "the saved config has optimizer.nesterov=True, which this version does not know; the field is ignored",
    ]
