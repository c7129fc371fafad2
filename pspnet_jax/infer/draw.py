"""Pictures of labels: palette images, overlays, side-by-side comparisons and contact sheets."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pspnet_jax import figures, files
from pspnet_jax.datasets import IGNORE, Color, DatasetInfo
from pspnet_jax.errors import UserError

# In pixels.
MIN_PANEL_WIDTH = 240  # of a side-by-side comparison: smaller images are enlarged by an integer factor
THUMBNAIL = 400  # long side of an image in a contact sheet
LINE, MARGIN = 18, 6


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Returns what pictures show of an image [H, W, C]: uint8[H, W, 3].

    That is the image itself, if it is uint8[H, W, 3]. Otherwise, it is the first three channels, or the first as gray; if they
    are not 8-bit, their 2nd to 98th percentile becomes 0 to 255.
    """
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    if shown.dtype == np.uint8:
        return shown
    low, high = np.percentile(shown[::4, ::4], (2, 98))  # of a sample, which takes less time
    return np.rint(((shown - low) * (255 / (high - low or 1))).clip(0, 255)).astype(np.uint8)


def palette_image(label: np.ndarray, colors: Sequence[Color]) -> Image.Image:
    """Returns uint8[H, W] as a palette image (mode P) that keeps the values; 255 and values without a color are black."""
    image = Image.fromarray(label)
    image.putpalette(_color_table(colors).tobytes())
    return image


def colorize(label: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """Returns the label in class colors, uint8[H, W, 3]; 255 and values without a color are black."""
    return _color_table(colors)[label]


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[Color], alpha: float = 0.5) -> np.ndarray:
    """Returns (1 - alpha) * image + alpha * class colors, uint8[H, W, 3]; pixels labeled 255 show the image alone."""
    image = to_rgb(image)
    mixed = cv2.addWeighted(image, 1 - alpha, colorize(label, colors), alpha, 0)  # rounded, without arrays of floats
    return np.where((label == IGNORE)[..., None], image, mixed)


def side_by_side(image: np.ndarray, labels: Mapping[str, np.ndarray], info: DatasetInfo) -> Image.Image:
    """Returns an image and its label maps side by side under captions, above a legend of their classes; 255 is black."""
    height, width = image.shape[:2]
    zoom = max(1, math.ceil(MIN_PANEL_WIDTH / width))
    size = zoom * width, zoom * height
    arrays = {"image": to_rgb(image)} | {name: colorize(label, info.colors) for name, label in labels.items()}
    panels = [(name, Image.fromarray(x).resize(size, Image.Resampling.NEAREST)) for name, x in arrays.items()]
    return _sheet(panels, size[0], len(panels), np.unique(list(labels.values())), info)


def contact_sheet(examples: Sequence[Mapping[str, Any]], info: DatasetInfo, columns: int = 3) -> Image.Image:
    """Returns a grid of images overlaid with their labels, each under its name, above a legend of the classes in them.

    Args:
      examples: each with image [H, W, C], label uint8[H, W] and name.
      info: class names and colors.
      columns: number of images per row.
    """
    panels = []
    for example in examples:
        panel = Image.fromarray(overlay(example["image"], example["label"], info.colors))
        scale = THUMBNAIL / max(panel.size)
        size = max(1, round(panel.width * scale)), max(1, round(panel.height * scale))
        panels.append((example["name"], panel.resize(size, Image.Resampling.LANCZOS)))
    values = np.unique(np.concatenate([np.unique(example["label"]) for example in examples]))
    return _sheet(panels, THUMBNAIL, columns, values, info)


def save(picture: Image.Image, path: epath.PathLike, kind: str = "PNG", **options: Any) -> None:
    """Writes a picture atomically."""
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        picture.save(file, kind, **options)


def save_replacing_own(picture: Image.Image, path: epath.PathLike) -> None:
    """Writes a PNG; replaces an existing file only if this function wrote it.

    Raises:
      UserError: the path holds another file.
    """
    path, mark = epath.Path(path), ("Software", "pspnet_jax")
    own = not path.exists()
    with contextlib.suppress(OSError), path.open("rb") as file:  # missing, or not an image
        own = own or Image.open(file).info.get(mark[0]) == mark[1]
    if not own:
        raise UserError(f"{path}: already exists and was not written by this program; choose another --output")
    marked = PngImagePlugin.PngInfo()
    marked.add_text(*mark)
    save(picture, path, pnginfo=marked)


def _sheet(
    panels: Sequence[tuple[str, Image.Image]], width: int, columns: int, values: np.ndarray, info: DatasetInfo
) -> Image.Image:
    """Arranges captioned panels, at most `width` pixels wide, in rows above a legend of the classes in `values`."""
    heights = [LINE + max(panel.height for _, panel in panels[i : i + columns]) for i in range(0, len(panels), columns)]
    picture = Image.new("RGB", (columns * (width + MARGIN) - MARGIN, sum(heights)), "white")
    for i, (caption, panel) in enumerate(panels):
        left, top = i % columns * (width + MARGIN), sum(heights[: i // columns])
        ImageDraw.Draw(picture).text((left, top + 1), _shortened(caption, width), "black", _font())
        picture.paste(panel, (left, top + LINE))
    classes = [int(k) for k in values if k < info.num_classes]
    names = {k: figures.legible(info.class_names[k], k) for k in classes}
    entry = LINE + 2 * MARGIN + max((round(_font().getlength(name)) for name in names.values()), default=0)
    per_row = max(1, picture.width // entry)
    legend_top = picture.height + MARGIN
    extended = Image.new("RGB", (picture.width, legend_top + LINE * math.ceil(len(classes) / per_row)), "white")
    extended.paste(picture)
    pen = ImageDraw.Draw(extended)
    for i, k in enumerate(classes):
        left, top = i % per_row * entry, legend_top + i // per_row * LINE
        pen.rectangle((left, top + 2, left + LINE - 4, top + LINE - 3), info.colors[k], "black")
        pen.text((left + LINE, top + 1), names[k], "black", _font())
    return extended


def _shortened(text: str, width: int) -> str:
    """Returns a text of at most `width` pixels, without its beginning if it is longer."""
    font, kept = _font(), text
    while font.getlength(kept) > width:
        kept = f"...{kept.removeprefix('...')[1:]}"
    return kept


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)


def _color_table(colors: Sequence[Color]) -> np.ndarray:
    """Returns the colors of all 256 values, uint8[256, 3]."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table
