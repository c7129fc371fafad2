"""Checks on all labels of a split together: whether anything can be learned, and which classes never occur."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from pspnet_jax.datasets import IGNORE

logger = logging.getLogger(__name__)
MAX_LISTED = 8  # classes in a warning


@dataclasses.dataclass(frozen=True)
class Totals:
    """Number of pixels of each label value in a split or in a sample of it.

    Attributes:
      split: its name, for messages.
      counted: number of labels that were counted.
      total: number of labels in the split.
      pixels: int64[256], number of pixels of each class and of 255, which is ignored.
    """

    split: str
    counted: int
    total: int
    pixels: np.ndarray

    def __add__(self, other: "Totals") -> "Totals":
        split = f"{self.split} and {other.split}"
        return Totals(split, self.counted + other.counted, self.total + other.total, self.pixels + other.pixels)

    def problem(self, names: Sequence[str], train: bool = True) -> str | None:
        """Returns why the labels cannot be used for training or, without `train`, for evaluation; None if they can.

        A single class is enough for evaluation.
        """
        present = np.flatnonzero(self.pixels[: len(names)])
        if len(present) > 1 or not self.counted:
            return None
        if not len(present):
            return f"{self._where}: every pixel is {IGNORE}, which is ignored, so there is nothing to learn or to evaluate"
        if present[0] == 0 and len(names) == 2 and self.pixels[IGNORE]:
            return (
                f"{self._where}: the only values are 0 and {IGNORE}, and {IGNORE} is ignored; if {IGNORE} means {names[1]!r}, "
                f'change it to 1, or set dataset.label_map="{{0: 0, {IGNORE}: 1}}"'
            )
        if not train:
            return None
        share = self.pixels[IGNORE] / self.pixels.sum()
        return (
            f"{self._where}: {names[present[0]]!r} ({present[0]}) is the only one of {len(names)} classes that occurs, so "
            f"there is nothing to learn; {share:.0%} of the pixels are {IGNORE}, which is ignored; check the labels' values"
        )

    def warn(self, names: Sequence[str]) -> None:
        """Warns about classes that never occur."""
        missing = [value for value in range(len(names)) if not self.pixels[value]]
        if not missing or len(missing) >= len(names):
            return
        listed = ", ".join(f"{names[value]!r} ({value})" for value in missing[:MAX_LISTED])
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        hint = "; if the labels count from 1, set dataset.label_map" if missing[0] == 0 and self.pixels[len(names) - 1] else ""
        if ignored := self.pixels[IGNORE]:
            hint += f"; {ignored / self.pixels.sum():.1%} of the pixels are {IGNORE}, which is ignored"
        logger.warning(f"{self._where}: no pixel has class {listed}{more}{hint}")

    @property
    def _where(self) -> str:
        count = f"{self.counted:,}" if self.counted >= self.total else f"{self.counted:,} of {self.total:,}"
        return f"{self.split}, {count} labels checked"
