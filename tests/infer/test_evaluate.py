"""Every image counts once, and the report includes the settings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pspnet_jax.config import base_config
from pspnet_jax.datasets import DatasetInfo
from pspnet_jax.errors import UserError
from pspnet_jax.infer.evaluate import evaluate
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.segmenter import Segmenter
from tests.processes import run_processes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

INFO = DatasetInfo("colors", ("red", "green", "blue", "never"), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)))
STRONGEST = np.eye(3, 4, dtype=np.float32) * 10 + np.array([0, 0, 0, -99], np.float32)  # predicts the strongest channel


def predictor(devices=1, network=lambda w, x: x @ w, **fields):
    config = base_config()
    config.eval.update({"base_size": 0, "crop": (33, 33), "batch_size": 2, "flip": False} | fields)
    config.normalize.update(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    return Predictor(network, config, INFO.num_classes, jax.local_devices()[0].client.local_devices()[:devices])


def examples(*sizes):
    """Yields images of pure colors with matching labels, except in the first row (the next class) and the last (ignored)."""
    for i, (height, width) in enumerate(sizes):
        label = np.random.default_rng(i).integers(0, 3, (height, width)).astype(np.uint8)
        image = np.eye(3, dtype=np.uint8)[label] * 255
        label[0] = (label[0] + 1) % 3
        label[-1] = 255
        yield {"image": image, "label": label, "name": f"{i}"}


def expected_matrix(examples):
    matrix = np.zeros((4, 4), int)
    for example in examples:
        counted = example["label"] != 255
        np.add.at(matrix, (example["label"][counted], example["image"].argmax(-1)[counted]), 1)
    return matrix


SIZES = ((40, 40), (40, 40), (36, 50), (40, 40), (36, 50))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("inference", ["windows", "whole"])
def test_every_pixel_of_every_image_counts_once(devices, inference):
    report, _ = evaluate(
        Segmenter(predictor(devices, inference=inference), STRONGEST, INFO), examples(*SIZES), len(SIZES), "val"
    )
    matrix = expected_matrix(examples(*SIZES))
    assert report.images == 5
    np.testing.assert_array_equal(report.pixels, matrix.sum(1))
    np.testing.assert_array_equal(report.metrics.accuracy[:3], np.diag(matrix)[:3] / matrix.sum(1)[:3])
    assert report.metrics.pixel_accuracy == np.trace(matrix) / matrix.sum()
    assert np.isnan(report.metrics.iou[3])
    used = {("windows", 1): 1, ("windows", 4): 20 / (16 + 16), ("whole", 1): 1, ("whole", 4): 5 / (4 + 4)}  # 4 windows each
    assert report.slots_used == used[inference, devices]


@pytest.mark.parametrize("devices", [1, 4])
def test_each_example_is_observed_once_with_its_prediction_and_confidence(devices):
    seen, weights = {}, STRONGEST / 8  # so that the confidence is not 1

    def observe(example, prediction, confidence):
        assert example["name"] not in seen
        seen[example["name"]] = np.array(prediction)
        pure = np.eye(3, dtype=np.uint8)[prediction] * 255
        np.testing.assert_array_equal(example["image"], pure)
        np.testing.assert_allclose(confidence, 1 / (1 + 2 * np.exp(-10 / 8)), rtol=1e-5)

    network = predictor(devices, inference="whole")
    report, _ = evaluate(Segmenter(network, weights, INFO), examples(*SIZES), len(SIZES), "val", observe=observe)
    assert {name: label.shape for name, label in seen.items()} == {str(i): size for i, size in enumerate(SIZES)}
    np.testing.assert_array_equal(report.matrix, expected_matrix(examples(*SIZES)))


def test_the_wrong_number_of_examples_is_an_error():
    with pytest.raises(UserError, match="split 'val': got 2 images, but expected 3"):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), examples(*SIZES[:2]), 3, "val")


def test_a_label_of_another_size_is_refused():
    (example,) = examples((40, 40))
    example["label"] = example["label"][:-1]
    with pytest.raises(UserError, match=r"0: the label's size is \(39, 40\), but the image's is \(40, 40\)"):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), [example], 1, "val")


def test_a_split_without_labels_is_refused():
    unlabeled = ({**example, "label": np.full_like(example["label"], 255)} for example in examples(*SIZES[:2]))
    with pytest.raises(ValueError, match="split 'test': all pixels of its 2 images are labeled 255"):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), unlabeled, 2, "test")


def test_the_report_as_text_and_as_json(tmp_path):
    """Two rows of 40 pixels of one class, one predicted as another class: IoU 1/2 and 0; the rest is undefined."""
    image = np.zeros((2, 40, 3), np.uint8)
    image[0, :, 0] = image[1, :, 1] = 255
    example = {"image": image, "label": np.zeros((2, 40), np.uint8), "name": "street/one"}
    report, pictures = evaluate(
        Segmenter(predictor(flip=True, scales=(1.0, 1.5)), STRONGEST, INFO), [example], 1, "val", pictures=1
    )
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(report.table())
    lines = capture.get().splitlines()
    row = {line.split()[1]: line.split()[3::2] for line in lines if line.startswith("│")}
    assert row == {
        "red": ["50.00%", "100.00%", "50.00%", "66.67%", "100.00%"],
        "green": ["0.00%", "0.00%", "-", "0.00%", "0.00%"],
        **{name: ["-", "-", "-", "-", "0.00%"] for name in ("blue", "never")},
        "mean": ["25.00%", "50.00%", "50.00%", "33.33%", "│"],
    }
    score, protocol = str(report).splitlines()
    assert score == "mIoU 25.00% over 2 of 4 classes  mean accuracy 50.00% over 1 of 4 classes  pixel accuracy 50.00%"
    assert lines[-1].strip() == "mIoU, precision, F1 over 2 of 4 classes; recall over 1 of 4 classes"
    assert protocol.startswith("1 images of val, windows 33x33, own size, scales 1.0, 1.5, flip on, protocol semseg; ")
    assert protocol.endswith(", 83.3% of window slots used")  # two windows at scale 1, three at 1.5
    saved = json.loads(report.save(tmp_path / "evaluation", {"step": 7}).read_text())
    assert saved["mean_iou"] == 0.25
    assert (saved["classes_in_mean_iou"], saved["classes_in_mean_accuracy"], saved["step"]) == (2, 1, 7)
    assert saved["classes"][1] == {
        "name": "green",
        "iou": 0.0,
        "precision": 0.0,
        "accuracy": None,
        "f1": 0.0,
        "pixels": 0,
    }
    assert saved["scales"] == [1.0, 1.5]
    assert saved["slots_used"] == 5 / 6
    assert saved["flip"] is True
    assert saved["dataset"] == "colors"
    assert list(pictures) == ["street/one"]


def test_the_report_names_stride_and_short_side_if_they_are_set():
    given = {"protocol": "mmseg", "base_size": 80, "short_size": 40, "stride": (20, 22), "scales": (1.0,)}
    report, _ = evaluate(Segmenter(predictor(**given), STRONGEST, INFO), examples(*SIZES[:1]), 1, "val")
    _, line = str(report).splitlines()
    assert "windows 33x33 stride 20x22, long side 80, short side at most 40, scales 1.0, flip off, protocol mmseg; " in line


def test_pictures_are_evenly_spaced_over_the_split():
    _, pictures = evaluate(Segmenter(predictor(), STRONGEST, INFO), examples(*SIZES), 5, "val", pictures=3)
    assert list(pictures) == ["0", "2", "4"]


def test_a_split_without_images_is_refused():
    with pytest.raises(UserError, match="split 'val' has no images to score"):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), [], 0, "val", pictures=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "an example has image, name, but no label"),
        ({"image": None, "name": None}, "an example has label, but no image and no name"),
        ({"label": np.full((40, 40), 4, np.uint8)}, "0: the label has values up to 4; expected uint8 values from 0 to 3, or"),
        ({"label": np.zeros((40, 40), np.int64)}, "0: the label has type int64; expected uint8 values from 0 to 3, or 255"),
        (
            {"image": np.zeros((40, 40, 3), np.float32)},
            r"0: an image is float32\[40, 40, 3\]: expected uint8\[",
        ),
        ({"image": np.zeros((40, 40, 4), np.uint8)}, r"0: an image is uint8\[40, 40, 4\]: expected uint8\[height, width, 3\]"),
    ],
)
def test_examples_that_cannot_be_scored(change, message):
    (example,) = examples((40, 40))
    example = {field: value for field, value in {**example, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), [example], 1, "val")


def test_an_image_without_pixels_is_refused():
    example = {"image": np.zeros((0, 9, 3), np.uint8), "label": np.zeros((0, 9), np.uint8), "name": "empty"}
    with pytest.raises(UserError, match=r"empty: an image is uint8\[0, 9, 3\]"):
        evaluate(Segmenter(predictor(), STRONGEST, INFO), [example], 1, "val")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("protocol", ["semseg", "caffe", "mmseg"])
def test_scores_that_are_not_finite_are_refused_with_the_image_named(value, protocol):
    """argmax of NaN would be class 0, which here is often correct."""
    network = predictor(network=lambda w, x: x @ w * value, protocol=protocol)
    with pytest.raises(UserError, match=r"0: the network's scores are not finite \(NaN\), so the image cannot be evaluated"):
        evaluate(Segmenter(network, STRONGEST, INFO), examples((40, 40)), 1, "val")


def test_one_pixel_that_is_not_finite_is_enough():
    images = list(examples((40, 40), (40, 40), (36, 50)))
    images[1]["image"] = np.array(images[1]["image"])
    images[1]["image"][20, 20] = (255, 0, 1)  # not a pure color

    def fragile(w, x):
        return jnp.where((x[..., :1] == 1) & (x[..., 2:] > 0), jnp.nan, x @ w)

    with pytest.raises(UserError, match=r"1: the network's scores are not finite \(NaN\)"):
        evaluate(Segmenter(predictor(network=fragile, batch_size=16), STRONGEST, INFO), images, 3, "val")


@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_a_network_with_another_number_of_outputs_is_refused(outputs):
    message = rf"the network returns \[1, 33, 33, {outputs}\] for images \[1, 33, 33, 3\]: expected \[1, 33, 33, 4\]"
    with pytest.raises(UserError, match=message):
        evaluate(Segmenter(predictor(base_size=33), np.ones((3, outputs), np.float32), INFO), examples((33, 33)), 1, "val")


def test_an_out_of_memory_error_names_the_settings_to_lower(monkeypatch):
    def scarce(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nmore")

    monkeypatch.setattr(Predictor, "labels_and_confidence", scarce)
    message = r"memory ran out with 2 image\(s\) of 40x40 \(RESOURCE_EXHAUSTED: .* bytes\.\); lower one of eval.batch_size=8, "
    with pytest.raises(UserError, match=message):
        evaluate(Segmenter(predictor(batch_size=8), STRONGEST, INFO), examples(*SIZES[:2]), 2, "val")


PROCESS = """
from pspnet_jax import parallel
parallel.start_processes()
import jax
import numpy as np
from pspnet_jax.infer import evaluate
from pspnet_jax.infer.segmenter import Segmenter
from tests.infer.test_evaluate import INFO, SIZES, STRONGEST, examples, predictor
weights = jax.device_put(STRONGEST, parallel.replicated(parallel.make_mesh()))
share = list(examples(*SIZES))[jax.process_index()::jax.process_count()]
report, _ = evaluate.evaluate(Segmenter(predictor(), weights, INFO), share, len(SIZES), "val")
large, _ = evaluate._sum_over_processes(np.full((2, 2), 2**40 + 1), 0)
print(report.images, *report.pixels, *large.ravel(), report.slots_used, report.metrics.mean_iou)
"""


@pytest.mark.parametrize(("count", "slots"), [(2, 12), (4, 8)])
def test_several_processes_report_the_whole_split(count, slots):
    """One process has more images than the others, which wait for it; counts beyond 32 bits are summed exactly.

    The images have 20 windows. With two processes, the first needs 12 slots; with four, 8.
    """
    alone, _ = evaluate(Segmenter(predictor(), STRONGEST, INFO), examples(*SIZES), len(SIZES), "val")
    pixels = expected_matrix(examples(*SIZES)).sum(1)
    done = run_processes(count, "-c", PROCESS, timeout=120)
    assert [process.returncode for process in done] == [0] * count, done[0].stderr
    expected = (5, *pixels, *[count * (2**40 + 1)] * 4, 20 / (count * slots), alone.metrics.mean_iou)
    assert [process.stdout.splitlines()[-1].split() for process in done] == [[str(value) for value in expected]] * count
