"""Palettes that contradict each other are wrong labels; those that only differ are a warning."""

import logging

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, survey
from pspnet_jax.errors import UserError
from tests import fakes

RED, GREEN, BLUE, GRAY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)


def write(root, palettes, classes="a\nb\nc\n", values=(0, 1, 2, 255)):
    """Writes a label of the values for each palette, which is a list of colors, or None for a gray label."""
    for index, palette in enumerate(palettes):
        fakes.write_image(root / f"images/train/{index}.png", np.zeros((8, 8, 3), np.uint8))
        path = root / f"labels/train/{index}.png"
        fakes.write_image(path, np.resize(np.array(values, np.uint8), (8, 8)))
        if palette:
            label = Image.fromarray(np.asarray(Image.open(path)), "P")
            rest = [(index, 7, index) for index in range(len(palette), 256)]
            label.putpalette([channel for color in (*palette, *rest) for channel in color])
            label.save(path)
    (root / "classes.txt").write_text(classes)
    config = base_config()
    config.dataset.root = str(root)
    return config


CASES = {  # palettes, classes.txt, what is said, and whether it is refused
    "permuted": (
        [[RED, GREEN, BLUE], [GREEN, RED, BLUE]],
        "a\nb\nc",
        "value 0 is RGB (0, 200, 0) in the palette of {}/1.png",
        True,
    ),
    "shifted": (
        [None, [GRAY, RED, GREEN], [RED, GREEN, BLUE]],
        "a\nb\nc",
        "in {}/1.png, where RGB (200, 0, 0) is value 1",
        True,
    ),
    "other color": (
        [[RED, GREEN, BLUE], [RED, GRAY, BLUE]],
        "a\nb\nc",
        "value 1 is RGB (9, 9, 9) in the palette of {}/1.png",
        False,
    ),
    "list, permuted": ([[RED, GREEN, BLUE]], "a 0 200 0\nb 200 0 0\nc 0 0 200", "RGB (0, 200, 0) in the list of classes", True),
    "list, other": ([[RED, GREEN, BLUE]], "a 200 0 0\nb 9 9 9\nc 0 200 0", "but RGB (9, 9, 9) in the list of classes", False),
    "unused": ([[RED, GREEN, BLUE, GRAY], [RED, GREEN, BLUE, RED]], "a 200 0 0\nb 0 200 0\nc\nd 1 1 1", "", False),
    "gray ramp": ([[RED, GREEN, BLUE], [(0, 0, 0), (1, 1, 1), (2, 2, 2)], None], "a\nb\nc", "", False),
    "all black": ([[RED, GREEN, BLUE], [(0, 0, 0)] * 3], "a\nb\nc", "", False),
}


@pytest.mark.parametrize("name", CASES)
def test_palettes(tmp_path, caplog, name):
    palettes, classes, said, refused = CASES[name]
    config = write(tmp_path, palettes, classes)
    said = said.format(tmp_path / "labels/train")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        if refused:
            with pytest.raises(UserError) as error:
                pipeline.open_training(config)
            assert said in str(error.value)
            assert "means different classes" in str(error.value)
        else:
            pipeline.open_training(config)
            found = [record.message for record in caplog.records if "in the palette of" in record.message]
            assert [said in message for message in found] == [True] * bool(said)
    problems = survey.survey(config.dataset, "train", 4 if name == "unused" else 3).problems
    assert [said in problem for problem in problems] == [True] * refused
