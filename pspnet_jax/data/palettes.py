"""Checks that palette labels agree with each other and with the list of classes about the color of each class."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Color = tuple[int, ...]  # (R, G, B)
ValueColors = dict[int, tuple[Color, str]]  # {label value: (its color, the file where it was first seen)}


class Palettes:
    """Compares the colors of label values across files, and the values of binary masks.

    Gray ramps, in which value v is (v, v, v), and colors that several values share are not compared.

    Attributes:
      seen: the first color of each value.
      contradiction: a sentence about the first value whose color belongs to another value elsewhere; or "".
      remarks: sentences about differences that may be harmless, at most one of each kind.
    """

    def __init__(self, colors: Mapping[int, Color] = {}, num_classes: int = 0):
        """Starts with the colors from the folder's list of classes, if any, and the number of classes, if known."""
        self.contradiction = self._difference = self._grays = ""
        self._listed: ValueColors = {value: (color, "the list of classes") for value, color in colors.items()}
        self._num_classes = num_classes
        self._masks: dict[int, str] = {}  # {1: the first file with 1 but not 255, 255: the first with 255 but not 1}
        self.seen: ValueColors = {}

    @property
    def remarks(self) -> list[str]:
        mixed = ""
        if {1, IGNORE} <= self._masks.keys():
            mixed = (
                f"{self._masks[1]} marks class 1 with value 1, but {self._masks[IGNORE]} contains only 0 and {IGNORE}, and "
                f"{IGNORE} is ignored; if both are masks of class 1, change {IGNORE} to 1"
            )
        return [remark for remark in (self._difference, self._grays, mixed) if remark]

    def add(self, file: str, pixels: np.ndarray, palette: Mapping[int, Color]) -> None:
        """Compares a label file with those before it, given its pixels per value and the colors of the values in it."""
        if self._num_classes == 2 and bool(pixels[1]) != bool(pixels[IGNORE]):
            self._masks.setdefault(1 if pixels[1] else IGNORE, file)
        colors = [color for value, color in palette.items() if value != IGNORE]
        used: ValueColors = {v: (color, file) for v, color in palette.items() if v != IGNORE and colors.count(color) == 1}
        if all(color == (value,) * 3 for value, (color, _) in used.items()):
            return
        # Many palettes use 0, 64 and 128, so a single color may match another class in the list by chance. A contradiction is
        # certain only if all colors are in the list.
        self._compare(used, self._listed, set(colors) <= {color for color, _ in self._listed.values()})
        self._compare(used, self.seen, True)
        self._compare_grays(used)
        self.seen = used | self.seen

    def add_split(self, seen: ValueColors) -> None:
        """Compares the `seen` of another split or dataset. As in `add`, a single color may match another value by chance."""
        self._compare(seen, self.seen, {color for color, _ in seen.values()} <= {color for color, _ in self.seen.values()})
        self.seen = seen | self.seen

    def _compare(self, used: ValueColors, known: ValueColors, certain: bool) -> None:
        value_of = {color: value for value, (color, _) in known.items()}
        for value, (color, file) in used.items():
            known_color, known_file = known.get(value, (color, ""))
            if color == known_color:
                continue
            sentence = f"label value {value} is RGB {color} in the palette of {file}, but RGB {known_color} in {known_file}"
            if certain and color in value_of:
                sentence += f", where RGB {color} is value {value_of[color]}: the same value means different classes"
                self.contradiction = self.contradiction or sentence
            else:
                self._difference = self._difference or sentence

    def _compare_grays(self, used: ValueColors) -> None:
        """Detects gray images converted to a palette: the grays were the class indices, and the new values are arbitrary."""
        grays = {value: color[0] for value, (color, _) in sorted(used.items()) if len(set(color)) == 1}
        if len(grays) < max(2, len(used)) or all(self._listed.get(value, ("",))[0] == used[value][0] for value in used):
            return
        shifted = any(gray != value and gray < self._num_classes for value, gray in grays.items())
        if shifted or list(grays.values()) != sorted(grays.values()):
            pairs = ", ".join(f"{value} is gray {gray}" for value, gray in list(grays.items())[:4])
            self._grays = self._grays or (
                f"label value {pairs} in the palette of {next(iter(used.values()))[1]}; the values are used, not the grays. If "
                "a program converted a gray image to this palette, save the grays as an 8-bit gray PNG"
            )


def training_colors(dataset: ConfigDict) -> ValueColors:
    """Returns the colors of a run's training data, as saved in its config."""
    return {value: (tuple(color), "the training data") for value, *color in dataset.palette}


def require_agreement(splits: Sequence[ValueColors | None]) -> ValueColors:
    """Merges the label colors of several splits of one dataset or of a mixture, and warns about differences.

    Raises:
      UserError: the colors contradict each other.
    """
    together = Palettes()
    for seen in filter(None, splits):
        together.add_split(seen)
    if together.contradiction:
        raise UserError(together.contradiction)
    for remark in together.remarks:
        logger.warning(remark)
    return together.seen
