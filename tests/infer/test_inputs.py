"""Which files are predicted, under which names, and how the others are reported."""

import logging
import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from pspnet_jax.errors import UserError
from pspnet_jax.infer.inputs import find_images


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def test_images_of_every_type_and_in_subfolders_are_found_and_other_files_are_named(tmp_path, caplog):
    for name in ("a.PNG", "b.gif", "c.tif", "sub/a.jpg", "sub/deeper/x.y.bmp", ".hidden.png", ".cache/z.png"):
        write(tmp_path / name)
    for name in ("notes.txt", "sub/Thumbs.db"):
        (tmp_path / name).write_text("no image")
    found = find_images(tmp_path)
    assert list(found) == ["a", "b", "c", "sub/a", "sub/deeper/x.y"]
    assert found["sub/a"] == epath.Path(tmp_path / "sub" / "a.jpg")
    assert "skipped 4 file(s)" in caplog.text
    for name in (".cache/z.png", ".hidden.png", "notes.txt", "sub/Thumbs.db"):
        assert name in caplog.text


def test_only_the_first_of_many_other_files_are_named(tmp_path, caplog):
    write(tmp_path / "a.png")
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("")
    find_images(tmp_path)
    assert caplog.messages == [
        f"--input {tmp_path}: skipped 9 file(s), hidden or without an image extension: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ..."
    ]


def test_one_file_with_any_extension(tmp_path):
    write(tmp_path / "one.png")
    os.rename(tmp_path / "one.png", tmp_path / "one.photo")
    assert find_images(tmp_path / "one.photo") == {"one": epath.Path(tmp_path / "one.photo")}


def test_missing_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--input .*nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_without_images_in_it_and_its_subfolders(tmp_path, flat):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no images in this folder; expected files ending in \.bmp"):
        find_images(tmp_path, flat)


def test_two_images_that_would_be_written_to_the_same_file(tmp_path):
    for name in ("a.jpg", "b/c.jpg", "b/c.png", "d/c.png"):
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"b/c\.jpg and b/c\.png would both be written as b/c\.png; rename one"):
        find_images(tmp_path)
    (tmp_path / "b" / "c.jpg").unlink()
    assert list(find_images(tmp_path)) == ["a", "b/c", "d/c"]
    with pytest.raises(UserError, match=r"b/c\.png and d/c\.png would both be written as c\.png"):
        find_images(tmp_path, flat=True)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    iterdir = type(epath.Path(tmp_path)).iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "iterdir", refuse)
    with pytest.raises(UserError, match=r"the folder .*closed cannot be read \(.*Permission denied"):
        find_images(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "in" / "a.png")
    write(tmp_path / "elsewhere" / "b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "in" / "circle")
    os.symlink(tmp_path / "gone.png", tmp_path / "in" / "broken.png")
    assert list(find_images(tmp_path / "in")) == ["a", "broken", "linked/b"]  # reading reports that it is broken


@pytest.mark.parametrize("output", ["in", "in/results", "in/../in/results", "link/results"])
def test_an_output_within_the_input_is_refused(tmp_path, output):
    write(tmp_path / "in" / "a.png")
    os.symlink(tmp_path / "in", tmp_path / "link")
    with pytest.raises(UserError, match=r"--output .*: lies inside --input .*/in, so its results would become input images"):
        find_images(tmp_path / "in", output=tmp_path / output)
    assert list(find_images(tmp_path / "in", output=tmp_path / "in2")) == ["a"]


def test_names_that_are_not_utf_8_are_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    ((name, path),) = find_images(tmp_path).items()
    assert os.fsencode(name) == b"caf\xe9"
    assert path.exists()
