"""Each extension, including its test, stays within a number of lines."""

import pathlib

import pytest

LINES = {
    "albumentations": 55,
    "backbone": 60,
    "head": 50,
    "loss_ohem": 25,
    "loss_dice": 25,
    "optimizer": 20,
    "reader": 40,
    "regression": 90,
    "classification": 60,
}


@pytest.mark.parametrize("extension", LINES)
def test_an_extension_stays_within_its_number_of_lines(extension):
    assert len(pathlib.Path(__file__).with_name(f"test_{extension}.py").read_text().splitlines()) <= LINES[extension]
