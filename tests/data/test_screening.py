"""Files are checked once until they change, and all processes of a job use the same pairs."""

import json
import os
import pathlib
import socket

import numpy as np
import pytest
from PIL import ExifTags, Image

from pspnet_jax.data import checks, screening, sources, stamps
from pspnet_jax.errors import UserError
from tests import fakes
from tests.data.test_sources import recipe
from tests.processes import run_processes

pytestmark = pytest.mark.slow
HOST = socket.gethostname()


@pytest.fixture
def checked(monkeypatch):
    """Returns a list to which the name of each checked image is added."""
    names, check_pair = [], checks.check_pair

    def recording(image, *rest):
        names.append(pathlib.Path(image).name)
        return check_pair(image, *rest)

    monkeypatch.setattr(checks, "check_pair", recording)
    return names


def reopened(dataset):
    """Opens the split as a new start does."""
    return sources.open_source(dataset, "train")


def test_the_next_start_does_not_check_again(tmp_path, checked):
    dataset = recipe(root=str(fakes.write_folder(tmp_path, {"train": 3})))
    reopened(dataset)
    assert sorted(checked) == ["000.png", "001.png", "002.png"]
    reopened(dataset)
    assert len(checked) == 3
    fakes.write_image(tmp_path / "labels/train/001.png", np.full((40, 48), 9, np.uint8))
    for times in (7, 8):  # problems are cached too, but wrong files are checked again
        with pytest.raises(UserError, match=r"labels/train/001.png: label value 9"):
            reopened(dataset)
        assert len(checked) == times


def test_a_temporary_read_failure_is_not_taken_for_damage(tmp_path, monkeypatch):
    root, check_pair, failures = fakes.write_folder(tmp_path, {"train": 3}), checks.check_pair, iter([True])

    def flaky(*pair):
        if next(failures, False):
            raise UserError(f"{pair[0]}: cannot be read (Input/output error)")
        return check_pair(*pair)

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for index in range(3):
        path = root / f"images/train/{index:03d}.png"
        Image.open(path).save(path, exif=exif)
        os.utime(path, (0, 0))
    monkeypatch.setattr(stamps, "MIN_AGE", -1e9)  # caches the findings
    monkeypatch.setattr(checks, "check_pair", flaky)
    for _ in range(2):  # the first read fails at the first start; the second start uses the cache
        source = reopened(recipe(root=str(root)))
        assert source._orientations.numpy().tolist() == [3, 3, 3]
        assert source.totals.counted == 3
    assert not list(failures)


@pytest.mark.parametrize("change", [{"on_error": "skip"}, {"class_names": ("a", "b", "c", "d", "e")}])
def test_settings_that_affect_the_checks_invalidate_the_cache(tmp_path, checked, monkeypatch, change):
    """on_error="skip" checks all pixels, and a value that is not one of four classes may be one of five."""
    dataset = recipe(root=str(fakes.write_folder(tmp_path, {"train": 3})))
    (tmp_path / "classes.txt").unlink()
    dataset.class_names = ("a", "b", "c", "d")
    monkeypatch.setattr(screening, "CHECK_ALL", 2)
    monkeypatch.setattr(screening, "CHECK_SOME", 1)
    reopened(dataset)
    dataset.update(change)
    reopened(dataset)
    assert len(checked) == 6


def test_without_a_writable_directory_files_are_checked_each_time(tmp_path, checked):
    dataset = recipe(root=str(fakes.write_folder(tmp_path, {"train": 3})), cache_dir=str(tmp_path / "classes.txt"))
    for times in (1, 2):
        assert len(reopened(dataset)) == 3
        assert len(checked) == 3 * times


# One of two processes with its own files, which prints the names of the usable pairs or the error.
PROCESS = """
import json, sys
from pspnet_jax import parallel

parallel.start_processes()
import jax
from pspnet_jax.config import base_config
from pspnet_jax.data import sources

NAMES = tuple(f"class {index}" for index in range(4))
for root, on_error in json.loads(sys.argv[1]):
    dataset = base_config().dataset
    dataset.update(root=f"{root}/{jax.process_index()}", on_error=on_error, cache_dir=f"{root}/cache", class_names=NAMES)
    try:
        print("result", json.dumps(sources.open_source(dataset, "train").names))
    except ValueError as error:
        print("result", json.dumps(str(error)))
"""


def test_two_processes_use_the_same_pairs(tmp_path):
    """Six pairs each: with 001 damaged for process 0 and 004 for process 1; with other names; another size; missing."""
    for kind, damaged in (("damaged", ("001", "004")), ("other", ()), ("size", ()), ("missing", ())):
        for process in range(2):
            fakes.write_folder(tmp_path / kind / str(process), {"train": 6})
        for process, name in enumerate(damaged):
            (tmp_path / kind / str(process) / f"images/train/{name}.png").write_bytes(b"")
    for kind in ("images", "labels"):
        file = tmp_path / "other/1" / kind / "train/002.png"
        file.rename(file.with_stem("007"))
    sizes = [(tmp_path / f"size/{process}/labels/train/003.png").stat().st_size for process in range(2)]
    with (tmp_path / "size/1/labels/train/003.png").open("ab") as file:
        file.write(b"..")
    (tmp_path / "missing/0").rename(tmp_path / "missing/gone")
    cases = [("damaged", "skip"), ("damaged", "stop"), ("other", "skip"), ("size", "skip"), ("missing", "stop")]
    first, second = run_two([(str(tmp_path / kind), on_error) for kind, on_error in cases])
    assert first[0] == second[0] == ["000", "002", "003", "005"]
    assert first[1] == second[1]
    assert first[1].startswith(f"{tmp_path}/damaged/0/images/train/001.png: cannot be read")
    assert first[1].endswith("(and 1 more wrong pairs)")
    for message in (first[2], second[2]):
        assert (
            f"process 1 ({HOST}) has other images (6) than process 0 ({HOST}) (6); every host needs the same files" in message
        )
    sizes = (
        f"has {sizes[1] + 2} bytes in process 1 ({HOST}), but {sizes[0]} in process 0 ({HOST}); every host needs the same files"
    )
    for process, message in enumerate((first[3], second[3])):
        assert message.endswith(f"train: {tmp_path}/size/{process}/labels/train/003.png {sizes}")
    assert "missing/0: no such directory" in first[4]
    assert second[4] == f"process 0 ({HOST}): {first[4]}"


def run_two(cases):
    """Returns the results that each of two processes prints."""
    done = run_processes(2, "-c", PROCESS, json.dumps(cases))
    assert [process.returncode for process in done] == [0, 0]
    return [[json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("result ")] for process in done]
