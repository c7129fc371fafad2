"""Names that nearly match, links and ignored files are reported in one sentence."""

import logging
import os
import unicodedata

import numpy as np
import pytest
import tensorflow as tf

from pspnet_jax.data import layouts, sources
from pspnet_jax.errors import UserError
from tests import fakes
from tests.data.test_sources import open_folder, recipe


def rename(root, kind, change):
    for path in sorted((root / kind / "train").iterdir()):
        path.rename(path.with_name(change(path.name)))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (lambda n: n, lambda n: n.replace(".png", "_mask.png")),
        (lambda n: n, lambda n: n.replace(".png", "-Gt.png")),
        (lambda n: n.replace(".png", "_sat.png"), lambda n: n.replace(".png", "_mask.png")),
        (lambda n: f"IMG_{n}", lambda n: f"label_{n}"),
        (lambda n: f"Frame{n}", lambda n: f"frame{n}"),
    ],
)
def test_names_that_nearly_match_are_reported_once(tmp_path, images, labels):
    root = fakes.write_folder(tmp_path, {"train": 3})
    rename(root, "images", images)
    rename(root, "labels", labels)
    with pytest.raises(UserError, match=r"3 of 3 images have no label of the same name in .*labels/train; ") as error:
        open_folder(root)
    assert f"{root}/images/train/{images('000.png')} nearly matches {root}/labels/train/{labels('000.png')}: " in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_one_label_of_many_that_is_missing_is_named(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 3})
    (root / "labels/train/001.png").rename(root / "labels/train/001_mask.png")
    with pytest.raises(
        UserError, match=r"labels/train/001.png: no such file; it belongs to .*001.png \(and 1 more wrong pairs"
    ):
        open_folder(root)


def test_unicode_normalization_and_the_case_of_extensions_do_not_matter(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    for kind, form, extension in (("images", "NFD", ".PNG"), ("labels", "NFC", ".Png")):
        (root / kind / "train/000.png").rename(root / kind / "train" / unicodedata.normalize(form, f"caf\u00e9{extension}"))
    source = open_folder(root)
    assert source.names == ["caf\u00e9"]
    np.testing.assert_array_equal(source.read(0)[1], fakes.pair("train", 0)[1])


def test_a_name_that_is_not_utf_8(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    with open(os.fsencode(f"{root}/images/train/caf") + b"\xe9.png", "wb"):
        pass
    with pytest.raises(UserError, match=r"images/train: contains .*caf\\xe9.png, whose name is not UTF-8; rename it"):
        open_folder(root)


def test_links(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 2})
    (root / "images/train/more").symlink_to(root / "images")
    with pytest.raises(UserError, match=r"images/train/more: links to one of its parent directories|more/train: links"):
        open_folder(root)
    (root / "images/train/more").unlink()
    (root / "images/train/001.png").unlink()
    (root / "images/train/001.png").symlink_to(root / "gone.png")
    with pytest.raises(UserError, match=r"images/train/001.png: is a broken link to .*gone.png"):
        open_folder(root)


def test_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    root = fakes.write_folder(tmp_path, {"train": 1})

    def refuse(path):
        raise tf.errors.PermissionDeniedError(None, None, f"{path}; Permission denied")

    monkeypatch.setattr(tf.io.gfile, "listdir", refuse)
    with pytest.raises(UserError, match=r": cannot be read \(.*/train; Permission denied\); check --config.dataset.root or"):
        open_folder(root)


def test_files_that_cannot_be_read(tmp_path):
    """A directory with the name of a label, and an empty image."""
    root = fakes.write_folder(tmp_path, {"train": 2})
    (root / "labels/train/001.png").unlink()
    (root / "labels/train/001.png").mkdir()
    with pytest.raises(UserError, match=r"labels/train/001.png: cannot be read \(Is a directory\)"):
        open_folder(root)
    (root / "images/train/000.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"images/train/000.png: cannot be read because it is damaged or cut short \(the file is empty\)"
    ):
        open_folder(root)


def test_a_warning_lists_files_that_are_not_images(tmp_path, caplog):
    root = fakes.write_folder(tmp_path, {"train": 2})
    for name in ("a.psd", "b.raw", "notes.txt", "Thumbs.db", ".e.gif"):
        (root / "images/train" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        layouts.list_pairs(recipe(root=str(root)), "train")
    (record,) = caplog.records
    where = f"{root}/images/train"
    assert record.message.startswith(f"{where}: 4 files are ignored because they are not .bmp, .gif, ")
    assert record.message.endswith(", ...")


def test_a_missing_root_is_reported_before_missing_class_names(tmp_path):
    with pytest.raises(UserError, match=r"dataset.root=.*/gone: no such directory"):
        sources.open_source(recipe(root=str(tmp_path / "gone")), "train")
