"""A report states the number of classes in its means, and has a file of its own for each setting."""

import csv
import dataclasses
import errno
import json
import os
import re

import numpy as np
import pytest
from rich.console import Console

from pspnet_jax import files, report
from pspnet_jax.config import base_config
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.metrics import summarize
from pspnet_jax.report import Report

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def make(name="data", split="val", names=("a", "b", "c"), matrix=None, **fields):
    config = base_config().eval
    protocol = {
        "split": split,
        **{field: config[field] for field in ("protocol", "inference", "base_size", "short_size", "flip")},
    }
    protocol |= {field: list(config[field]) for field in ("crop", "stride", "scales")} | fields
    matrix = np.eye(3) if matrix is None else np.array(matrix)
    return Report(summarize(matrix), matrix, 1, DatasetInfo(name, names, COLORS), protocol, "1 x cpu", 1.0, 1.0)


def printed(table, width=140):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_number_of_classes_in_a_mean_is_stated_if_some_are_missing():
    """c is neither in the truth nor predicted; b is only predicted."""
    partial = make(matrix=[[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert str(partial).startswith("mIoU 37.50% over 2 of 3 classes  mean accuracy 75.00% over 1 of 3 classes  pixel accuracy")
    assert "mIoU, precision, F1 over 2 of 3 classes; recall over 1 of 3 classes" in printed(partial.table())
    assert (partial.to_json()["classes_in_mean_iou"], partial.to_json()["classes_in_mean_accuracy"]) == (2, 1)
    assert "classes" not in str(make())
    assert "over" not in printed(make().table())


def test_the_table_and_the_json_have_the_same_figures_of_each_class():
    """Of a's 4 pixels, 3 are predicted as a and 1 as b; of b's 2, one as each; c is missing."""
    scored = make(matrix=[[3, 1, 0], [1, 1, 0], [0, 0, 0]])
    rows = [re.findall(r"[^\s│]+", line) for line in printed(scored.table()).splitlines() if line.startswith("│")]
    assert rows == [
        ["a", "60.00%", "75.00%", "75.00%", "75.00%", "66.67%"],
        ["b", "33.33%", "50.00%", "50.00%", "50.00%", "33.33%"],
        ["c", "-", "-", "-", "-", "0.00%"],
        ["mean", "46.67%", "62.50%", "62.50%", "62.50%"],
    ]
    saved = scored.to_json()
    assert saved["classes"][0] == {"name": "a", "iou": 0.6, "precision": 0.75, "accuracy": 0.75, "f1": 0.75, "pixels": 4}
    assert saved["classes"][2] == {"name": "c", "iou": None, "precision": None, "accuracy": None, "f1": None, "pixels": 0}
    assert (saved["mean_precision"], saved["mean_f1"]) == (0.625, 0.625)


def test_the_confusion_matrix_as_csv_has_the_truth_in_rows(tmp_path):
    scored = make(names=("sky", "a, b", '"c"'), matrix=[[3, 1, 0], [0, 2**40, 0], [5, 0, 7]])
    path = scored.save(tmp_path, {})
    with path.with_name(f"{path.stem}_confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["truth / prediction", "sky", "a, b", '"c"']
    assert rows == [["sky", "3", "1", "0"], ["a, b", "0", str(2**40), "0"], ['"c"', "5", "0", "7"]]


@pytest.mark.parametrize("name", ["mean_iou", "mean_f1", "iou/road", "accuracy/traffic light", "f1/a/b"])
def test_metrics_that_can_select_the_best_checkpoint(name):
    report.require_metric(name, ("road", "traffic light", "a/b"))


@pytest.mark.parametrize("name", ["", "f1", "iou/", "iou/Road", "pixels/road", "dice/road"])
def test_another_metric_is_refused_with_all_choices(name):
    message = (
        f"eval.best_metric={name!r}: expected one of mean_iou, mean_accuracy, mean_precision, mean_f1, pixel_accuracy, or one "
        "of a class: iou/CLASS, precision/CLASS, accuracy/CLASS, f1/CLASS (accuracy is also called recall, and F1 Dice), where "
        "CLASS is one of road, traffic light"
    )
    with pytest.raises(UserError) as found:
        report.require_metric(name, ("road", "traffic light"))
    assert str(found.value) == message


def test_names_that_look_like_markup_are_printed_as_they_are():
    names = ("[void]", "road [main]", "[/red]\\")
    table = printed(make(names=names).table())
    assert all(name in table for name in names)


def test_a_long_name_is_wrapped_and_not_cut_short():
    """Logs and pipes are 80 characters wide for rich."""
    lines = printed(make(names=("traffic-infrastructure", "b", "c")).table(), width=80).splitlines()
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert "".join(cells).startswith("traffic-infrastructureb")


OTHERS = [
    (make(name="other"), {}),
    (make(name="data_val"), {}),
    (make(split="train+val"), {}),
    (make(split="train-val"), {}),
    (make(names=("a", "b", "d")), {}),
    *(
        (make(), {"root": root})
        for root in ("/a/b", "/a-b", "/a b", "/a_b", "/" + "long/" * 60 + "x", "/" + "long/" * 60 + "y")
    ),
    (make(), {"extra_root": "/a/b"}),
    (make(), {"tfds_name": "one"}),
    (make(), {"tfds_name": "two"}),
    (make(), {"checkpoint": "/runs/one"}),
    (make(), {"checkpoint": "/runs/two"}),
    (make(), {"step": 7}),
    (make(), {"step": 8}),
    (make(), {"model": {"align_corners": True}}),
    (make(), {"model": {"align_corners": False}}),
    (make(), {"normalize": {"mean": [1.0, 2.0, 3.0]}}),
    *((make(protocol=protocol), {}) for protocol in ("caffe", "mmseg")),
    (make(inference="whole"), {}),
    (make(crop=[473, 475]), {}),
    (make(crop=[47, 3475]), {}),
    (make(stride=[0, 20]), {}),
    (make(base_size=80), {}),
    (make(short_size=40), {}),
    (make(scales=[1.0, 1.5]), {}),
    (make(scales=[1.0] * 100), {}),
    (make(scales=[1.0] * 101), {}),
    (make(flip=False), {}),
    (make(matrix=[[1, 0, 0], [0, 2, 0], [0, 0, 1]]), {}),  # labels that were changed in place
    (dataclasses.replace(make(), images=2), {}),  # another number of images
]


def test_scores_made_in_different_ways_go_to_different_files(tmp_path):
    """Each setting changes the file name, whose length stays within the limit."""
    paths = [scored.save(tmp_path, origin) for scored, origin in [(make(), {}), *OTHERS]]
    assert len(set(paths)) == 1 + len(OTHERS)
    assert all(len(os.fsencode(path.name)) <= 255 for path in paths)
    expected = "data_val_semseg_windows_base_size512_short_size0_flipTrue_crop473-473_stride0-0_scales1.0_"
    assert paths[0].name.startswith(expected)
    assert make().save(tmp_path, {}) == paths[0]  # the same settings replace the file


def test_the_file_contains_the_origin(tmp_path):
    origin = {"step": 7, "checkpoint": "/runs/one", "root": "/data"}
    saved = json.loads(make().save(tmp_path / "evaluation", origin).read_text())
    assert {field: saved[field] for field in origin} == origin
    assert saved["dataset"] == "data"


def test_names_in_other_scripts_and_not_in_utf_8(tmp_path):
    path = make(name="\u9053\u8def" * 60).save(tmp_path, {"root": os.fsdecode(b"/caf\xe9")})
    assert len(os.fsencode(path.name)) <= 255
    assert json.loads(path.read_text())["root"] == os.fsdecode(b"/caf\xe9")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_report_that_cannot_be_written_is_an_error_that_points_to_the_printed_score(tmp_path, monkeypatch, code):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(type(files.absolute(tmp_path)), "write_text", refuse)
    with pytest.raises(UserError, match=rf"{os.strerror(code)}.*the score itself is complete and shown above"):
        make().save(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "evaluation").write_text("")
    with pytest.raises(UserError, match="the report cannot be written"):
        make().save(tmp_path / "evaluation", {})
