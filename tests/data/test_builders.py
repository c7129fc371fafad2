"""The TFDS builders give the same examples as reading the files, from archives too."""

import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pspnet_jax import datasets
from pspnet_jax.data import builders, sources
from tests import fakes
from tests.data.test_sources import recipe


def prepare(builder, manual, data):
    config = tfds.download.DownloadConfig(manual_dir=manual)
    builder(data_dir=data, file_format="array_record").download_and_prepare(download_config=config)


def assert_same_examples(name, files_recipe, data, split):
    direct = sources.open_source(files_recipe, split)
    prepared = sources.open_source(recipe(name="tfds", tfds_name=f"pspnet_{name}", root=str(data)), split)
    assert len(prepared) == len(direct) > 0
    for index in range(len(direct)):
        for array, expected in zip(prepared.read(index), direct.read(index), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_ade20k(tmp_path):
    root = fakes.write_ade20k(tmp_path / "manual/ADEChallengeData2016", {"training": 2, "validation": 1})
    prepare(builders.PspnetAde20k, tmp_path / "manual", tmp_path / "data")
    for split in ("training", "validation"):
        assert_same_examples("ade20k", recipe(name="ade20k", root=str(root)), tmp_path / "data", split)


def test_ade20k_from_its_archive(tmp_path):
    root = fakes.write_ade20k(tmp_path / "files/ADEChallengeData2016", {"training": 2, "validation": 1})
    (tmp_path / "manual").mkdir()
    with zipfile.ZipFile(tmp_path / "manual/ADEChallengeData2016.zip", "w") as archive:
        for path in root.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "files"))
    prepare(builders.PspnetAde20k, tmp_path / "manual", tmp_path / "data")
    assert_same_examples("ade20k", recipe(name="ade20k", root=str(root)), tmp_path / "data", "training")


@pytest.mark.parametrize("packed", [("VOCdevkit", "benchmark_RELEASE"), ("VOCdevkit",), ("benchmark_RELEASE",), ()])
def test_voc2012_with_sbd_from_archives_and_folders(tmp_path, packed):
    files = tmp_path / "files"
    voc = fakes.write_voc2012(files / "VOCdevkit/VOC2012", {"train": ["1", "2"], "val": ["3"]})
    fakes.write_sbd(files / "benchmark_RELEASE/dataset", {"train": ["2", "3", "4"], "val": ["5"]})
    (tmp_path / "manual").mkdir()
    for name, folder, mode in (
        ("VOCtrainval_11-May-2012.tar", "VOCdevkit", "w"),
        ("benchmark.tgz", "benchmark_RELEASE", "w:gz"),
    ):
        if folder not in packed:
            shutil.copytree(files / folder, tmp_path / "manual" / folder)
            continue
        with tarfile.open(tmp_path / "manual" / name, mode) as archive:
            archive.add(files / folder, folder)
    prepare(builders.PspnetVoc2012, tmp_path / "manual", tmp_path / "data")
    for split in ("train", "val", "train_aug"):
        assert_same_examples("voc2012", recipe(name="voc2012", root=str(voc)), tmp_path / "data", split)


def test_cityscapes_without_coarse_labels(tmp_path):
    root = fakes.write_cityscapes(tmp_path / "manual", {"train": 2, "val": 1})
    prepare(builders.PspnetCityscapes, root, tmp_path / "data")
    assert set(tfds.builder("pspnet_cityscapes", data_dir=tmp_path / "data").info.splits) == {"train", "val"}
    for split in ("train", "val"):
        assert_same_examples("cityscapes", recipe(name="cityscapes", root=str(root)), tmp_path / "data", split)


def test_missing_files_are_reported_in_one_sentence(tmp_path):
    shutil.rmtree(fakes.write_ade20k(tmp_path / "manual", {"training": 1}) / "annotations")
    with pytest.raises(ValueError, match="split 'training' has no labels"):
        prepare(builders.PspnetAde20k, tmp_path / "manual", tmp_path / "data")


def test_classes_are_known_by_the_builders_names():
    for name in ("ade20k", "voc2012", "cityscapes"):
        info = datasets.describe(recipe(name="tfds", tfds_name=f"pspnet_{name}"))
        assert info.class_names == datasets.table(name).class_names
