"""Detects image and label names that differ only by a prefix, a suffix or case."""

import re
from collections.abc import Collection, Mapping

from pspnet_jax.errors import UserError


def check_partners(images: Mapping[str, str], labels: Mapping[str, str], directory: str) -> None:
    """Raises a UserError if most names in two directories differ, but would match without case or affixes such as "_mask".

    The arguments are {name: file} of the images and of the labels, and the labels' directory, for the message.
    """
    unmatched_images, unmatched_labels = images.keys() - labels.keys(), labels.keys() - images.keys()
    if 2 * len(unmatched_images) < len(images) or not (near := _near_match(sorted(unmatched_images), unmatched_labels)):
        return
    image, label = near
    raise UserError(
        f"{len(unmatched_images):,} of {len(images):,} images have no label of the same name in {directory}; "
        f"{images[image]} nearly matches {labels[label]}: rename the files so that only their extensions differ"
    )


def _near_match(names: list[str], others: Collection[str]) -> tuple[str, str] | None:
    """Returns the first name that nearly matches one of the others, and its match."""
    for simplify in (str.lower, _core):
        by_core = {simplify(other): other for other in sorted(others, reverse=True)}
        for name in names:
            if (core := simplify(name)) and core in by_core:
                return name, by_core[core]
    return None


def _core(name: str) -> str:
    """Returns a name in lower case without its folders, prefix and suffix: "0001" for "a/IMG_0001-mask"."""
    base = name.rsplit("/", 1)[-1].lower()
    return re.sub(r"^[a-z]+[_\-. ]+(?=.)|(?<=.)[_\-. ]+[a-z]+$", "", base)
