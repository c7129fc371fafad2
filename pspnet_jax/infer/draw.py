"""Pictures of labels: palette PNGs, labels over an image, image and truth and prediction side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pspnet_jax.datasets import IGNORE, Color, DatasetInfo

PANEL = 240  # least width of a panel: smaller images are enlarged by a whole factor
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
    """Returns image, truth and prediction next to each other, with captions, over a legend of the classes in the two.

    Args:
      image: uint8[H, W, 3].
      truth: uint8[H, W]; pixels of 255 are black.
      prediction: uint8[H, W].
      info: names and colors.
    """
    height, width = truth.shape
    zoom = max(1, -(-PANEL // width))
    panels = {"image": image, "truth": colorize(truth, info.colors), "prediction": colorize(prediction, info.colors)}
    present = [k for k in range(info.num_classes) if (truth == k).any() or (prediction == k).any()]
    font = ImageFont.load_default(size=12)
    entry = LINE + 2 * MARGIN + max((round(font.getlength(info.class_names[k])) for k in present), default=0)
    total = 3 * zoom * width + 2 * MARGIN
    a_row = max(1, total // entry)
    below = LINE + zoom * height + MARGIN
    picture = Image.new("RGB", (total, below + LINE * -(-len(present) // a_row)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (caption, panel) in enumerate(panels.items()):
        left = i * (zoom * width + MARGIN)
        pen.text((left, 1), caption, "black", font)
        picture.paste(Image.fromarray(panel).resize((zoom * width, zoom * height), Image.Resampling.NEAREST), (left, LINE))
    for i, k in enumerate(present):
        left, top = i % a_row * entry, below + i // a_row * LINE
        pen.rectangle((left, top + 2, left + LINE - 4, top + LINE - 3), info.colors[k], "black")
        pen.text((left + LINE, top + 1), info.class_names[k], "black", font)
    return picture


def _table(colors: Sequence[Color]) -> np.ndarray:
    """Colors of all 256 values: uint8[256, 3]."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table
