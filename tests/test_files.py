import os

import pytest

from pspnet_jax import files


def test_the_file_appears_whole_and_in_new_folders(tmp_path):
    path = tmp_path / "a" / "b" / "report.json"
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems would copy
        assert temporary.suffix == ".json"  # writers choose the format by it
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["report.json"]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old and longer")
    with files.atomic(str(path)) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write():
        with files.atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_an_exception_before_anything_is_written_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(ValueError, match=r"^first$"), files.atomic(tmp_path / "x.txt"):
        raise ValueError("first")
    assert os.listdir(tmp_path) == []
