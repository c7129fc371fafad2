"""Labels from which nothing can be learned are an error that names the likely cause; missing classes are a warning."""

import logging
import re

import numpy as np
import pytest

from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, screening, sources, survey
from pspnet_jax.errors import UserError
from tests import fakes

NAMES = ("ground", "cell", "wall", "tree")


def write(root, labels, split="train", names=NAMES, size=(8, 9)):
    """Writes one image for each tuple of values, which repeat over the pixels of its label."""
    for index, values in enumerate(labels):
        fakes.write_image(root / f"images/{split}/{index}.png", np.full((*size, 3), index, np.uint8))
        fakes.write_image(root / f"labels/{split}/{index}.png", np.resize(np.array(values, np.uint8), size))
    (root / "classes.txt").write_text("\n".join(names))
    config = base_config()
    config.dataset.root = str(root)
    return config


FROM_1 = "; if the labels count from 1, set dataset.label_map"
NOTHING = {
    "masks": (
        [(0, 255), (0,)],
        ("ground", "cell"),
        r"train, 2 labels checked: the only values are 0 and 255, .* if 255 means 'cell', change it to 1, or set dataset",
    ),
    "ignored": ([(255,), (255,)], NAMES, r"train, 2 labels checked: every pixel is 255, which is ignored"),
    "alone": (
        [(1,), (1, 255)],
        NAMES,
        r"train, 2 labels checked: 'cell' \(1\) is the only one of 4 classes that occurs, .* 25% of the pixels are",
    ),
    "alone, of two": ([(0,), (0,)], NAMES[:2], r"'ground' \(0\) is the only one of 2 classes that occurs, .* 0% of the pixels"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_learn(tmp_path, name):
    """Training and the survey of --mode check report the same."""
    labels, names, sentence = NOTHING[name]
    config = write(tmp_path, labels, names=names)
    with pytest.raises(UserError, match=sentence):
        pipeline.open_training(config)
    (problem,) = survey.survey(config.dataset, "train", len(names)).problems
    assert re.search(sentence, problem)


def test_a_single_class_can_be_evaluated_but_masks_of_255_and_void_cannot(tmp_path):
    config = write(tmp_path, [(1,), (1, 255)], "val")
    assert len(sources.open_source(config.dataset, "val")) == 2
    for number, labels in enumerate(([(0, 255)], [(255,)])):
        config = write(tmp_path / str(number), labels, "val", NAMES[:2])
        with pytest.raises(UserError, match=r"val, 1 labels checked: "):
            sources.open_source(config.dataset, "val")


def test_the_parts_of_a_mixture_are_counted_together(tmp_path):
    write(tmp_path / "other", [(0,), (0,)])
    config = write(tmp_path, [(1,)])
    config.dataset.mixture = (("folder", str(tmp_path / "other"), "train", 1.0),)
    pipeline.open_training(config)
    config.dataset.mixture = (("folder", str(tmp_path), "train", 1.0),)
    with pytest.raises(UserError, match=r"train and .*train, 2 labels checked: 'cell' \(1\) is the only one of"):
        pipeline.open_training(config)


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (
            [(0, 1), (3, 255)],
            "train, 2 labels checked: no pixel has class 'wall' (2); 25.0% of the pixels are 255, which is ignored",
        ),
        ([(0, 1)], "train, 1 labels checked: no pixel has class 'wall' (2), 'tree' (3)"),
        (
            [(1, 3), (3,)],
            f"train, 2 labels checked: no pixel has class 'ground' (0), 'wall' (2){FROM_1}",
        ),
        (
            [(1, 2), (3,)],
            f"train, 2 labels checked: no pixel has class 'ground' (0){FROM_1}",
        ),
        ([(0, 1, 2, 3)], ""),
    ],
)
def test_a_class_without_a_pixel_is_named(tmp_path, caplog, labels, warning):
    config = write(tmp_path, labels)
    for look in (pipeline.open_training, lambda config: survey.survey(config.dataset, "train", 4)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pspnet_jax"):
            look(config)
        assert [record.message.removeprefix(f"{tmp_path}, ") for record in caplog.records] == [warning] * bool(warning)


def test_raw_values_are_counted_as_classes(tmp_path):
    root = fakes.write_cityscapes(tmp_path, {"train": 2})
    dataset = base_config().dataset
    dataset.update(name="cityscapes", root=str(root))
    labels = [fakes.pair("train", index, num_classes=19)[1] for index in range(2)]
    totals = sources.open_source(dataset, "train").totals
    np.testing.assert_array_equal(totals.pixels, np.bincount(np.ravel(labels), minlength=256))
    assert (totals.counted, totals.total) == (2, 2)


def test_a_large_folder_is_counted_completely_if_the_sample_has_one_class(tmp_path, monkeypatch, caplog):
    """Two of six labels are sampled; if both contain only one class, all are counted before an error is raised."""
    monkeypatch.setattr(screening, "CHECK_ALL", 5)
    monkeypatch.setattr(screening, "CHECK_SOME", 2)
    config = write(tmp_path / "a", [(0, 1)] * 6)
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        pipeline.open_training(config)
    assert "train, 2 of 6 labels checked: no pixel has class 'wall' (2), 'tree' (3)" in caplog.text
    pipeline.open_training(write(tmp_path / "b", [(0,), (0,), (0, 2), (0,), (0,), (0,)]))
    with pytest.raises(UserError, match=r"train, 6 labels checked: 'ground' \(0\) is the only one of"):
        pipeline.open_training(write(tmp_path / "c", [(0,)] * 6))


class Constant(sources.Source):
    num_classes = 4

    def __init__(self, count, value):
        self.names, self.value = [f"{index:02d}" for index in range(count)], value

    def load(self, index):
        return np.zeros((4, 4, 3), np.uint8), np.full((4, 4), self.value, np.uint8)


def test_a_custom_source_is_sampled(tmp_path, caplog):
    config = write(tmp_path, [(0, 1)])
    with pytest.raises(UserError, match=r"00 to 11, 12 labels checked: every pixel is 255"):
        pipeline.open_training(config, source=Constant(12, 255))
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        pipeline.open_training(config, source=Constant(50, 2))
    assert "00 to 49, 16 of 50 labels checked: 'wall' (2) is the only one of 4 classes that occurs" in caplog.text


def test_the_fingerprint_changes_with_names_and_sizes(tmp_path):
    config = write(tmp_path, [(0, 1), (2, 3)])
    first = pipeline.open_training(config).fingerprint
    assert first == pipeline.open_training(config).fingerprint != ""

    def changed():
        return pipeline.open_training(config).fingerprint

    label = tmp_path / "labels/train/1.png"
    contents = label.read_bytes()
    label.write_bytes(contents + b"\0")
    assert changed() != first
    label.write_bytes(contents)
    assert changed() == first
    for kind in ("images", "labels"):
        (tmp_path / kind / "train/1.png").rename(tmp_path / kind / "train/2.png")
    assert changed() != first
    assert pipeline.open_training(config, source=Constant(50, 2)).fingerprint == ""


def test_labels_without_a_labeled_pixel_are_counted(tmp_path, caplog):
    config = write(tmp_path, [(255,), (0, 1, 2), (255,)])
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        sources.open_source(config.dataset, "train")
    assert f"2 of 3 labels have no labeled pixel (all are 255), the first is {tmp_path}/labels/train/0.png" in caplog.messages
