"""The page of a report: its texts, charts and files. test_page_in_a_browser.py uses it."""

import copy
import html.parser
import json
import pathlib
import re
import urllib.parse

import pytest
from etils import epath

from pspnet_jax.analysis import page
from pspnet_jax.analysis.page import filters
from tests.analysis import documents

pytest.importorskip("plotly", reason="the extra train is not installed")
NAMES = ["sky", '<u>road</u> & "path"', "it's #1 50%", "Straße", "never"]


class Tags(html.parser.HTMLParser):
    """Collects the tags and attributes of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())


def written(folder: pathlib.Path, document: dict) -> Tags:
    page.write(document, epath.Path(folder))
    return Tags((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, documents.write(folder, 5, NAMES, against=True)


def test_numbers_as_they_are_shown():
    assert [filters.percent(one) for one in (0.61449, 1, None)] == ["61.4", "100.0", "\N{EN DASH}"]
    assert [filters.points(one) for one in (0.0123, -0.0123)] == ["+1.2", "\N{MINUS SIGN}1.2"]
    assert filters.interval({"value": 0.6, "low": 0.581, "high": 0.639}) == "58.1\N{EN DASH}63.9"
    assert filters.interval({"value": 0.6, "low": -0.01, "high": 0.02}, difference=True) == "\N{MINUS SIGN}1.0 to +2.0"
    assert filters.interval({"value": None, "low": None, "high": None}) == ""
    assert filters.sizes({"low": 1024, "high": None}) == "from 1,024"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([40, 90, 20, 20], {"left": 66.667, "top": 25, "width": 66.667, "height": 50}),  # 2.5 times the height, and 4:3
        ([0, 180, 20, 20], {"left": 133.333, "top": 0, "width": 66.667, "height": 50}),  # moved into the image
        ([0, 0, 100, 200], {"left": 0, "top": 0, "width": 200, "height": 100}),
    ],
)
def test_a_region_is_shown_with_its_surroundings(box, expected):
    assert filters.window(box, height=100, width=200) == pytest.approx(expected, abs=0.001)


def test_every_file_that_the_page_names_is_there(document):
    """Names of pictures have spaces, # and %, which are quoted in URLs."""
    folder, content = document
    tags = written(folder, content).tags
    urls = [attrs[name] for tag, attrs in tags for name in ("src", "href") if attrs.get(name) and tag != "a"]
    files = [urllib.parse.unquote(url) for url in urls if not url.startswith("data:")]
    assert len(files) > 50
    assert [name for name in files if not (folder / name).is_file()] == []
    data = json.loads((folder / "assets/data.js").read_text().removeprefix("const REPORT = ").removesuffix(";\n"))
    pictures = [urllib.parse.unquote(path) for image in data["images"] for path in image["pictures"].values()]
    assert len(pictures) == 5 * 8
    assert all((folder / path).is_file() for path in pictures)


def test_names_are_escaped(document):
    """Names that look like tags make none."""
    folder, content = document
    found = written(folder, content)
    assert not {"u", "pyramid"} & {tag for tag, _ in found.tags}
    assert NAMES[1] in found.text
    assert content["images"][0]["name"] in found.text
    assert f"Image: {content['images'][0]['name']}" in {attrs.get("alt") for _, attrs in found.tags}


def test_the_page_of_one_run_says_nothing_of_another(document, tmp_path):
    found = written(tmp_path, document[1] | {"against": None})
    assert "comparison" not in {attrs.get("id") for _, attrs in found.tags}
    assert not any("without" in text for text in found.text)


def test_undefined_differences_are_no_equal_scores(document, tmp_path):
    """The class that never occurs has no p-value, and an image without labels has neither improved nor stayed the same."""
    assert any(text.startswith("Filled dots have p below 0.05. Of 4 classes, about 0.2 ") for text in written(*document).text)
    content = copy.deepcopy(document[1])
    content["against"]["images"][0]["difference"] = None
    content["against"]["images"][1]["difference"] = 0.0
    text = " ".join(written(tmp_path, content).text)
    assert "2 images got better, 1 got worse, 1 did not change, 1 without labels." in re.sub(r"\s+", " ", text)


def test_texts_have_the_contrast_of_wcag_aa():
    """4.5, with the relative luminance of WCAG 2.1, on both backgrounds in light and dark."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = (pathlib.Path(page.__file__).parent / "assets/page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", rule)) for rule in css.split("@media (prefers-color-scheme: dark)")[:2]
    )
    assert len(dark) == 8
    for colors in (light, light | dark):
        for text in ("text", "muted", "accent", "up", "down"):
            for ground in ("background", "surface"):
                low, high = sorted((luminance(colors[text]), luminance(colors[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_the_number_of_classes_in_a_mean_is_stated_where_some_are_missing(document, tmp_path):
    folder, content = document
    text = " ".join(written(folder, content).text)
    assert "Mean IoU is over the 4 of 5 classes that occur in the truth or a prediction, mean accuracy over the 4" in text
    assert "Mean IoU is over 4 classes in with <pyramid> & co and over 5 in without: a class that" in text


def test_a_report_of_nothing_still_has_a_page(tmp_path):
    """One image, two classes, nothing labeled, no curves, no training data."""
    content = documents.write(tmp_path, 1, ["a", "b"])
    nothing, undefined = {"value": None, "low": None, "high": None}, {"mean_iou": None, "pixel_accuracy": None}
    content["summary"] = dict.fromkeys(content["summary"], nothing)
    for one in content["classes"]:
        one |= {"training_images": None} | dict.fromkeys(("iou", "precision", "recall", "f1"), nothing)
    content |= {"confusion_matrix": [[0, 0], [0, 0]], "curves": {"training": [], "evaluations": []}, "mismatched": []}
    content |= {"confusions": [], "confusion_pairs": [], "mismatched_reason": "the training data is gone"}
    content["inconspicuous"] |= {"by_size": [], "by_thickness": [], "missed": []}
    content["boundary"] |= {name: [None] * 6 for name in ("mean_iou", "pixel_accuracy", "interior_mean_iou")}
    content["calibration"] = {"bins": [], "expected_calibration_error": 0.0}
    content["images"][0] |= undefined | {"labeled": 0, "truth": [], "predicted": [0], "errors": [], "smallest": None}
    found = written(tmp_path, content)
    assert "The training data is gone." in found.text
    assert not any("None" in text or "nan" in text.lower().split() for text in found.text)


def test_charts_show_the_values_of_the_report(document):
    from pspnet_jax.analysis.page import charts

    figures = [documents.figure(value) for value in (0.5, None, 0.75)]
    chart = charts.intervals(["a", "b", "c"], figures, "IoU", [True, True, False])
    dots = chart.data[0]
    assert (dots.x, dots.customdata, chart.layout.yaxis.ticktext) == ((50, 75), (0, 2), ("a", "c"))
    assert dots.error_x.array == pytest.approx((3, 3))
    assert dots.error_x.arrayminus == pytest.approx((4, 4))
    assert dots.marker.symbol == ("circle", "circle-open")

    heat = charts.confusion_matrix(["a", "b", "c"], [[3, 1, 0], [0, 0, 0], [1, 0, 1]]).data[0]
    assert [*map(list, heat.z)] == [[75, 25, None], [None, None, None], [50, None, 50]]

    lines = charts.curves(
        [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0, "dice": 0.5}], lambda name: name != "step", "loss"
    )
    assert [(line.name, line.x, line.y) for line in lines.data] == [("loss", (1, 2), (4, 3)), ("dice", (2,), (0.5,))]

    bins = [{"low": 0.5, "high": 0.6, "pixels": 8, "confidence": 0.55, "accuracy": 0.25}]
    bars = charts.calibration([*bins, {"low": 0.9, "high": 1, "pixels": 0, "confidence": None, "accuracy": None}]).data[0]
    assert (bars.x, bars.y) == (pytest.approx((55,)), (25,))

    dots = charts.image_differences(document[1]).data[1]
    assert dots.customdata == (0, 1, 2, 3, 4)
    assert [this - other for this, other in zip(dots.y, dots.x, strict=True)] == pytest.approx([10, -2, 10, -2, 10])
