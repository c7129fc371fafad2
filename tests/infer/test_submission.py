"""Submissions have the values, colors and names that the servers document."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import datasets
from pspnet_jax.errors import UserError
from pspnet_jax.infer import submission
from pspnet_jax.infer.inputs import find_images
from pspnet_jax.infer.predict import predict
from pspnet_jax.infer.segmenter import Segmenter
from tests.infer.test_evaluate import INFO, STRONGEST, predictor

FORMS = {server_format: datasets.table(server.dataset) for server_format, server in submission.SUBMISSIONS.items()}


def sent(tmp_path, server_format, label):
    """Returns the mode and pixels of a submission, as a server reads them from the file."""
    path = tmp_path / "sent.png"
    submission.choose(server_format, FORMS[server_format]).encode(label).save(path)
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


@pytest.mark.parametrize("server_format", FORMS)
def test_every_class_can_be_recovered_from_a_submission(tmp_path, server_format):
    label = np.arange(FORMS[server_format].num_classes, dtype=np.uint8).reshape(1, -1)
    mode, raw = sent(tmp_path, server_format, label)
    assert mode == ("P" if server_format == "voc" else "L")
    np.testing.assert_array_equal(datasets.classes_of_raw_values(submission.SUBMISSIONS[server_format].dataset)[raw], label)


@pytest.mark.parametrize(
    ("server_format", "classes", "values"),
    [
        ("cityscapes", ["road", "sidewalk", "rider", "train", "bicycle"], [7, 8, 25, 31, 33]),  # cityscapesScripts, labels.py
        ("ade20k", ["wall", "sky", "flag"], [1, 3, 150]),  # objectInfo150.txt
        ("voc", ["background", "person", "tvmonitor"], [0, 15, 20]),
    ],
)
def test_values_that_the_servers_document(tmp_path, server_format, classes, values):
    label = np.array([[FORMS[server_format].class_names.index(name) for name in classes]], np.uint8)
    np.testing.assert_array_equal(sent(tmp_path, server_format, label)[1], [values])


def test_voc_submissions_have_the_voc_palette(tmp_path):
    sent(tmp_path, "voc", np.array([[0, 1, 15, 20]], np.uint8))
    with Image.open(tmp_path / "sent.png") as image:  # black, dark red, the person's and the monitor's colors
        np.testing.assert_array_equal(
            np.asarray(image.convert("RGB"))[0], [[0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128]]
        )


def test_files_are_named_like_the_images_in_all_subfolders(tmp_path, monkeypatch):
    monkeypatch.setitem(submission.SUBMISSIONS, "own", submission.Submission("own", "results/here"))
    monkeypatch.setitem(datasets.RAW_VALUES, "own", tuple(range(10, 10 + INFO.num_classes)))
    monkeypatch.setattr(datasets, "table", lambda name: INFO)
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("berlin/berlin_000000_000019_leftImg8bit", "bonn/bonn_000001_000019_leftImg8bit"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "in" / f"{name}.png")
    predict(Segmenter(predictor(), STRONGEST, INFO), find_images(tmp_path / "in", flat=True), tmp_path / "out", "own")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "results/here/berlin_000000_000019_leftImg8bit.png",
        "results/here/bonn_000001_000019_leftImg8bit.png",
    ]
    run = predictor()
    label = np.asarray(run.labels(run.place(STRONGEST), [picture]))[0, :20, :30]
    with Image.open(tmp_path / "out/results/here/bonn_000001_000019_leftImg8bit.png") as image:
        np.testing.assert_array_equal(np.asarray(image), label + 10)


def test_a_folder_without_images_in_its_subfolders(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in this folder"):
        find_images(tmp_path, flat=True)


def test_a_form_for_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"--format ade20k: its server scores 150 classes, .* predicts the 19 of 'cityscapes'"):
        submission.choose("ade20k", datasets.table("cityscapes"))


def test_classes_in_another_order_are_refused_and_other_names_are_warned_about(caplog):
    voc = datasets.table("voc2012")

    def choose(*names):
        caplog.clear()
        with caplog.at_level("WARNING", "pspnet_jax"):
            submission.choose("voc", dataclasses.replace(voc, class_names=names))
        return caplog.messages

    names = voc.class_names
    assert choose(*names) == choose(*map(str.upper, names)) == choose(*(f"class {index}" for index in range(21))) == []
    (warning,) = choose(names[0], "plane", *names[2:])
    assert warning.startswith("--format voc: class 1 is 'aeroplane' on its server, but 'plane' in this network")
    with pytest.raises(
        UserError, match=r"class 1 is 'aeroplane' .* 'bicycle' in this network, whose classes have another order"
    ):
        choose("ground", names[2], names[1], *names[3:])


def test_an_unknown_form_lists_the_known_ones():
    with pytest.raises(ValueError, match="--format kitti: expected one of cityscapes, ade20k, voc"):
        submission.choose("kitti", datasets.table("cityscapes"))
