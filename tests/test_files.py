import errno
import os

import pytest

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError


def test_a_file_appears_complete_and_in_a_new_directory(tmp_path):
    path = tmp_path / "a" / "b" / "report.json"
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # renaming across file systems would not be atomic
        assert temporary.suffix == ".json"  # writers infer the format from it
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


def test_an_exception_before_anything_is_written_is_raised_unchanged(tmp_path):
    with pytest.raises(ValueError, match=r"^first$"), files.atomic(tmp_path / "x.txt"):
        raise ValueError("first")
    assert os.listdir(tmp_path) == []


def test_remote_paths_are_not_changed():
    for path in ("gs://bucket/run", "gs://bucket/a/../b"):
        assert os.fspath(files.absolute(path)) == path
        assert files.is_remote(path)
    assert os.fspath(files.absolute("a/../b")) == f"{os.getcwd()}/b"
    assert os.fspath(files.absolute("~/run")) == os.path.expanduser("~/run")
    assert not files.is_remote("a:b/c")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "No space left on device"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded"),
        (
            ValueError("UNKNOWN: Error writing d/a: Failed to write: No space left on device [os_error_code='28']"),
            "No space left on device",
        ),
        (RuntimeError("Could not write /x; Read-only file system"), "Read-only file system"),
        (ValueError("shapes differ"), None),
    ],
)
def test_storage_errors_become_user_errors(error, reason):
    assert files.storage_error(error) == reason
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = error
    assert files.storage_error(wrapped) == reason
    with pytest.raises(UserError if reason else type(error)) as found, files.writing("runs/x", "make room"):
        raise error
    assert str(found.value) == (f"runs/x: cannot be written ({reason}); make room" if reason else str(error))


def test_a_user_error_is_raised_unchanged():
    with pytest.raises(MissingFileError, match=r"^x: no such file$"), files.writing("runs/x", "make room"):
        raise MissingFileError("x: no such file")


def test_a_folder_is_replaced_only_if_it_holds_the_file_and_the_block_succeeds(tmp_path):
    target = tmp_path / "report"
    for text in ("first", "second"):
        with files.new_folder(target, "own.txt") as folder:
            (folder / "own.txt").write_text(text)
    with pytest.raises(UserError, match="nothing was written"), files.new_folder(target, "own.txt") as folder:
        (folder / "missing.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert (target / "own.txt").read_text() == "second"
    with pytest.raises(UserError, match="already exists"), files.new_folder(target, "other.txt"):
        pass
