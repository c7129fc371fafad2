"""Palettes that contradict each other are an error, and palettes that only differ a warning."""

import logging

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import models
from pspnet_jax.config import base_config
from pspnet_jax.data import palettes, pipeline, survey
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from tests import fakes

RED, GREEN, BLUE, GRAY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)


def write(root, colors, classes="a\nb\nc\n", values=(0, 1, 2, 255), split="train"):
    """Writes a label with these values for each palette, which is a list of colors, or None for a gray label."""
    for index, palette in enumerate(colors):
        fakes.write_image(root / f"images/{split}/{index}.png", np.zeros((8, 8, 3), np.uint8))
        path = root / f"labels/{split}/{index}.png"
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


CASES = {  # palettes, classes.txt, the message, and whether it is an error
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
    "permuted, but two share a color": (
        [[RED, GREEN, BLUE, GRAY], [RED, RED, GREEN, BLUE]],
        "a\nb\nc\nd",
        "value 2 is RGB (0, 200, 0) in the palette of {}/1.png",
        True,
    ),
    "gray, swapped": (
        [[(255,) * 3, (0, 0, 0), GRAY]],
        "a\nb\nc",
        "label value 0 is gray 255, 1 is gray 0, 2 is gray 9 in the palette of {}/0.png",
        False,
    ),
    "gray, shifted": ([[(0, 0, 0), (2, 2, 2), GRAY]], "a\nb\nc", "1 is gray 2, 2 is gray 9 in the palette of {}/0.png", False),
    "gray, in order": ([[(0, 0, 0), (128,) * 3, (255,) * 3]], "a\nb\nc", "", False),
    "gray, as listed": ([[(255,) * 3, (0, 0, 0), GRAY]], "a 255 255 255\nb 0 0 0\nc 9 9 9", "", False),
    "all black": ([[RED, GREEN, BLUE], [(0, 0, 0)] * 3], "a\nb\nc", "", False),
}


@pytest.mark.parametrize("name", CASES)
def test_palettes(tmp_path, caplog, name):
    colors, classes, message, is_error = CASES[name]
    config = write(tmp_path, colors, classes, (*range(3 + name.startswith("permuted, but")), 255))
    message = message.format(tmp_path / "labels/train")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        if is_error:
            with pytest.raises(UserError) as error:
                pipeline.open_training(config)
            assert message in str(error.value)
            assert "means different classes" in str(error.value)
        else:
            pipeline.open_training(config)
            warnings = [warning for warning in caplog.messages if "in the palette of" in warning]
            assert [message in warning for warning in warnings] == [True] * bool(message)
    problems = survey.survey(config.dataset, "train", len(classes.split("\n"))).problems
    assert [message in problem for problem in problems] == [True] * is_error


@pytest.mark.parametrize("mode", ["train", "check"])
def test_palettes_of_other_splits_and_of_a_mixture(tmp_path, capsys, monkeypatch, mode):
    """The same colors in another order are an error before the network is built."""
    monkeypatch.setattr(models, "build", lambda *_: pytest.fail("trains"))
    command = ["--config=configs/folder.py", f"--config.dataset.root={tmp_path}/a", f"--mode={mode}"]
    command += [f"--output={tmp_path}/check"] if mode == "check" else [f"--workdir={tmp_path}/run"]
    write(tmp_path / "a", [[GRAY, RED, GREEN]])
    for other, options in (
        (tmp_path / "a/labels/val", []),
        (tmp_path / "b/labels/train", [f"--config.dataset.mixture=(('folder','{tmp_path}/b','train',1.0),)"]),
    ):
        write(other.parents[1], [[RED, GRAY, GREEN]], split=other.name)
        assert main([*command, *options]) == 1
        assert f"label value 0 is RGB (200, 0, 0) in the palette of {other}/0.png" in (output := "".join(capsys.readouterr()))
        assert "the same value means different classes" in output
        write(tmp_path / "a", [[GRAY, RED, GREEN]], split="val")


def test_palettes_that_only_differ_between_splits_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        palettes.require_agreement([{0: (RED, "a.png"), 1: (BLUE, "a.png")}, {}, {1: (RED, "b.png"), 2: (GRAY, "b.png")}])
    assert caplog.messages == [f"label value 1 is RGB {RED} in the palette of b.png, but RGB {BLUE} in a.png"]


@pytest.mark.parametrize(
    ("labels", "mixed"),
    [
        ([(0,), (0, 1), (0, 255)], True),
        ([(0, 1), (0, 1, 255)], False),
        ([(0, 1), (0,)], False),
    ],
)
def test_masks_of_two_conventions_are_a_warning(tmp_path, caplog, labels, mixed):
    for index, values in enumerate(labels):
        fakes.write_image(tmp_path / f"images/train/{index}.png", np.full((8, 8, 3), index, np.uint8))
        fakes.write_image(tmp_path / f"labels/train/{index}.png", np.resize(np.array(values, np.uint8), (8, 8)))
    (tmp_path / "classes.txt").write_text("ground\ncell\n")
    config = base_config()
    config.dataset.root = str(tmp_path)
    for look in (pipeline.open_training, lambda config: survey.survey(config.dataset, "train", 2)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pspnet_jax"):
            look(config)
        where = f"{tmp_path}/labels/train"
        expected = f"{where}/1.png marks class 1 with value 1, but {where}/2.png contains only 0 and 255, and 255 is ignored"
        assert [message for message in caplog.messages if message.startswith(expected)] == caplog.messages
        assert bool(caplog.messages) == mixed
