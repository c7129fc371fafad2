"""The page of a report: index.html and its assets, which open from disk, without a server or a network."""

import heapq
import importlib.resources
import json
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from pspnet_jax.analysis.page import texts

ASSETS = ("page.css", "charts.js", "tables.js", "images.js", "viewer.js")
LAYERS = {"image": "Image", "truth": "Truth", "prediction": "Prediction", "error": "Error", "confidence": "Confidence"}


def write(document: Mapping[str, Any], folder: epath.Path) -> None:
    """Writes index.html and assets/ into the folder of a report.

    Args:
      document: the contents of report.json (docs/report.md).
      folder: exists, and holds the pictures that `document` names by relative paths.
    """
    import jinja2

    from pspnet_jax.analysis.page import charts

    figures = {name: chart.to_plotly_json() for name, chart in charts.all_of(document).items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        quote,
        least_certain,
        by_class,
        texts.percent,
        texts.interval,
        texts.points,
        texts.count,
        texts.sizes,
        texts.levels,
    )
    environment.filters |= {one.__name__: one for one in filters}
    environment.globals |= {"layers": _layers(document), "window": window, "charts": figures}
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    for name in ASSETS:
        (assets / name).write_bytes(_read(__name__, f"assets/{name}"))
    (assets / "plotly.min.js").write_bytes(_read("plotly", "package_data/plotly.min.js"))
    (assets / "data.js").write_text(f"const REPORT = {json.dumps(_data(document) | {'charts': figures})};\n")
    text = environment.get_template("index.html").render(report=document)
    (folder / "index.html").write_bytes(text.encode(errors="backslashreplace"))  # file names may be no valid text


def quote(path: str) -> str:
    """Returns a relative path as a relative URL."""
    return urllib.parse.quote(path)


def least_certain(images: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """Returns the indices of the images with the lowest confidence, the lowest first."""
    known = [index for index, image in enumerate(images) if image["confidence"] is not None]
    return heapq.nsmallest(number, known, key=lambda index: images[index]["confidence"])


def by_class(bins: Iterable[Mapping[str, Any]]) -> list[tuple[int, dict[int, Mapping[str, Any]]]]:
    """Returns the bins of each class by their lower edge; those of all classes together are left out."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for one in bins:
        if one["class"] is not None:
            found.setdefault(one["class"], {})[one["low"]] = one
    return sorted(found.items())


def window(box: list[int], height: int, width: int, aspect: float = 4 / 3) -> dict[str, float]:
    """Returns the part of an image that shows a region with its surroundings, as left, top, width, height in the image's units.

    Args:
      box: [top, left, height, width] of the region.
      height: of the image in pixels.
      width: of the image.
      aspect: width over height of what is shown, as far as the image reaches.
    """
    top, left, tall, wide = box
    wanted = max(2.5 * tall, 2.5 * wide / aspect, height / 4)
    shown_height, shown_width = min(height, wanted), min(width, wanted * aspect)
    x = min(max(0, left + wide / 2 - shown_width / 2), width - shown_width)
    y = min(max(0, top + tall / 2 - shown_height / 2), height - shown_height)
    return {"left": x, "top": y, "width": shown_width, "height": shown_height}


def _layers(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the title of each picture of an image, among them the other run's."""
    if not (against := document["against"]):
        return LAYERS
    return LAYERS | {f"other_{name}": f"{LAYERS[name]} of {against['title']}" for name in ("prediction", "error", "confidence")}


def _data(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the scripts need to filter, order and show the images."""
    images = []
    for index, image in enumerate(document["images"]):
        shown = dict(image, pictures={layer: quote(path) for layer, path in image["pictures"].items()})
        if against := document["against"]:
            other = against["images"][index]
            shown["difference"] = other["difference"]
            shown["pictures"] |= {f"other_{layer}": quote(path) for layer, path in other["pictures"].items()}
        images.append(shown)
    return {"images": images, "classes": document["dataset"]["classes"], "layers": _layers(document)}


def _read(package: str, path: str) -> bytes:
    return (importlib.resources.files(package) / path).read_bytes()
