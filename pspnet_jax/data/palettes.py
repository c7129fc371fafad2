"""Whether label files agree, file by file, with the list of classes, and split by split, about what a value means."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
Color = tuple[int, ...]  # (R, G, B)
Known = dict[int, tuple[Color, str]]  # the color of a value, and the file where it was seen first


class Palettes:
    """Compares the colors of the values that occur in labels, and the values of binary masks.

    Gray ramps, in which value v is (v, v, v), say nothing, nor does a color that several values have.

    Attributes:
      seen: the first color of each value.
      contradiction: a sentence about the first value that means two things: its color is another value's elsewhere; or "".
      remarks: sentences about what differs but may be right, the first case of each kind.
    """

    def __init__(self, colors: Mapping[int, Color] = {}, num_classes: int = 0):
        """Begins with the colors that the folder's list of classes has, if any, and the number of classes, if it is known."""
        self.contradiction = self._difference = self._grays = ""
        self._listed: Known = {value: (color, "the list of classes") for value, color in colors.items()}
        self._num_classes, self._masks = num_classes, dict[int, str]()  # the first file with 1 but not 255, and the converse
        self.seen: Known = {}

    @property
    def remarks(self) -> list[str]:
        mixed = ""
        if {1, IGNORE} <= self._masks.keys():
            mixed = (
                f"{self._masks[1]} marks class 1 by 1, but {self._masks[IGNORE]} holds only 0 and {IGNORE}, which is ignored: "
                f"if these are masks of one kind, make {IGNORE} into 1"
            )
        return [remark for remark in (self._difference, self._grays, mixed) if remark]

    def add(self, file: str, values: np.ndarray, palette: Mapping[int, Color]) -> None:
        """Compares a label file: the pixels of each class and of 255, and the palette with only the values that occur in it."""
        if self._num_classes == 2 and bool(values[1]) != bool(values[IGNORE]):
            self._masks.setdefault(1 if values[1] else IGNORE, file)
        colors = [color for value, color in palette.items() if value != IGNORE]
        used: Known = {v: (color, file) for v, color in palette.items() if v != IGNORE and colors.count(color) == 1}
        if all(color == (value,) * 3 for value, (color, _) in used.items()):
            return
        # Some of the list's colors may be another value's by chance, as both are often made of 0, 64 and 128; not all of them.
        self._compare(used, self._listed, set(colors) <= {color for color, _ in self._listed.values()})
        self._compare(used, self.seen, True)
        self._look_at_grays(used)
        self.seen = used | self.seen

    def add_split(self, seen: Known) -> None:
        """Compares another split's, or another dataset's, `seen`, whose colors may be another value's by chance, too."""
        self._compare(seen, self.seen, {color for color, _ in seen.values()} <= {color for color, _ in self.seen.values()})
        self.seen = seen | self.seen

    def _compare(self, used: Known, known: Known, certain: bool) -> None:
        value_of = {color: value for value, (color, _) in known.items()}
        for value, (color, file) in used.items():
            there, where = known.get(value, (color, ""))
            if color == there:
                continue
            said = f"label value {value} is RGB {color} in the palette of {file}, but RGB {there} in {where}"
            if certain and color in value_of:
                said += f", where RGB {color} is value {value_of[color]}: the same value means different classes"
                self.contradiction = self.contradiction or said
            else:
                self._difference = self._difference or said

    def _look_at_grays(self, used: Known) -> None:
        """Programs that make palettes of gray pictures number the grays as they come."""
        grays = {value: color[0] for value, (color, _) in sorted(used.items()) if len(set(color)) == 1}
        if len(grays) < max(2, len(used)) or all(self._listed.get(value, ("",))[0] == used[value][0] for value in used):
            return
        shifted = any(gray != value and gray < self._num_classes for value, gray in grays.items())
        if shifted or list(grays.values()) != sorted(grays.values()):
            pairs = ", ".join(f"{value} is gray {gray}" for value, gray in list(grays.items())[:4])
            self._grays = self._grays or (
                f"label value {pairs} in the palette of {next(iter(used.values()))[1]}: its values count, not its grays; if a "
                "program made the palette from a gray picture, save the grays as an 8-bit gray PNG"
            )


def trained(dataset: ConfigDict) -> Known:
    """The colors of a run's training data, from its config."""
    return {value: (tuple(color), "the training data") for value, *color in dataset.palette}


def require_agreement(splits: Sequence[Known | None]) -> Known:
    """Compares the colors seen in several splits, of one dataset or of a mixture, and returns all of them.

    What differs is said in a warning.

    Raises:
      UserError: they contradict each other.
    """
    together = Palettes()
    for seen in filter(None, splits):
        together.add_split(seen)
    if together.contradiction:
        raise UserError(together.contradiction)
    for remark in together.remarks:
        logger.warning(remark)
    return together.seen
