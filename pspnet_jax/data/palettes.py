"""Whether the palettes of label files agree, file by file and with the list of classes, about what a value means."""

from collections.abc import Mapping

from pspnet_jax.datasets import IGNORE

Color = tuple[int, ...]  # (R, G, B)
Known = dict[int, tuple[Color, str]]  # the color of a value, and where it was seen first


class Palettes:
    """Compares the colors of the values that occur in labels; gray ramps, in which value v is (v, v, v), say nothing.

    Attributes:
      contradiction: a sentence about the first value that means two things: its color is another value's elsewhere; or "".
      difference: a sentence about the first value that just has two colors; or "".
    """

    def __init__(self, colors: Mapping[int, Color]):
        """Begins with the colors that the folder's list of classes has, if any."""
        self.contradiction = self.difference = ""
        self._listed: Known = {value: (color, "the list of classes") for value, color in colors.items()}
        self._seen: Known = {}

    def add(self, file: str, palette: Mapping[int, Color]) -> None:
        """Compares the palette of a label file, with only the values that occur in it."""
        used = {value: color for value, color in palette.items() if value != IGNORE}
        if all(color == (value,) * 3 for value, color in used.items()) or len(set(used.values())) < len(used):
            return
        # Some of the list's colors may be another value's by chance, as both are often made of 0, 64 and 128; not all of them.
        self._compare(file, used, self._listed, set(used.values()) <= {color for color, _ in self._listed.values()})
        self._compare(file, used, self._seen, True)
        for value, color in used.items():
            self._seen.setdefault(value, (color, file))

    def _compare(self, file: str, used: Mapping[int, Color], known: Known, certain: bool) -> None:
        value_of = {color: value for value, (color, _) in known.items()}
        for value, color in used.items():
            there, where = known.get(value, (color, ""))
            if color == there:
                continue
            said = f"label value {value} is RGB {color} in the palette of {file}, but RGB {there} in {where}"
            if certain and color in value_of:
                said += f", where RGB {color} is value {value_of[color]}: the same value means different classes"
                self.contradiction = self.contradiction or said
            else:
                self.difference = self.difference or said
