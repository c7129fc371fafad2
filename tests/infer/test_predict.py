"""Prediction from image files to index, color and overlay files."""

import errno
import logging
import os
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pspnet_jax import files, image_files, lock
from pspnet_jax.errors import UserError
from pspnet_jax.infer import memory
from pspnet_jax.infer import predict as prediction
from pspnet_jax.infer.draw import colorize, overlay
from pspnet_jax.infer.inputs import find_images
from pspnet_jax.infer.predict import AHEAD, predict
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.segmenter import Segmenter
from tests.infer.test_evaluate import INFO, STRONGEST, predictor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def results(output):
    return sorted(str(path.relative_to(output)) for path in output.rglob("[!.]*") if path.is_file())


def write(folder, **sizes):
    """Writes random images, and finds them by name."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        Image.fromarray(picture(*size)).save(folder / f"{name}.png")
    return find_images(folder)


def run(tmp_path, paths=None, network=None, **fields):
    """Predicts tmp_path/in into tmp_path/out."""
    options = {key: fields.pop(key) for key in ("skip_existing", "server_format", "origin", "maps") if key in fields}
    paths = find_images(tmp_path / "in") if paths is None else paths
    predict(Segmenter(network or predictor(**fields), STRONGEST, INFO), paths, tmp_path / "out", **options)


def test_a_folder_of_images_of_several_sizes(tmp_path):
    sizes = {"a.b": (40, 50), "c": (61, 35), "below/d": (9, 12)}
    blocks = np.kron(picture(4, 4), np.ones((16, 16, 1), np.uint8))  # which JPEG preserves
    images = {name: blocks[:height, :width] for name, (height, width) in sizes.items()}
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "in" / f"{name}.{'png' if name != 'c' else 'BMP'}")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    predict(Segmenter(predictor(), STRONGEST, INFO), find_images(tmp_path / "in"), tmp_path / "out")
    run = predictor()
    for name, image in images.items():
        height, width = image.shape[:2]
        label = np.asarray(run.labels(run.place(STRONGEST), [image]))[0, :height, :width]
        mode, index = read(tmp_path / "out" / "index" / f"{name}.png")
        assert mode == "L"
        np.testing.assert_array_equal(index, label)
        np.testing.assert_array_equal(read(tmp_path / "out" / "color" / f"{name}.png")[1], label)
        with Image.open(tmp_path / "out" / "color" / f"{name}.png") as color:
            np.testing.assert_array_equal(np.asarray(color.convert("RGB")), colorize(label, INFO.colors))
        mixed = read(tmp_path / "out" / "overlay" / f"{name}.jpg")[1].astype(int)
        assert abs(mixed - overlay(image, label, INFO.colors)).mean() < 3
    kinds = {"index": "png", "color": "png", "overlay": "jpg"}
    assert results(tmp_path / "out") == sorted(f"{kind}/{name}.{suffix}" for kind, suffix in kinds.items() for name in images)


def test_one_file(tmp_path):
    Image.fromarray(picture(20, 30)).save(tmp_path / "one.webp", lossless=True)
    predict(Segmenter(predictor(), STRONGEST, INFO), find_images(tmp_path / "one.webp"), tmp_path / "out")
    assert read(tmp_path / "out" / "index" / "one.png")[1].shape == (20, 30)


@pytest.mark.parametrize("content", ["text", "truncated", "empty", "deep"])
def test_files_that_are_not_readable_images(tmp_path, content):
    path = tmp_path / "bad.png"
    if content == "deep":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    else:
        Image.fromarray(picture(64, 64)).save(path)
        path.write_bytes({"text": b"hello", "truncated": path.read_bytes()[:500], "empty": b""}[content])
    with pytest.raises(ValueError, match=r"bad.png: cannot be read as an image \("):
        image_files.read(path)


def test_images_are_read_as_upright_rgb(tmp_path):
    stored = picture(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(image_files.read(tmp_path / "turned.png"), np.rot90(stored, -1))
    Image.fromarray(stored[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(image_files.read(tmp_path / "gray.png"), stored[..., [0, 0, 0]])
    Image.fromarray(np.dstack([stored, stored[..., 0]])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(image_files.read(tmp_path / "alpha.png"), stored)


def test_bad_images_do_not_affect_the_others(tmp_path):
    """Bad images of each kind among good ones in the same group; the bad ones are listed at the end."""
    write(tmp_path / "in", a=(20, 30), b=(20, 30), c=(20, 30), d=(20, 30), z=(20, 30))
    (tmp_path / "in" / "a.png").write_bytes(b"hello")
    (tmp_path / "in" / "c.png").write_bytes((tmp_path / "in" / "c.png").read_bytes()[:300])
    os.symlink(tmp_path / "gone.png", tmp_path / "in" / "link.png")
    with pytest.raises(UserError) as caught:
        run(tmp_path, batch_size=16)
    *lines, last = str(caught.value).splitlines()
    assert last == f"3 of 6 images could not be predicted, see {tmp_path}/out/failed.txt"
    assert (tmp_path / "out/failed.txt").read_text().splitlines() == lines
    for line, name in zip(lines, ("a", "c", "link"), strict=True):
        assert line.startswith(f"{tmp_path}/in/{name}.png: cannot be read as an image")
    assert [name for name in results(tmp_path / "out") if name.startswith("index")] == [f"index/{x}.png" for x in "bdz"]
    for name in ("a.png", "c.png", "link.png"):
        (tmp_path / "in" / name).unlink()
    run(tmp_path, skip_existing=True)
    assert not (tmp_path / "out/failed.txt").exists()


def test_an_image_wider_than_a_jpeg_may_be_has_a_reduced_overlay(tmp_path):
    write(tmp_path / "in", wide=(40, 66_000))
    run(tmp_path)
    assert read(tmp_path / "out/index/wide.png")[1].shape == (40, 66_000)
    assert read(tmp_path / "out/overlay/wide.jpg")[1].shape[1] == 65_500


def test_a_result_that_cannot_be_encoded_does_not_stop_the_others(tmp_path, monkeypatch):
    write(tmp_path / "in", a=(20, 30), b=(20, 30))
    save = prediction.save

    def failing(picture, path, *args, **options):
        if path.name == "a.jpg":
            raise OSError("broken data stream when writing image file")
        save(picture, path, *args, **options)

    monkeypatch.setattr(prediction, "save", failing)
    with pytest.raises(UserError, match=r"a: broken data stream .*\n1 of 2 images could not be predicted"):
        run(tmp_path)
    assert (tmp_path / "out/index/b.png").exists()


def test_an_image_too_large_for_the_machine_is_skipped(tmp_path, monkeypatch):
    write(tmp_path / "in", a=(20, 30), b=(400, 300))
    monkeypatch.setattr(memory, "host_limit", lambda: 1_000_000)
    message = r"b\.png: an image of 300x400 needs at least 0\.0 GiB of memory .* lower one of eval\.batch_size=2"
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    assert len(results(tmp_path / "out")) == 3 + 1  # and failed.txt


def test_running_out_of_memory_fails_only_that_image(tmp_path, monkeypatch):
    write(tmp_path / "in", a=(20, 30), b=(100, 90))
    labels = Predictor.labels

    def scarce(self, variables, images):
        if any(len(image) == 100 for image in images):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return labels(self, variables, images)

    monkeypatch.setattr(Predictor, "labels", scarce)
    with pytest.raises(
        UserError, match=r"b: memory ran out with 1 image\(s\) of 90x100 .*RESOURCE_EXHAUSTED.*eval\.crop=\(33, 33\)"
    ):
        run(tmp_path)
    assert len(results(tmp_path / "out")) == 3 + 1  # and failed.txt


def test_scores_that_are_not_finite_write_no_prediction(tmp_path):
    write(tmp_path / "in", a=(20, 30))
    with pytest.raises(UserError, match=r"a: the network's scores are not finite"):
        predict(Segmenter(predictor(), STRONGEST * np.nan, INFO), find_images(tmp_path / "in"), tmp_path / "out")
    assert results(tmp_path / "out") == ["failed.txt"]


def test_skip_existing_predicts_only_images_that_lack_a_result(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    paths = write(tmp_path / "in", a=(20, 30), b=(20, 30), c=(20, 30))
    run(tmp_path)
    out, read, original = tmp_path / "out", [], image_files.read
    monkeypatch.setattr(image_files, "read", lambda path, kind: (read.append(path), original(path, kind))[1])
    (out / "overlay" / "b.jpg").unlink()
    os.truncate(out / "index" / "c.png", 60)
    os.utime(out / "index" / "a.png", (0, 0))  # as after copying
    run(tmp_path, skip_existing=True)
    assert sorted(read) == [paths["b"], paths["c"]]
    assert (out / "index" / "a.png").stat().st_mtime == 0
    assert len(results(out)) == 9
    assert caplog.messages[-1].startswith(f"3 of 3 images have their results in {out}, 1 from earlier runs; ")
    assert "images/s on 1 x cpu" in caplog.messages[-1]
    read.clear()
    run(tmp_path, skip_existing=True)
    assert read == []
    Image.fromarray(picture(30, 20)).save(paths["a"])  # another photo under the same name
    run(tmp_path, skip_existing=True)
    assert read == [paths["a"]]
    run(tmp_path)
    assert len(read) == 4


def test_maps_hold_the_probabilities_and_belong_to_the_results(tmp_path):
    paths, out = write(tmp_path / "in", **{"a": (20, 30), "b": (41, 35)}), tmp_path / "out"
    run(tmp_path, maps=("confidence", "probabilities"))
    for name, path in paths.items():
        expected = Segmenter(predictor(), STRONGEST, INFO)(path)
        saved = np.load(out / "probabilities" / f"{name}.npy")
        assert saved.dtype == np.float16
        np.testing.assert_array_equal(saved, expected.probabilities().astype(np.float16))
        mode, confidence = read(out / "confidence" / f"{name}.png")
        assert mode == "I;16"
        np.testing.assert_array_equal(confidence, np.rint(expected.confidence.highest * 65535))
        np.testing.assert_array_equal(read(out / "index" / f"{name}.png")[1], expected.labels)
    assert len(results(out)) == 10
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    (out / "probabilities" / "b.npy").write_bytes(b"")
    run(tmp_path, maps=("confidence", "probabilities"), skip_existing=True)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert {path.stem for path in after if after[path] != before[path]} == {"b", ".origin"}
    for maps in ((), ("confidence",)):
        with pytest.raises(UserError, match="its results come from another checkpoint or other settings"):
            run(tmp_path, maps=maps, skip_existing=True)
    with pytest.raises(UserError, match="--maps: a submission to a benchmark's server has none"):
        run(tmp_path, maps=("confidence",), server_format="voc", network=predictor())


def test_results_of_other_images_are_not_overwritten(tmp_path):
    """Two folders with the same file names, as from a camera."""
    write(tmp_path / "in", a=(20, 30))
    run(tmp_path, origin={"input": "day1"})
    before = (tmp_path / "out" / "index" / "a.png").read_bytes()
    for skip_existing in (False, True):
        with pytest.raises(UserError, match=r"a.png: already exists and was not predicted from this input; choose another"):
            run(tmp_path, origin={"input": "day2"}, skip_existing=skip_existing)
    assert (tmp_path / "out" / "index" / "a.png").read_bytes() == before


def test_a_users_file_of_the_name_of_ours_is_kept(tmp_path):
    write(tmp_path / "in", a=(20, 30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/failed.txt").write_text("mine")
    with pytest.raises(UserError, match=r"failed\.txt: was not written by a prediction"):
        run(tmp_path)
    assert results(tmp_path / "out") == ["failed.txt"]
    assert (tmp_path / "out/failed.txt").read_text() == "mine"


def test_two_predictions_cannot_write_to_one_folder(tmp_path):
    write(tmp_path / "in", a=(20, 30))
    with lock.locked(tmp_path / "out"), pytest.raises(UserError, match="another process writes to"):
        run(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_keeps_and_reports_complete_results(tmp_path, monkeypatch, code):
    """The disk is full when the third image's color is written: two images are complete, and no file is partial."""
    write(tmp_path / "in", a=(20, 30), b=(20, 30), c=(20, 30), d=(20, 30))
    replace = type(files.absolute(tmp_path)).replace

    def full(path, target):
        if (target.name == "c.png" and target.parent.name == "color") or target.name.startswith("d"):
            raise OSError(code, os.strerror(code), str(target))
        return replace(path, target)

    monkeypatch.setattr(type(files.absolute(tmp_path)), "replace", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    assert os.strerror(code) in str(caught.value)
    assert f"2 of 4 images have their results in {tmp_path}/out, and --skip_existing continues from there" in str(caught.value)
    assert [name for name in results(tmp_path / "out") if "overlay" in name] == ["overlay/a.jpg", "overlay/b.jpg"]
    monkeypatch.undo()
    run(tmp_path, skip_existing=True)
    assert len(results(tmp_path / "out")) == 12


def test_an_output_that_is_a_file_or_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    write(tmp_path / "in", a=(20, 30))
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match=r"--output .*out: is a file; expected a folder"):
        run(tmp_path)
    assert (tmp_path / "out").read_text() == "precious"
    with pytest.raises(UserError, match=r"out/below: cannot be written \(Not a directory\); choose another place"):
        predict(Segmenter(predictor(), STRONGEST, INFO), find_images(tmp_path / "in"), tmp_path / "out" / "below")


def test_a_folder_in_place_of_a_result_fails_only_that_image(tmp_path):
    write(tmp_path / "in", a=(20, 30), b=(20, 30))
    (tmp_path / "out" / "color" / "a.png").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"a: .*color/a\.png: is a folder where a result should be; move it away\n1 of 2 images could not be predicted",
    ):
        run(tmp_path)
    assert [name for name in results(tmp_path / "out") if "/b." in name] == ["color/b.png", "index/b.png", "overlay/b.jpg"]


def test_names_of_maximum_length_and_not_in_utf_8(tmp_path):
    write(tmp_path / "in", **{"x" * 251: (20, 30)})
    os.rename(os.fsencode(tmp_path / "in" / ("x" * 251 + ".png")), os.fsencode(tmp_path / "in" / ("x" * 250)) + b"\xe9.png")
    run(tmp_path)
    assert len(results(tmp_path / "out")) == 3


def test_reading_is_ahead_of_computing_and_bounded(tmp_path, monkeypatch):
    """While the first group is computed, AHEAD images are read, and no more."""
    paths = write(tmp_path / "in", **{f"{i:03d}": (8, 8) for i in range(3 * AHEAD)})
    lock, read, original, seen = threading.Lock(), [], image_files.read, []

    def counted(path, kind):
        with lock:
            read.append(path)
        return original(path, kind)

    labels = Predictor.labels

    def slow(self, variables, images):
        time.sleep(0.1 if not seen else 0)
        seen.append(len(read))
        return labels(self, variables, images)

    monkeypatch.setattr(image_files, "read", counted)
    monkeypatch.setattr(Predictor, "labels", slow)
    run(tmp_path, paths=paths, batch_size=1)
    assert seen[0] == AHEAD  # including the one being computed
    assert all(count <= i + AHEAD for i, count in enumerate(seen))


def test_whole_image_inference_orders_images_by_size_and_logs_the_number_of_sizes(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    write(tmp_path / "in", a=(20, 30), b=(30, 20), c=(20, 30), d=(30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(30, 20)).save(tmp_path / "in" / "turned.png", exif=exif)
    order, labels = [], Predictor.labels

    def listed(self, variables, images):
        order.append([image.shape[:2] for image in images])
        return labels(self, variables, images)

    monkeypatch.setattr(Predictor, "labels", listed)
    run(tmp_path, inference="whole", batch_size=4)
    assert order == [[(20, 30)] * 3, [(30, 20)] * 2]
    assert "the network is compiled for 2 window size(s), from 2 image size(s)" in caplog.messages
    assert len(results(tmp_path / "out")) == 15


def test_results_of_another_input_are_not_continued(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(40, 50)).save(tmp_path / "in/a.png")
    run(tmp_path, origin={"step": 1, "input": "in"})
    (tmp_path / "in/a.png").rename(tmp_path / "in/b.png")
    with pytest.raises(UserError, match="out: has the results of another --input, in; choose another --output"):
        run(tmp_path, origin={"step": 1, "input": "other"}, skip_existing=True)


def test_results_of_another_checkpoint_are_not_reused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(40, 50)).save(tmp_path / "in/a.png")
    run(tmp_path, origin={"step": 1})
    run(tmp_path, origin={"step": 1}, skip_existing=True)
    with pytest.raises(UserError, match="its results come from another checkpoint or other settings"):
        run(tmp_path, origin={"step": 2}, skip_existing=True)
    first = (tmp_path / "out/index/a.png").read_bytes()
    run(tmp_path, origin={"step": 2})
    second = (tmp_path / "out/index/a.png").read_bytes()
    (tmp_path / "out/index/a.png").write_bytes(first)  # as if the second run had stopped before it
    run(tmp_path, origin={"step": 2}, skip_existing=True)
    assert (tmp_path / "out/index/a.png").read_bytes() == second != first
    with pytest.raises(UserError, match="its results come from another checkpoint"):  # retrained to the same step
        predict(
            Segmenter(predictor(), {"other": np.ones(3)}, INFO),
            find_images(tmp_path / "in"),
            tmp_path / "out",
            "",
            True,
            {"step": 2},
        )
