"""Forms of labels that are not read: how a folder shows that it has them, and what their owner can do."""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

TO_COCO = "export or convert them to COCO's JSON, or to label images"
BANDS = re.compile(r"(?<![a-z])B(0?[1-9]|1[0-2]|8A)(?![a-z0-9])", re.IGNORECASE)  # in names of files
BY_EXTENSION = {
    ".nii": "NIfTI volumes: save their slices as .npy, TIFF or PNG, those of images and of labels in two folders",
    ".dcm": "DICOM files: save them as .npy, TIFF or PNG",
    ".shp": "a vector map: burn it into label images, for example with rasterio.features.rasterize",
    ".geojson": "a vector map: burn it into label images, for example with rasterio.features.rasterize",
    ".npz": "NumPy archives: save each of their arrays as .npy",
    ".xml": f"XML annotations: {TO_COCO}",
    ".svg": f"SVG drawings: {TO_COCO}",
    ".parquet": "Parquet tables: save the images and labels in them as files",
}
ARCHIVES = {  # which may be left over, so that they tell least
    ".gz": "compressed files: unpack them; save the slices of volumes (.nii) as .npy, TIFF or PNG",
    ".zip": "archives: unpack them",
    ".tar": "archives: unpack them",
    ".tgz": "archives: unpack them",
}
BY_KEYS: dict[frozenset[str], str] = {  # of the object in a JSON file, or of one in it
    frozenset({"regions", "filename"}): "VIA's polygons: in VIA, export them as COCO",
    frozenset({"objects", "imgHeight"}): "Cityscapes' polygons: write label images with cityscapesscripts (json2labelImg)",
    frozenset({"objects", "size"}): "Supervisely's annotations: in Supervisely, export them as masks or COCO",
    frozenset({"annotations", "item"}): f"Darwin's annotations: {TO_COCO}",
}
BY_TEXT = {  # of the first line of a text
    r"\d+( [01]?\.\d+){6,}": f"YOLO's polygons: {TO_COCO}",
    r"(-?\d+[ \t]+){20,}-?\d+": "text files with a number for each pixel: save them as .npy, after numpy.loadtxt(FILE, int)",
    r"(?i).*(encodedpixels|(?<![a-z])rle(?![a-z])).*": "run-length encoded masks: decode them to label images",
}


def advice(root: str, paths: Sequence[str], texts: Mapping[str, str], extensions: Sequence[str]) -> str:
    """Returns what a folder seems to have instead of labels that can be read, and what to do; "" if nothing is recognized.

    Given are the paths of its images and JSON files, {path: content} of its texts, and the extensions of all its files.
    """
    folders = [os.path.dirname(path) for path in paths]
    several = any(re.search(r"/masks?$", folder) and folders.count(folder) > 1 for folder in {*folders})
    found = ["several masks of one image: paint them into one label"] if several else []
    banded = collections.Counter(os.path.dirname(path) for path in paths if BANDS.search(os.path.basename(path)))
    if max(banded.values(), default=0) > 2:
        found.append("the bands of each image in separate files: stack them into one TIFF, for example with rasterio")
    found += [hint for kind, hint in BY_EXTENSION.items() if kind in extensions]
    for path in [path for path in paths if path.endswith(".json")][:3]:
        keys = _keys(f"{root}/{path}")
        found += [hint for needed, hint in BY_KEYS.items() if any(needed <= of_object for of_object in keys)]
    for text in list(texts.values())[:20]:
        first = text.strip().partition("\n")[0].strip()
        found += [hint for pattern, hint in BY_TEXT.items() if re.fullmatch(pattern, first)]
    found += [hint for kind, hint in ARCHIVES.items() if kind in extensions]
    return f"it seems to have {found[0]}" if found else ""


def _keys(file: str) -> list[set[str]]:
    """Returns the keys of the object in a JSON file and of those directly in it."""
    try:
        content: Any = json.loads(epath.Path(file).read_bytes())
    except ValueError:
        return []
    inside = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    return [{*found} for found in (content, *inside[:5]) if isinstance(found, dict)]
