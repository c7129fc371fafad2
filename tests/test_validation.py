"""Invalid values are refused before anything compiles; the message has the field and the allowed values."""

import pytest

from pspnet_jax import validation
from pspnet_jax.config import base_config
from tests.test_config import changed


def test_the_default_config_is_valid_if_the_devices_divide_its_batch():
    validation.validate(base_config(), num_devices=16)
    with pytest.raises(ValueError, match="batch_size=16: expected a multiple of 32"):
        validation.validate(base_config(), num_devices=32)


@pytest.mark.parametrize("field", validation.CHOICES)
def test_an_unknown_choice_is_refused_with_all_choices(field):
    choices = validation.CHOICES[field]
    value = "other"
    with pytest.raises(ValueError) as error:
        validation.validate(changed({field: value}))
    assert str(error.value) == f"{field}={value!r}: expected one of {', '.join(map(repr, choices))}"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("batch_size", 0, "more than 0"),
        ("total_steps", 0, "more than 0"),
        ("total_steps", 99999999999, "numbers below 2147483648"),
        ("optimizer.learning_rate", float("inf"), "numbers below 2147483648"),
        ("normalize.mean", (123.0, float("nan"), 103.0), "numbers below 2147483648"),
        ("seed", -(2**31) - 1, "a whole number from -2147483648 to 4294967295"),
        ("model.width", 12, "a multiple of 8"),
        ("model.output_stride", 0, "one of 8, 16, 32"),
        ("model.bins", (0, 1), "distinct numbers from 1 to 100"),
        ("model.bins", (1.5, 2), "values of type int"),
        ("model.dropout", 1.0, "a value from 0 up to, not including, 1"),
        ("augment.scale", (2.0, 0.5), "1/16 <= low <= high <= 16"),
        ("augment.scale", (50.0, 200.0), "1/16 <= low <= high <= 16; 1.0 keeps the size"),  # not percent
        ("augment.scale", (0.5,), "2 values of type float"),
        ("augment.flip_probability", 1.5, "a value from 0 to 1"),
        ("augment.contrast", (1.5, 0.5), "(low, high) with 0 <= low <= high"),
        ("augment.saturation", (0.5, 1.5, 1.0), "2 values of type float"),
        ("augment.hue", -1, "0 or more"),
        ("optimizer.layer_decay", 0.0, "a value above 0 and at most 1"),
        ("augment.crop", (32, 473), "each at least 33 pixels"),
        ("augment.crop", (473,), "2 values of type int"),
        ("augment.crop", ("473", "473"), "2 values of type int"),
        ("eval.crop", (473, 32), "each at least 33 pixels"),
        ("eval.scales", (), "one or more scales of 1/16 or more"),
        ("eval.scales", (1.0, 0.001), "one or more scales of 1/16 or more"),
        ("eval.base_size", 1, "at least 33 pixels, or 0"),
        ("normalize.std", (0.229, 0.224, 0.225), "values of 1 or more, on the 0..255 scale; multiply"),
        ("optimizer.warmup_steps", 150_001, "at most total_steps=150000"),
        ("normalize.std", (58.0, 57.0), "3 values of type float"),
        ("optimizer.learning_rate", 0.0, "more than 0"),
        ("optimizer.accumulate", 0, "more than 0"),
        ("optimizer.momentum", 1.0, "a value from 0 up to, not including, 1"),
        ("optimizer.weight_decay", -1e-4, "0 or more"),
        ("every.eval", -1, "0 or more"),
        ("eval.stride", (474, 0), "values from 0 to eval.crop=(473, 473)"),
        ("eval.short_size", 512, "0, or eval.protocol='mmseg'"),
        ("eval.base_size", -1, "0 or more"),
        ("dataset.balance", 1.5, "a value from 0 to 1"),
        ("dataset.mixture", ("folder", "data", "train", 1.0), "tuples ('name', 'root', 'split', weight)"),
        ("dataset.mixture", (("folder", "data", "train"),), "tuples ('name', 'root', 'split', weight)"),
        ("dataset.mixture", (("folder", "data", "train", "2"),), "the weight is above 0 and below 1000"),
        ("dataset.mixture", (("folder", "data", "train", 0),), "the weight is above 0 and below 1000"),
        ("dataset.mixture", (("camvid", "data", "train", 1),), "the name is one of 'folder', "),
    ],
)
def test_an_invalid_value_is_refused_with_the_allowed_ones(field, value, allowed):
    with pytest.raises(ValueError) as error:
        validation.validate(changed({field: value}))
    problem = str(error.value)
    assert problem.startswith(f"{field}={value}: expected ")
    assert allowed in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "fields", [{"labels": "labels/{name}_{tail}_{tail}.png"}, {"images": "{split}.png"}, {"labels": "0.png"}]
)
def test_patterns_without_a_name_or_with_two_tails_are_refused(fields):
    with pytest.raises(ValueError, match=r"with one \{name\} each, and at most one \{tail\}; only a COCO file"):
        validation.validate(changed({f"dataset.{side}": pattern for side, pattern in fields.items()}))
    validation.validate(changed({"dataset.labels": "labels/{name}_road{tail}.png"}))
    validation.validate(changed({"dataset.labels": "labels/{split}.json"}))


@pytest.mark.parametrize("name", ["", "../elsewhere", ".hidden"])
def test_a_name_has_to_be_a_folder_name(name):
    with pytest.raises(ValueError, match="expected the name of a folder in runs/"):
        validation.validate(changed({"name": name}))


@pytest.mark.parametrize("field", ["augment.crop", "eval.crop"])
def test_bins_may_not_exceed_the_feature_map(field):
    for output_stride, crop in ((8, 40), (16, 80), (32, 160)):  # 5 features
        with pytest.raises(ValueError, match=r"model\.bins=\(1, 2, 3, 6\): the largest bin exceeds the feature map of 5 "):
            validation.validate(changed({field: (473, crop), "model.output_stride": output_stride}))
        validation.validate(changed({field: (473, crop + 1), "model.output_stride": output_stride}))
        validation.validate(changed({field: (crop, 473), "model.output_stride": output_stride, "model.bins": (1, 2, 3)}))
    validation.validate(changed({field: (33, 33), "model.bins": ()}))


def test_batch_size_is_a_multiple_of_devices_times_accumulate():
    for batch, devices, accumulate, unit in ((12, 8, 1, 8), (16, 8, 4, 32), (16, 1, 3, 3)):
        config = changed({"batch_size": batch, "optimizer.accumulate": accumulate})
        with pytest.raises(ValueError, match=rf"^batch_size={batch}: expected a multiple of {unit} \({devices} device"):
            validation.validate(config, devices)
        config.batch_size = 2 * unit
        validation.validate(config, devices)


def test_batch_norm_over_one_image_is_refused_unless_it_can_work():
    for one_image in ({"batch_size": 1}, {"optimizer.accumulate": 16}):
        with pytest.raises(
            ValueError, match=r"variance is 0.*2 or more images, model\.norm='frozen', or model\.bins without 1"
        ):
            validation.validate(changed(one_image))
        validation.validate(changed(one_image | {"model.norm": "frozen"}))
        validation.validate(changed(one_image | {"model.bins": (2, 3, 6)}))


def test_short_size_may_not_exceed_base_size():
    config = changed({"eval.protocol": "mmseg", "eval.base_size": 2048, "eval.short_size": 2048})
    validation.validate(config)
    config.eval.short_size = 2049
    with pytest.raises(ValueError, match=r"^eval\.short_size=2049: expected at most eval\.base_size=2048$"):
        validation.validate(config)


def test_freezing_needs_weights_to_keep():
    with pytest.raises(ValueError, match=r"^optimizer\.freeze='layer1': expected init_from, whose weights are kept$"):
        validation.validate(changed({"optimizer.freeze": "layer1"}))
    validation.validate(changed({"optimizer.freeze": "layer1", "init_from": "runs/other"}))


@pytest.mark.parametrize(("field", "value"), [("brightness", 32.0), ("contrast", (0.5, 1.5)), ("hue", 18)])
@pytest.mark.parametrize("other", [{"dataset.image_dtype": "float32"}, {"model.channels": 1}])
def test_colors_change_only_in_rgb_images_of_8_bits(field, value, other):
    validation.validate(changed({f"augment.{field}": value}))
    if "model.channels" in other:
        other = other | {"normalize.mean": (100.0,), "normalize.std": (50.0,)}
    validation.validate(changed(other))
    with pytest.raises(ValueError, match=rf"^augment\.{field}=.*: expected .* changes only images with model\.channels=3 and "):
        validation.validate(changed({f"augment.{field}": value} | other))


def test_all_problems_are_listed_at_once():
    wrong = {"batch_size": 3, "model.depth": 51, "augment.crop": (1, 1), "eval.protocol": "other", "eval.batch_size": -1}
    with pytest.raises(ValueError) as error:
        validation.validate(changed(wrong), num_devices=2)
    assert {line.split("=")[0] for line in str(error.value).splitlines()} == set(wrong)
