"""Synthetic reports: documents in the schema of report.json, and their pictures."""

import pathlib
from typing import Any

import numpy as np
from PIL import Image

SIZES, THICKNESSES, DISTANCES = [0, 64, 256, 1024, 4096], [0, 3, 6, 12], [1, 2, 3, 5, 8, 12]
LAYERS = {"image": "jpg", "truth": "png", "prediction": "png", "error": "png", "confidence": "png"}
METRICS = ("mean_iou", "mean_accuracy", "mean_precision", "mean_f1", "pixel_accuracy")


def write(folder: pathlib.Path, images: int, names: list[str], against: bool = False) -> dict[str, Any]:
    """Writes pictures of random scenes into `folder`, and returns a report of them, in which the last class does not occur."""
    random = np.random.default_rng(0)
    count = len(names)
    colors = random.integers(40, 240, (count, 3))
    labels = [_scene(random, count) for _ in range(images)]
    found = [_write_pictures(folder, index, truth, colors, random) for index, (truth, _) in enumerate(labels)]
    matrix = sum(np.bincount(count * truth.ravel() + guess.ravel(), minlength=count**2) for truth, guess in labels)
    document = _scores(np.asarray(matrix).reshape(count, count), names, colors, images)
    document["images"] = [_image(index, *labels[index], found[index]) for index in range(images)]
    document["against"] = _against(document) if against else None
    return document


def figure(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": value and value - 0.04, "high": value and value + 0.03}


def _scene(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a truth of a background, a band and some boxes, int[48, 64], and a prediction that shifts some of them."""
    truth = np.zeros((48, 64), int)
    truth[30:] = 1 % (count - 1)
    guess = truth.copy()
    for _ in range(6):
        top, left, height, width = random.integers((4, 4, 3, 3), (40, 56, 18, 18))
        of_truth, of_guess = random.integers(0, count - 1, 2)
        truth[top : top + height, left : left + width] = of_truth
        guess[top + 1 : top + height, left + 1 : left + width] = of_truth if random.random() < 0.7 else of_guess
    return truth, guess


def _write_pictures(folder: pathlib.Path, index: int, truth: np.ndarray, colors: np.ndarray, random: Any) -> dict[str, str]:
    (folder / "pictures").mkdir(exist_ok=True)
    shade = np.linspace(0.6, 1.2, truth.shape[0])[:, None, None]
    photo = (0.5 * colors[truth] * shade + 60 + random.normal(0, 6, (*truth.shape, 3))).clip(0, 255)
    pictures = {"image": photo, "truth": colors[truth], "prediction": np.roll(colors[truth], 2, 1)}
    wrong = (pictures["truth"] != pictures["prediction"]).any(-1)
    pictures |= {"error": np.where(wrong[..., None], [220, 50, 40], [30, 30, 34]), "confidence": np.where(wrong, 90, 230)}
    paths = {layer: f"pictures/{index:06d} #{layer}%.{suffix}" for layer, suffix in LAYERS.items()}
    for layer, path in paths.items():
        Image.fromarray(pictures[layer].astype(np.uint8)).save(folder / path)
    return paths


def _image(index: int, truth: np.ndarray, guess: np.ndarray, pictures: dict[str, str]) -> dict[str, Any]:
    pairs, pixels = np.unique(np.stack([truth, guess])[:, truth != guess], axis=1, return_counts=True)
    order = np.argsort(-pixels)[:20]
    right = float((truth == guess).mean())
    return {
        "name": f"street <{index}> & \"park\" 'é' #100%.png",
        "height": truth.shape[0],
        "width": truth.shape[1],
        "mean_iou": right - 0.2,
        "pixel_accuracy": right,
        "confidence": 0.5 + (37 * index % 50) / 100,
        "labeled": truth.size,
        "truth": np.unique(truth).tolist(),
        "predicted": np.unique(guess).tolist(),
        "errors": [[*map(int, pairs[:, i]), int(pixels[i])] for i in order],
        "smallest": 10 + 13 * index % 900,
        "pictures": pictures,
    }


def _scores(matrix: np.ndarray, names: list[str], colors: np.ndarray, images: int) -> dict[str, Any]:
    truth, guess, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    lost = [(int(matrix[t, p]), t, p) for t, p in zip(*np.nonzero(matrix), strict=True) if t != p]
    some = list(range(min(images, 4)))
    classes = [
        {"iou": figure(float(right[k] / (truth[k] + guess[k] - right[k])) if truth[k] else None)}
        | {name: figure(float(right[k] / truth[k]) if truth[k] else None) for name in ("precision", "recall", "f1")}
        | {"pixels": int(truth[k]), "images": min(k, images), "training_images": 3 * k}
        for k in range(len(names))
    ]
    ordered = [
        {"truth": int(t), "predicted": int(p), "pixels": n, "share": n / int(truth[t]), "images": some}
        for n, t, p in sorted(lost, reverse=True)[:200]
    ]
    region = {"image": 0, "pixels": 150, "box": [10, 20, 12, 14]}
    steps = range(20, 200, 20)
    return {
        "schema": 1,
        "title": "with <pyramid> & co",
        "run": {"workdir": "/runs/a b", "step": 160, "version": "0.2.0", "device": "CPU", "created": "2026-11-29T20:50:00Z"}
        | {"images_per_second": 3.1, "classes_in_mean_iou": len(names) - 1, "classes_in_mean_accuracy": len(names) - 1},
        "mismatched_reason": None,
        "protocol": {"text": "whole images, own size, scales 1.0, flip on, protocol semseg"},
        "dataset": {"name": "streets", "split": "val", "images": images, "training_images": 367}
        | {"classes": [{"name": name, "color": color} for name, color in zip(names, colors.tolist(), strict=True)]},
        "bootstrap": {"samples": 1000, "level": 0.95, "seed": 0},
        "summary": {name: figure(0.6) for name in METRICS},
        "classes": classes,
        "confusion_matrix": matrix.tolist(),
        "curves": {
            "training": [{"step": step, "loss": 2 / step**0.3, "learning_rate": 0.01} for step in steps],
            "evaluations": [{"step": step, "mean_iou": step / 300, "pixel_accuracy": step / 220} for step in steps],
        },
        "mismatched": [region | {"predicted": 2, "beside": 1, "truth": 0, "together": 0, "touching": 0, "predicted_images": 90}
            | {"beside_images": 120, "expected": 29.4, "score": 3.2}] * 9,
        "confusions": ordered,
        "confusion_pairs": [
            {"classes": [one["truth"], one["predicted"]], "pixels": one["pixels"], "share": one["share"], "images": some}
            for one in ordered[::2]
        ],
        "inconspicuous": {
            "sizes": SIZES,
            "thicknesses": THICKNESSES,
            "by_size": _bins(SIZES, len(names)),
            "by_thickness": _bins(THICKNESSES, len(names)),
            "missed": [region | {"class": 1, "thickness": 2.5, "recall": 0.1, "predicted": 0}] * 20,
        },
        "boundary": {
            "distances": DISTANCES,
            "mean_iou": [0.3 + d / 50 for d in DISTANCES],
            "pixel_accuracy": [0.5 + d / 50 for d in DISTANCES],
            "classes": [[0.2 + d / 40 for d in DISTANCES]] * (len(names) - 1) + [[None] * len(DISTANCES)],
            "interior_mean_iou": [0.7] * len(DISTANCES),
        },
        "calibration": {
            "bins": [{"low": i / 10, "high": i / 10 + 0.1, "pixels": 10**i // 20} | _calibrated(i) for i in range(10)],
            "expected_calibration_error": 0.034,
        },
    }  # fmt: skip


def _calibrated(bin: int) -> dict[str, float | None]:
    return {"confidence": bin / 10 + 0.06, "accuracy": bin / 11} if bin > 1 else {"confidence": None, "accuracy": None}


def _bins(edges: list[int], classes: int) -> list[dict[str, Any]]:
    """The last range is open, as its `high` is None."""
    bins = [*zip(edges, [*edges[1:], None], strict=True)]
    return [
        {"class": k, "low": low, "high": high, "components": 7, "pixels": 900, "recall": 0.2 + 0.15 * i, "found": 0.1 + 0.2 * i}
        for k in (None, *range(classes - 1))
        for i, (low, high) in enumerate(bins)
    ]


def _against(document: dict[str, Any]) -> dict[str, Any]:
    """A second run, worse by 0.1 in even classes and images and better by 0.02 in odd ones, with the first run's pictures."""

    def change(index: int, value: float | None) -> dict[str, Any]:
        by = 0.1 if index % 2 == 0 else -0.02
        other, difference = (None, None) if value is None else (value - by, by)
        return {"other": figure(other), "difference": figure(difference), "p": value and (0.001 if by > 0 else 0.4)}

    images = [
        {"mean_iou": image["mean_iou"] - by, "pixel_accuracy": image["pixel_accuracy"] - by, "difference": by}
        | {"pictures": {layer: image["pictures"][layer] for layer in ("prediction", "error", "confidence")}}
        for index, image in enumerate(document["images"])
        for by in [0.1 if index % 2 == 0 else -0.02]
    ]
    return {
        "title": "without",
        "run": document["run"] | {"classes_in_mean_iou": len(document["classes"])},
        "protocol": document["protocol"],
        "summary": {name: change(0, 0.6) for name in METRICS},
        "classes": [{"iou": change(index, one["iou"]["value"])} for index, one in enumerate(document["classes"])],
        "images": images,
        "better": [*range(0, len(images), 2)],
        "worse": [*range(1, len(images), 2)],
    }
