"""The page of a report: index.html and its assets, which open from disk, without a server or a network."""

import importlib.resources
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from etils import epath

from pspnet_jax.analysis.pictures import OF_RUN

LAYERS = {"image": "Image", "truth": "Truth", "prediction": "Prediction", "error": "Error", "confidence": "Confidence"}


def write(document: Mapping[str, Any], folder: epath.Path) -> None:
    """Writes index.html and assets/ into the folder of a report.

    Args:
      document: the contents of report.json (docs/report.md).
      folder: exists, and holds the pictures that `document` names by relative paths.
    """
    import jinja2

    from pspnet_jax.analysis.page import charts, filters

    figures = {name: chart.to_plotly_json() for name, chart in charts.all_of(document).items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {one.__name__: one for one in filters.ALL}
    environment.globals |= {"layers": _layers(document), "charts": figures}
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    resources = importlib.resources.files
    for file in (*(resources(__name__) / "assets").iterdir(), resources("plotly") / "package_data/plotly.min.js"):
        (assets / file.name).write_bytes(file.read_bytes())
    (assets / "data.js").write_text(f"const REPORT = {json.dumps(_data(document) | {'charts': figures})};\n")
    text = environment.get_template("index.html").render(report=document)
    (folder / "index.html").write_bytes(text.encode(errors="backslashreplace"))  # file names may be no valid text


def _layers(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the title of each picture of an image, among them the other run's."""
    if not (against := document["against"]):
        return LAYERS
    return LAYERS | {f"other_{name}": f"{LAYERS[name]} of {against['title']}" for name in OF_RUN}


def _data(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the scripts need to filter, order and show the images."""
    images = []
    for index, image in enumerate(document["images"]):
        shown = dict(image, pictures={layer: urllib.parse.quote(path) for layer, path in image["pictures"].items()})
        if against := document["against"]:
            other = against["images"][index]
            shown["difference"] = other["difference"]
            shown["pictures"] |= {f"other_{layer}": urllib.parse.quote(path) for layer, path in other["pictures"].items()}
        images.append(shown)
    return {"images": images, "classes": document["dataset"]["classes"], "layers": _layers(document)}
