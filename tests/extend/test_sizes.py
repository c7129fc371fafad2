"""Each change, its test included, is no longer than this; what it uses of the package is imported from outside."""

import pathlib

import pytest

LINES = {
    "backbone": 60,
    "head": 50,
    "loss_ohem": 25,
    "loss_dice": 25,
    "optimizer": 20,
    "reader": 40,
    "regression": 90,
    "classification": 90,
}


@pytest.mark.parametrize("change", LINES)
def test_a_change_is_no_longer_than_this(change):
    assert len(pathlib.Path(__file__).with_name(f"test_{change}.py").read_text().splitlines()) <= LINES[change]
