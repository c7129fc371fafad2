"""Polygons in the JSON files of COCO and labelme, painted as their image's label is read.

As in labelme's own exports, Pillow fills a polygon, and pixels on its outline belong to it. labelme's shapes are painted in the
file's order, COCO's from the largest to the smallest, so that windows stay visible on a facade.
"""

import collections
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from pspnet_jax.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)
BACKGROUND = "background"  # category of the pixels outside all polygons


class OtherJsonError(UserError):
    """A JSON file has neither labelme's nor COCO's fields."""


class Drawing(NamedTuple):
    """The polygons of an image: its (width, height), and category and outlines of each, float32[N,2] of x and y, or a mask."""

    size: tuple[int, int]
    shapes: list[tuple[str, list[np.ndarray] | dict[str, Any]]]

    def paint(self, value_of: Callable[[str], int]) -> np.ndarray:
        """Returns uint8[H,W] with the value of each pixel's category."""
        canvas = Image.new("L", self.size, value_of(BACKGROUND))
        pen = ImageDraw.Draw(canvas)
        for category, parts in self.shapes:
            value = value_of(category)
            if isinstance(parts, dict):
                canvas.paste(value, mask=Image.fromarray(_decode_rle(parts)))
            else:
                for part in parts:
                    pen.polygon(part.ravel().tolist(), fill=value, outline=value)
        return np.asarray(canvas)


def is_coco(pattern: str) -> bool:
    """Returns whether a pattern of label files stands for one COCO file for all images, and not for a file for each."""
    return pattern.endswith(".json") and "{name}" not in pattern


def read(file: str, image_file: str) -> Drawing:
    """Returns the polygons of an image from a COCO file, or from the image's labelme file.

    Raises:
      UserError: the file is neither, or does not contain the image.
    """
    content = _read(file)
    if isinstance(content, Drawing):
        return content
    if not (key := content.key(image_file)):
        raise UserError(f"has no entry for {image_file}; add it, or remove the image")
    return content[key]


def listed(file: str, images: Mapping[str, str]) -> dict[str, str]:
    """Returns {name: file} of the images in a COCO file, where {name: path} are the images that were found.

    Raises:
      UserError: it is no COCO file, or two of the images may be the same in it.
    """
    content, name_of = _coco_file(file), dict[str, str]()
    for name, path in images.items():
        if (key := content.key(path)) and (other := name_of.setdefault(key, name)) != name:
            raise UserError(
                f"{file}: {key} may be {images[other]} or {path}; put the folder into file_name, or name it in dataset.images"
            )
    return {name_of.get(key, os.path.splitext(key)[0]): file for key in content}


def categories(file: str) -> list[str]:
    """Returns the categories of a COCO or labelme file that have polygons."""
    content = _read(file)
    return [name for name, _ in content.shapes] if isinstance(content, Drawing) else [*content.categories.values()]


def class_names(root: str, pattern: str) -> tuple[str, ...]:
    """Returns "background" and the categories that have annotations in any split's COCO file, in the order of their ids.

    Categories without annotations, such as super-categories, are no classes.
    """
    files = sorted(epath.Path(root).expanduser().glob(pattern.replace("{split}", "*")))
    categories = {number: name for file in files for number, name in _coco_file(str(file)).categories.items()}
    names = dict.fromkeys([BACKGROUND, *(name for _, name in sorted(categories.items()))])
    return tuple(names) if categories else ()


def _coco_file(file: str) -> "_Coco":
    if not epath.Path(file).exists():
        raise MissingFileError(f"{file}: no such file; it should be a COCO file")
    try:
        content = _read(file)
    except UserError as error:
        raise type(error)(f"{file}: {error}") from error
    if isinstance(content, Drawing):
        raise UserError(f"{file}: is labelme's file of one image; put {{name}} into dataset.labels")
    return content


class _Coco(dict[str, Drawing]):
    """{name of an image: its polygons}, and {id: name} of the categories that have any.

    The name is that of the image's file, without the folders in front of it unless these tell images apart.
    """

    categories: dict[int, str]

    def key(self, image_file: str) -> str:
        """Returns the name of an image, given its path; "" if it is not listed."""
        return next((tail for tail in _tails(image_file) if tail in self), "")


def _tails(path: str) -> list[str]:
    """Returns a path without more and more of its folders: a/b/c.jpg, b/c.jpg, c.jpg."""
    parts = path.replace("\\", "/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _read(file: str) -> Drawing | _Coco:
    status = epath.Path(file).stat()
    return _parse(file, status.mtime, status.length)


@functools.lru_cache(maxsize=8)
def _parse(file: str, time: float, size: int) -> Drawing | _Coco:
    """Returns the content of a file, whose time or size changes whenever it does."""
    try:
        content = json.loads(epath.Path(file).read_bytes())
        if not isinstance(content, dict) or content.keys().isdisjoint(("shapes", "annotations")):
            raise OtherJsonError("cannot be read as a labelme or COCO file (it has neither shapes nor annotations)")
        return _labelme(content) if "shapes" in content else _coco(content, file)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"cannot be read as a labelme or COCO file ({why})") from error


def _labelme(content: dict[str, Any]) -> Drawing:
    shapes: list[tuple[str, Any]] = []
    for shape in content["shapes"]:
        points, kind = np.asarray(shape["points"], np.float32), shape.get("shape_type") or "polygon"
        if kind == "rectangle":
            (left, top), (right, bottom) = points
            points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32)
        elif kind == "circle":
            center, other = points
            angles = np.linspace(0, 2 * np.pi, 100, endpoint=False, dtype=np.float32)
            points = center + np.hypot(*(other - center)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        elif kind != "polygon" or len(points) < 3:
            raise ValueError(f"{shape['label']!r} is a {kind} of {len(points)} points, not a polygon, rectangle or circle")
        shapes.append((shape["label"], [points]))
    return Drawing((content["imageWidth"], content["imageHeight"]), shapes)


def _coco(content: dict[str, Any], file: str) -> _Coco:
    annotations = [annotation for annotation in content["annotations"] if annotation.get("segmentation")]
    if bare := len(content["annotations"]) - len(annotations):
        logger.warning(f"{file}: {bare} annotations of {len(annotations) + bare} are left out because they have no polygon")
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    drawings = {image["id"]: Drawing((image["width"], image["height"]), []) for image in content["images"]}
    if of_others := [annotation for annotation in annotations if annotation["image_id"] not in drawings]:
        logger.warning(f"{file}: {len(of_others)} annotations are left out because their images are not listed")
        annotations = [annotation for annotation in annotations if annotation["image_id"] in drawings]
    for annotation in sorted(annotations, key=lambda annotation: -(annotation.get("area") or 0)):
        parts, category = annotation["segmentation"], annotation["category_id"]
        if category not in names:
            raise UserError(f"has annotations of category {category!r}, which is not among its categories; add it")
        if not isinstance(parts, dict) and any(len(part) % 2 for part in parts):
            raise UserError(f"has a polygon with a y missing, in annotation {annotation.get('id')}; correct it")
        outlines = parts if isinstance(parts, dict) else [np.asarray(part, np.float32).reshape(-1, 2) for part in parts]
        drawings[annotation["image_id"]].shapes.append((names[category], outlines))
    tails = {image["id"]: _tails(image["file_name"]) for image in content["images"]}
    used = collections.Counter(tail for of_image in tails.values() for tail in of_image)
    keys = {number: min((t for t in found if used[t] == 1), key=len, default=found[0]) for number, found in tails.items()}
    found = _Coco((keys[number], drawing) for number, drawing in drawings.items())
    if len(found) < len(drawings):
        raise ValueError("two images have the same file name")
    found.categories = {number: names[number] for number in {annotation["category_id"] for annotation in annotations}}
    return found


def _decode_rle(mask: dict[str, Any]) -> np.ndarray:
    """Returns COCO's run-length encoded mask, column by column from 0, as uint8[H,W] of 0 and 255."""
    counts = mask["counts"] if isinstance(mask["counts"], list) else _decode_counts(mask["counts"])
    runs = np.repeat(np.arange(len(counts)) % 2 * np.uint8(255), counts)
    return runs.reshape(mask["size"][::-1]).T.astype(np.uint8)


def _decode_counts(text: str) -> list[int]:
    """Decodes COCO's text form: 5 bits per character, lowest first; from the fourth on, differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            value -= (1 << shift) if code - 48 & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
