"""What all labels of a split together say: whether there is something to learn, and which classes never occur."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from pspnet_jax.datasets import IGNORE

logger = logging.getLogger(__name__)
LISTED = 8  # classes in a warning


@dataclasses.dataclass(frozen=True)
class Totals:
    """Pixels of each label value.

    Attributes:
      what: the split, for messages.
      labels: how many labels were looked at.
      of: how many there are.
      values: int64[256], their pixels of each class and of 255, which is ignored.
    """

    what: str
    labels: int
    of: int
    values: np.ndarray

    def __add__(self, other: "Totals") -> "Totals":
        what = f"{self.what} and {other.what}"
        return Totals(what, self.labels + other.labels, self.of + other.of, self.values + other.values)

    def problem(self, names: Sequence[str], train: bool = True) -> str | None:
        """Says why nothing can be learned from the labels, or, without `train`, scored by them; None if something can.

        One class alone is enough to be scored by.
        """
        present = np.flatnonzero(self.values[: len(names)])
        if len(present) > 1 or not self.labels:
            return None
        if not len(present):
            return f"{self._where}: every pixel is {IGNORE}, which is ignored: there is nothing to learn or to be scored by"
        if present[0] == 0 and len(names) == 2 and self.values[IGNORE]:
            return (
                f"{self._where}: they hold only 0 and {IGNORE}, and {IGNORE} is ignored here: make {IGNORE} into 1 if it is "
                f"{names[1]!r}"
            )
        if not train:
            return None
        share = self.values[IGNORE] / self.values.sum()
        return (
            f"{self._where}: {names[present[0]]!r} ({present[0]}) is the only class of {len(names)} that occurs; {share:.0%} "
            f"of the pixels are {IGNORE}, which is ignored: there is nothing to learn; look at the labels' values"
        )

    def warn(self, names: Sequence[str]) -> None:
        """Names the classes without a pixel, in a warning."""
        missing = [value for value in range(len(names)) if not self.values[value]]
        if not missing or len(missing) >= len(names):
            return
        listed = ", ".join(f"{names[value]!r} ({value})" for value in missing[:LISTED])
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        hint = "; if the labels count from 1, subtract 1" if missing[0] == 0 and self.values[len(names) - 1] else ""
        if ignored := self.values[IGNORE]:
            hint += f"; {ignored / self.values.sum():.1%} of the pixels are {IGNORE}, which is ignored"
        logger.warning(f"{self._where}: no pixel of {listed}{more}{hint}")

    @property
    def _where(self) -> str:
        count = f"{self.labels:,}" if self.labels >= self.of else f"{self.labels:,} of {self.of:,}"
        return f"{self.what}, {count} labels looked at"
