"""The tables of configs/ablations have the paper's figures, and their rows differ only in what the tables vary."""

import pytest

from pspnet_jax import config as configs
from pspnet_jax import models, validation
from pspnet_jax.ablate import tables
from pspnet_jax.errors import UserError

# Zhao et al. 2017, tables 1 to 4: mIoU and pixel accuracy on ADE20K's validation set, in percent.
PUBLISHED = {
    "pooling": {
        "none": (37.23, 78.01),
        "B1_max": (39.94, 79.46),
        "B1_average": (40.07, 79.52),
        "B1236_max": (40.18, 79.45),
        "B1236_average": (41.07, 79.97),
        "B1236_max_DR": (40.87, 79.61),
        "B1236_average_DR": (41.68, 80.04),
    },
    "auxiliary": {
        "0": (35.82, 77.07),
        "0.3": (37.01, 77.87),
        "0.4": (37.23, 78.01),
        "0.6": (37.09, 77.84),
        "0.9": (36.99, 77.87),
    },
    "depth": {
        "50": (41.68, 80.04),
        "101": (41.96, 80.64),
        "152": (42.62, 80.80),
        "269": (43.81, 80.88),
        "50_ms": (42.78, 80.76),
        "101_ms": (43.29, 81.39),
        "152_ms": (43.51, 81.38),
        "269_ms": (44.94, 81.69),
    },
    "components": {
        "baseline": (34.28, 76.35),
        "augmentation": (35.82, 77.07),
        "auxiliary": (37.23, 78.01),
        "pyramid": (41.68, 80.04),
        "R269": (43.81, 80.88),
        "R269_ms": (44.94, 81.69),
    },
}
# What a table may change, and one row of each as (field, value) pairs.
VARIED = {
    "pooling": ("model.bins", "model.pool", "model.reduce_channels"),
    "auxiliary": ("model.bins", "model.auxiliary", "loss.auxiliary_weight"),
    "depth": ("model.depth", "eval.scales"),
    "components": ("augment.", "model.bins", "model.auxiliary", "model.depth", "eval.scales"),
    "variants": ("model.bins", "augment.crop", "eval.crop", "model.head_kernel", "loss.auxiliary_schedule"),
}
CROP = {"augment.crop": (320, 320), "eval.crop": (320, 320)}
EXAMPLES = {
    "pooling:B1_max": {"model.bins": (1,), "model.pool": "max"},
    "pooling:B1236_average": {"model.reduce_channels": False},
    "auxiliary:0": {"model.bins": (), "model.auxiliary": False},
    "auxiliary:0.9": {"model.bins": (), "loss.auxiliary_weight": 0.9},
    "depth:269_ms": {"model.depth": 269, "eval.scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)},
    "components:baseline": {
        "model.bins": (),
        "model.auxiliary": False,
        "augment.scale": (1.0, 1.0),
        "augment.rotate_probability": 0.0,
        "augment.blur_probability": 0.0,
        "augment.flip_probability": 0.0,
    },
    "components:pyramid": {},
    "variants:bins1248_320": {"model.bins": (1, 2, 4, 8), **CROP},
    "variants:head1x1": {"model.head_kernel": 1},
    "variants:decay": {"loss.auxiliary_schedule": "linear"},
}


def changes(name: str, base: str = "ade20k") -> dict[str, object]:
    """The fields of a recipe in configs/ablations that differ from the base recipe."""
    values = dict(configs.leaves(configs.load_recipe(base)))
    row = dict(configs.leaves(configs.load_recipe(f"ablations/{name}")))
    return {field: value for field, value in row.items() if value != values[field] and field != "name"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_and_order(name):
    table = tables.load(name)
    assert {row: details.published for row, details in table.rows.items() if details.published} == PUBLISHED[name]
    table = table.of_dataset("ade20k")
    assert {*table.rows} == {*PUBLISHED[name]}
    for better, worse in table.order:
        assert PUBLISHED[name][better][0] > PUBLISHED[name][worse][0]
    assert {row for pair in table.order for row in pair} == {*table.rows}


@pytest.mark.parametrize(("dataset", "base"), tables.BASES.items())
@pytest.mark.parametrize("name", VARIED)
def test_rows_are_valid_and_change_only_what_the_table_varies(name, dataset, base):
    for row in tables.load(name).of_dataset(dataset).rows:
        assert all(field.startswith(VARIED[name]) for field in changes(f"{name}:{row},{dataset}", base)), row
        config = configs.load_recipe(f"ablations/{name}:{row},{dataset}")
        validation.validate(config)
        models.build(config.model, 11)
        assert config.name.startswith(dataset)


@pytest.mark.parametrize("name", EXAMPLES)
def test_changes_of_a_row(name):
    assert changes(name) == EXAMPLES[name]


def test_rows_of_two_tables_that_are_the_same_have_the_same_name_and_others_have_not():
    named = {}
    for table in VARIED:
        for row in tables.load(table).of_dataset("ade20k").rows:
            recipe = f"ablations/{table}:{row}"
            named.setdefault(configs.load_recipe(recipe).name, []).append(changes(f"{table}:{row}"))
    assert all(values == same[0] for same in named.values() for values in same)
    assert len(named) == len({str(sorted(same[0].items())) for same in named.values()})
    assert configs.load_recipe("ablations/auxiliary:0.4,scenes").name == "scenes_bins-none"
    assert configs.load_recipe("ablations/components:auxiliary,scenes").name == "scenes_bins-none"


def test_small_datasets_have_their_own_depths():
    table = tables.load("depth").of_dataset("camvid")
    assert [*table.rows] == ["18", "34", "50", "50_ms"]
    assert table.order == (("34", "18"), ("50", "34"), ("50_ms", "50"))


def test_a_table_whose_rows_do_not_fit_is_refused():
    rows = {"a": tables.Row({}), "b": tables.Row({"model.depth": 18}, network="a")}
    with pytest.raises(ValueError, match="no row 'c': expected one of a"):
        tables.Table({"a": rows["a"]}, "a", order=(("a", "c"),))
    with pytest.raises(ValueError, match=r"row 'b' evaluates the network of 'a': expected only changes of eval\.\*"):
        tables.Table(rows, "a")


def test_unknown_rows_datasets_and_tables(tmp_path):
    with pytest.raises(UserError, match="no row 'B2' for scenes: expected one of none, B1_max, "):
        configs.load_recipe("ablations/pooling:B2,scenes")
    with pytest.raises(UserError, match="no row '101' for camvid: expected one of 18, 34, 50, 50_ms"):
        configs.load_recipe("ablations/depth:101,camvid")
    with pytest.raises(UserError, match="no dataset 'kitti': expected one of ade20k, scenes, camvid"):
        configs.load_recipe("ablations/depth:,kitti")
    with pytest.raises(UserError, match=r"configs/ade20k\.py: defines no TABLE"):
        tables.load("configs/ade20k.py")
