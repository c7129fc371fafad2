"""Pictures of labels: palette PNGs, labels over images, image and truth and prediction side by side, class frequencies."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pspnet_jax import files
from pspnet_jax.datasets import IGNORE, Color, DatasetInfo
from pspnet_jax.errors import UserError

PANEL = 240  # least width of a panel: smaller images are enlarged by a whole factor
SHEET_PANEL = 400  # sides of an image in a contact sheet, at most
LINE, MARGIN = 18, 6  # pixels


def palette_image(label: np.ndarray, colors: Sequence[Color]) -> Image.Image:
    """Returns uint8[H, W] as a palette image (mode P) that keeps the values; 255 and what has no color is black."""
    image = Image.fromarray(label)
    image.putpalette(_table(colors).tobytes())
    return image


def colorize(label: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
    """Returns uint8[H, W, 3], in the classes' colors; 255 and what has no color is black."""
    return _table(colors)[label]


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[Color], alpha: float = 0.5) -> np.ndarray:
    """Returns uint8[H, W, 3]: (1 - alpha) of the image and alpha of the labels' colors; only the image where they are 255."""
    mixed = np.rint((1 - alpha) * image + alpha * colorize(label, colors)).astype(np.uint8)
    return np.where((label == IGNORE)[..., None], image, mixed)


def side_by_side(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, info: DatasetInfo) -> Image.Image:
    """Returns an image and two label maps of its size, 255 black, with captions, over a legend of the classes in the two."""
    height, width = truth.shape
    zoom = max(1, math.ceil(PANEL / width))
    size = zoom * width, zoom * height
    arrays = {"image": image, "truth": colorize(truth, info.colors), "prediction": colorize(prediction, info.colors)}
    panels = [(name, Image.fromarray(x).resize(size, Image.Resampling.NEAREST)) for name, x in arrays.items()]
    return _sheet(panels, size[0], len(panels), np.union1d(truth, prediction), info)


def contact_sheet(examples: Sequence[Mapping[str, Any]], info: DatasetInfo, columns: int = 3) -> Image.Image:
    """Returns images with their labels half over them, in rows under their names, over a legend of the classes in them.

    Args:
      examples: image uint8[H, W, 3], label uint8[H, W] and name each.
      info: names and colors.
      columns: how many side by side, each SHEET_PANEL pixels wide and at most as high.
    """
    panels = []
    for example in examples:
        panel = Image.fromarray(overlay(example["image"], example["label"], info.colors))
        scale = SHEET_PANEL / max(panel.size)
        size = max(1, round(panel.width * scale)), max(1, round(panel.height * scale))
        panels.append((example["name"], panel.resize(size, Image.Resampling.LANCZOS)))
    values = np.unique(np.concatenate([np.unique(example["label"]) for example in examples]))
    return _sheet(panels, SHEET_PANEL, columns, values, info)


def class_frequencies(pixels: np.ndarray, info: DatasetInfo) -> Image.Image:
    """Draws a bar for each class in its color, by its share of the labeled pixels (logarithmic), most frequent first.

    Args:
      pixels: int[K], of each class.
      info: names and colors.
    """
    order = np.argsort(-pixels, kind="stable")
    shares = pixels[order] / max(1, pixels.sum())
    figure = Figure(figsize=(8, 1 + 0.2 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    rank = np.arange(len(order))
    axes.barh(rank, shares, color=[np.array(info.colors[k]) / 255 for k in order], edgecolor="black", linewidth=0.5)
    axes.set_yticks(rank, [f"{info.class_names[k]}  {share:.3%}" for k, share in zip(order, shares, strict=True)], fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("share of the labeled pixels")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save(picture: Image.Image, path: epath.PathLike, kind: str = "PNG", **options: Any) -> None:
    """Writes a picture in one piece, or not at all."""
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        picture.save(file, kind, **options)


def save_over_own(picture: Image.Image, path: epath.PathLike) -> None:
    """Writes a PNG, but not over a file that this has not written.

    Raises:
      UserError: there is one.
    """
    path, mark = epath.Path(path), ("Software", "pspnet_jax")
    own = not path.exists()
    with contextlib.suppress(OSError), path.open("rb") as file:  # it is not there, or no picture
        own = own or Image.open(file).info.get(mark[0]) == mark[1]
    if not own:
        raise UserError(f"{path}: is there already, and this program did not draw it; choose another --output")
    marked = PngImagePlugin.PngInfo()
    marked.add_text(*mark)
    save(picture, path, pnginfo=marked)


def _sheet(
    panels: Sequence[tuple[str, Image.Image]], width: int, columns: int, values: np.ndarray, info: DatasetInfo
) -> Image.Image:
    """Returns panels of at most `width` in rows under their captions, over the names and colors of the classes in `values`."""
    heights = [LINE + max(panel.height for _, panel in panels[i : i + columns]) for i in range(0, len(panels), columns)]
    picture = Image.new("RGB", (columns * (width + MARGIN) - MARGIN, sum(heights)), "white")
    for i, (caption, panel) in enumerate(panels):
        left, top = i % columns * (width + MARGIN), sum(heights[: i // columns])
        ImageDraw.Draw(picture).text((left, top + 1), caption, "black", _font())
        picture.paste(panel, (left, top + LINE))
    classes = [int(k) for k in values if k < info.num_classes]
    entry = LINE + 2 * MARGIN + max((round(_font().getlength(info.class_names[k])) for k in classes), default=0)
    a_row = max(1, picture.width // entry)
    below = picture.height + MARGIN
    extended = Image.new("RGB", (picture.width, below + LINE * math.ceil(len(classes) / a_row)), "white")
    extended.paste(picture)
    pen = ImageDraw.Draw(extended)
    for i, k in enumerate(classes):
        left, top = i % a_row * entry, below + i // a_row * LINE
        pen.rectangle((left, top + 2, left + LINE - 4, top + LINE - 3), info.colors[k], "black")
        pen.text((left + LINE, top + 1), info.class_names[k], "black", _font())
    return extended


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)


def _table(colors: Sequence[Color]) -> np.ndarray:
    """Colors of all 256 values: uint8[256, 3]."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table
