"""Names of images and labels that were meant to match."""

import re
from collections.abc import Collection, Mapping

from pspnet_jax.errors import UserError


def check_partners(images: Mapping[str, str], labels: Mapping[str, str], directory: str) -> None:
    """Refuses two directories most of whose names do not match, but would without a word such as "_mask" or with other case.

    Args:
      images: files by name.
      labels: likewise.
      directory: of the labels, for the message.

    Raises:
      UserError: says how many, and gives the first two names as an example.
    """
    alone, spare = images.keys() - labels.keys(), labels.keys() - images.keys()
    if 2 * len(alone) < len(images) or not (near := _near(sorted(alone), spare)):
        return
    image, label = near
    raise UserError(
        f"{len(alone):,} of {len(images):,} images have no label of their name in {directory}; {images[image]} nearly matches "
        f"{labels[label]}: rename them so that both have one name but for the ending"
    )


def _near(names: list[str], others: Collection[str]) -> tuple[str, str] | None:
    """Returns the first name that nearly is one of the others, and that."""
    for simplify in (str.lower, _core):
        by_core = {simplify(other): other for other in sorted(others, reverse=True)}
        for name in names:
            if (core := simplify(name)) and core in by_core:
                return name, by_core[core]
    return None


def _core(name: str) -> str:
    """The name in lower case without its folders and without words at its start and end: "0001" of "a/IMG_0001-mask"."""
    base = name.rsplit("/", 1)[-1].lower()
    return re.sub(r"^[a-z]+[_\-. ]+(?=.)|(?<=.)[_\-. ]+[a-z]+$", "", base)
