"""Each benchmark is read from its unpacked archives, and wrong files are named."""

import logging

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.python.lib.io import file_io

from pspnet_jax import datasets
from pspnet_jax.data import layouts, sources
from tests import fakes
from tests.data.test_sources import assert_loads, recipe


def open_split(name, root, split, **fields):
    return sources.open_source(recipe(name=name, root=str(root), **fields), split)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("split", ["validation", "val"])
@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, split, below):
    root = fakes.write_ade20k(tmp_path / below, {"training": 2, "validation": 3})
    source = open_split("ade20k", tmp_path, split)
    assert source.names == [f"ADE_val_{index:08d}" for index in (1, 2, 3)]
    for index in range(3):
        image = pixels(root / f"images/validation/{source.names[index]}.jpg")
        assert_loads(source, index, image, fakes.pair("validation", index, num_classes=150)[1])


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc2012(tmp_path, below):
    root = fakes.write_voc2012(tmp_path / below, {"train": ["2", "1"], "val": ["3"], "test": ["4"]})
    source = open_split("voc2012", tmp_path, "train")
    assert source.names == ["1", "2"]
    for index in range(2):
        expected = fakes.pair("voc", index + 1, num_classes=21)[1]
        assert_loads(source, index, pixels(root / f"JPEGImages/{index + 1}.jpg"), expected)


@pytest.mark.parametrize("where", ["VOCdevkit's parent", "VOC2012", "extra_root"])
def test_voc2012_augmented_from_sbd(tmp_path, where):
    """SBD's 1 is in VOC's val, 2 has a better label in VOC's train, and 5 is in VOC's train but not in SBD."""
    root = fakes.write_voc2012(tmp_path / "VOCdevkit/VOC2012", {"train": ["2", "5"], "val": ["1", "7"]})
    places = {"VOCdevkit's parent": tmp_path, "VOC2012": root, "extra_root": tmp_path / "elsewhere"}
    sbd = fakes.write_sbd(places[where] / "benchmark_RELEASE/dataset", {"train": ["1", "2", "3"], "val": ["4"]})
    extra_root = str(sbd) if where == "extra_root" else ""
    source = open_split("voc2012", root, "train_aug", extra_root=extra_root)
    assert source.names == ["2", "3", "4", "5"]
    for index, name in enumerate(source.names):
        in_voc = name in ("2", "5")
        label = fakes.pair("voc" if in_voc else "sbd", int(name), num_classes=21)[1]
        label = label if in_voc else np.where(label == 255, 0, label)
        image = pixels(root / f"JPEGImages/{name}.jpg" if in_voc else sbd / f"img/{name}.jpg")
        assert_loads(source, index, image, label)


def test_voc2012_augmented_from_png_labels(tmp_path):
    root = fakes.write_voc2012(tmp_path, {"train": ["2"], "val": ["1"]})
    for name in ("1", "2", "3"):
        image, label = fakes.pair("aug", int(name), num_classes=21)
        fakes.write_image(root / f"JPEGImages/{name}.jpg", image)
        fakes.write_image(root / f"SegmentationClassAug/{name}.png", label)
    source = open_split("voc2012", root, "train_aug")
    assert source.names == ["2", "3"]
    assert_loads(source, 0, pixels(root / "JPEGImages/2.jpg"), fakes.pair("aug", 2, num_classes=21)[1])
    assert_loads(source, 1, pixels(root / "JPEGImages/3.jpg"), fakes.pair("aug", 3, num_classes=21)[1])


def test_png_labels_are_completed_by_vocs_and_overridden_by_extra_root(tmp_path):
    """SegmentationClassAug has labels for 2 and 3; 5 is only in VOC's train and must be included."""
    root = fakes.write_voc2012(tmp_path / "voc", {"train": ["2", "5"], "val": ["1"]})
    for name in ("2", "3"):
        image, label = fakes.pair("aug", int(name), num_classes=21)
        fakes.write_image(root / f"JPEGImages/{name}.jpg", image)
        fakes.write_image(root / f"SegmentationClassAug/{name}.png", label)
    source = open_split("voc2012", root, "train_aug")
    assert source.names == ["2", "3", "5"]
    assert_loads(source, 2, pixels(root / "JPEGImages/5.jpg"), fakes.pair("voc", 5, num_classes=21)[1])
    fakes.write_sbd(tmp_path / "elsewhere/benchmark_RELEASE/dataset", {"train": ["2"], "val": ["4"]})
    for below in ("", "benchmark_RELEASE", "benchmark_RELEASE/dataset"):
        extra_root = str(tmp_path / "elsewhere" / below)
        assert open_split("voc2012", root, "train_aug", extra_root=extra_root).names == ["2", "4", "5"]


def test_names_of_several_splits_are_unique(tmp_path):
    root = fakes.write_folder(tmp_path / "folder", {"train": 2, "val": 1})
    source = open_split("folder", root, "val+train")
    assert source.names == ["val/000", "train/000", "train/001"]
    assert_loads(source, 0, *fakes.pair("val", 0))
    assert_loads(source, 2, *fakes.pair("train", 1))
    ade = fakes.write_ade20k(tmp_path / "ade", {"training": 1, "validation": 1})
    assert open_split("ade20k", ade, "train+val").names == ["ADE_train_00000001", "ADE_val_00000001"]
    with pytest.raises(ValueError, match=r"split 'training\+train' contains ADE_train_00000001 2 times"):
        open_split("ade20k", ade, "training+train")
    with pytest.raises(ValueError, match=r"split 'train\+': expected a name, or several names"):
        open_split("ade20k", ade, "train+")


def test_a_bucket_is_listed_by_directory(monkeypatch):
    """A query for each of 20,000 files would take minutes. TensorFlow's ram:// stands in for gs://."""
    for kind in ("images", "annotations"):
        tf.io.gfile.makedirs(f"ram://ade/{kind}/training")
        for index in range(5):
            ending = "jpg" if kind == "images" else "png"
            tf.io.write_file(f"ram://ade/{kind}/training/{index}.{ending}", "")
    queried = []
    isdir = tf.io.gfile.isdir
    for module, name in ((tf.io.gfile, "isdir"), (file_io, "is_directory_v2")):
        monkeypatch.setattr(module, name, lambda path: queried.append(path) or isdir(path))
    assert len(layouts.list_pairs(recipe(name="ade20k", root="ram://ade"), "training")) == 5
    assert queried
    assert not [path for path in queried if path.endswith(("jpg", "png"))]


def test_a_wrong_number_of_class_names_is_an_error(tmp_path):
    root = fakes.write_cityscapes(tmp_path, {"train": 1})
    with pytest.raises(
        ValueError, match=r"class 0 of dataset.name='cityscapes' at .* is 'road', but 'a' in dataset.class_names"
    ):
        open_split("cityscapes", root, "train", class_names=("a", "b"))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_fine_and_coarse_together(tmp_path, kind):
    fakes.write_cityscapes(tmp_path, {"train": 3, "train_extra": 2, "val": 1}, kind=kind)
    source = open_split("cityscapes", tmp_path, "train+train_extra")
    assert source.names == [
        "aachen_000000_000019_leftImg8bit",
        "aachen_000002_000019_leftImg8bit",
        "bochum_000001_000019_leftImg8bit",
        "augsburg_000000_000019_leftImg8bit",
        "bayreuth_000001_000019_leftImg8bit",
    ]
    for place, (split, index) in enumerate([("train", 0), ("train", 2), ("train", 1), ("train_extra", 0), ("train_extra", 1)]):
        assert_loads(source, place, *fakes.pair(split, index, num_classes=19))


@pytest.mark.parametrize("name", ["voc2012", "cityscapes"])
def test_a_test_split_lists_its_images_and_cannot_be_scored(tmp_path, name):
    if name == "voc2012":
        fakes.write_voc2012(tmp_path, {"test": ["8", "9"]})
    else:
        fakes.write_cityscapes(tmp_path, {"test": 2})
    pairs = layouts.list_pairs(recipe(name=name, root=str(tmp_path)), "test")
    assert len(pairs) == 2
    assert [pixels(pair.image).shape for pair in pairs] == [(40, 48, 3)] * 2
    with pytest.raises(ValueError, match=r"split 'test' has no labels .*--mode predict with --config.eval.split=test"):
        open_split(name, tmp_path, "test")


COCO_VALUES = [value for value in range(182) if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
TARGETS = {  # dataset: split, images and labels below the root, raw values of the classes and of 255
    "pascal_context": (
        "val",
        "VOC2010/JPEGImages/{index}.jpg",
        "VOC2010/SegmentationClassContext/{index}.png",
        [*range(1, 60), 0],
    ),
    "coco_stuff": ("val", "images/val2017/{index}.jpg", "annotations/val2017/{index}.png", [*COCO_VALUES, 255]),
    "loveda": ("val", "Val/Urban/images_png/{index}.png", "Val/Urban/masks_png/{index}.png", [*range(1, 8), 0]),
    "potsdam": ("train", "img_dir/train/{index}.png", "ann_dir/train/{index}.png", [*range(1, 7), 0]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_datasets_with_published_targets(tmp_path, name):
    split, images, labels, values = TARGETS[name]
    fakes.write_pairs(tmp_path, images, labels, values)
    prefix = ""
    if name == "pascal_context":
        (tmp_path / "VOC2010/ImageSets/SegmentationContext").mkdir(parents=True)
        (tmp_path / "VOC2010/ImageSets/SegmentationContext/val.txt").write_text("1\n0\n")
    elif name == "coco_stuff":  # which mmsegmentation's converter writes next to the labels
        fakes.write_image(tmp_path / "annotations/val2017/0_labelTrainIds.png", np.zeros((40, 48), np.uint8))
    elif name == "loveda":  # rural images have the same names
        prefix = "Urban/"
        fakes.write_pairs(tmp_path, images.replace("Urban", "Rural"), labels.replace("Urban", "Rural"), values)
    source = open_split(name, tmp_path, split)
    assert source.names[-2:] == [f"{prefix}0", f"{prefix}1"]
    assert len(source) == (4 if prefix else 2)
    for index in range(2):
        expected = fakes.pair("", index, num_classes=len(values) - 1)[1]
        assert_loads(source, len(source) - 2 + index, pixels(tmp_path / images.format(index=index)), expected)


def test_lovedas_test_split_has_no_labels(tmp_path):
    for area in ("Urban", "Rural"):
        fakes.write_image(tmp_path / f"Test/{area}/images_png/5.png", np.zeros((8, 8, 3), np.uint8))
    pairs = layouts.list_pairs(recipe(name="loveda", root=str(tmp_path)), "test")
    assert [pair.name for pair in pairs] == ["Rural/5", "Urban/5"]
    with pytest.raises(ValueError, match="has no labels"):
        open_split("loveda", tmp_path, "test")


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_root_that_is_missing_or_contains_something_else(tmp_path, name):
    for root, words in (
        ("", "dataset.root is empty"),
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (tmp_path, str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=words) as error:
            sources.open_source(recipe(name=name, root=str(root), class_names=("a", "b") if name == "folder" else ()), "train")
        assert "\n" not in str(error.value)


def test_a_missing_partner_is_named(tmp_path):
    fakes.write_cityscapes(tmp_path, {"train": 3})
    (tmp_path / "gtFine/train/bochum/bochum_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"bochum_000001_000019_gtFine_labelIds.png: no such file; it belongs to .*bochum"):
        open_split("cityscapes", tmp_path, "train")
    voc = fakes.write_voc2012(tmp_path / "voc", {"train": ["1", "2"]})
    (voc / "SegmentationClass/2.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass/2.png: no such file"):
        open_split("voc2012", voc, "train")


def test_raw_values_that_do_not_occur_are_named(tmp_path):
    ade = fakes.write_ade20k(tmp_path / "ade", {"training": 1})
    label = np.full((40, 48), 255, np.uint8)
    fakes.write_image(ade / "annotations/training/ADE_train_00000001.png", label)
    with pytest.raises(ValueError, match=r"train_00000001.png: value 255 at 1920 pixels does not occur .* mapped to classes"):
        open_split("ade20k", ade, "training")
    city = fakes.write_cityscapes(tmp_path / "city", {"train": 1})
    path = city / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    for value, cause in ((255, "already mapped to classes"), (40, "instance or color labels")):
        fakes.write_image(path, np.where(label == 255, value, 0).astype(np.uint8))
        with pytest.raises(ValueError, match=rf"labelIds.png: value {value} at .* have values 0..33; likely .*{cause}"):
            open_split("cityscapes", city, "train")


def test_messages_suggest_the_likely_cause_of_wrong_values(tmp_path):
    for values, classes, cause in (
        ([7, 26, 33], 19, "Cityscapes' raw labelIds"),
        ([38, 75, 113], 21, "a VOC palette image converted to gray"),
        ([150], 150, "count from 1"),
    ):
        histogram = np.zeros(256, int)
        histogram[values] = 5
        assert cause in datasets.label_problem(histogram.tolist(), classes)


def test_a_damaged_mat_file_is_named(tmp_path):
    voc = fakes.write_voc2012(tmp_path, {"train": ["1"], "val": ["2"]})
    sbd = fakes.write_sbd(tmp_path / "sbd", {"train": ["3"], "val": []})
    mat = sbd / "cls/3.mat"
    for contents in (mat.read_bytes()[:300], b"", b"hello"):
        mat.write_bytes(contents)
        with pytest.raises(
            ValueError, match=r"cls/3.mat: cannot be read because it is damaged or cut short \((neither a palette|the file is)"
        ):
            open_split("voc2012", voc, "train_aug", extra_root=str(sbd))


def test_wrong_files_are_skipped_with_on_error_skip(tmp_path, caplog):
    root = fakes.write_ade20k(tmp_path, {"training": 6})
    (root / "images/training/ADE_train_00000002.jpg").write_bytes(b"")
    fakes.write_image(root / "annotations/training/ADE_train_00000005.png", np.zeros((40, 47), np.uint8))
    (root / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(ValueError, match=r"ADE_train_00000002.jpg: cannot be read.* \(and 2 more wrong pairs\)"):
        open_split("ade20k", root, "training")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        source = open_split("ade20k", root, "training", on_error="skip")
    assert source.names == [f"ADE_train_{index:08d}" for index in (1, 4, 6)]
    image = pixels(root / "images/training/ADE_train_00000006.jpg")
    assert_loads(source, 2, image, fakes.pair("training", 5, num_classes=150)[1])
    skipped = [record.message.split(": ")[1] for record in caplog.records if record.message.startswith("skipped: ")]
    assert [file.removeprefix(f"{root}/") for file in skipped] == [
        "images/training/ADE_train_00000002.jpg",
        "annotations/training/ADE_train_00000003.png",
        "annotations/training/ADE_train_00000005.png",
    ]
    assert "officially has 20,210 images, but 3 were found" in caplog.text


def test_a_mostly_wrong_split_is_an_error_even_with_on_error_skip(tmp_path):
    root = fakes.write_ade20k(tmp_path, {"training": 3})
    for index in (0, 1):
        (root / f"images/training/ADE_train_{index + 1:08d}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(and 1 more wrong pairs\)"):
        open_split("ade20k", root, "training", on_error="skip")


def test_wrong_values_are_an_error_even_with_on_error_skip(tmp_path):
    """One label with 255 shows that all labels were mapped to classes, even those without any wrong value."""
    root = fakes.write_ade20k(tmp_path, {"training": 6})
    fakes.write_image(root / "annotations/training/ADE_train_00000003.png", np.full((40, 48), 255, np.uint8))
    (root / "images/training/ADE_train_00000001.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"ADE_train_00000003.png: value 255 .* already mapped to classes.* \(and 1 more wrong pairs"
    ):
        open_split("ade20k", root, "training", on_error="skip")
