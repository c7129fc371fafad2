"""Filters of the templates: numbers as the page shows them, with a dash for undefined ones, and parts of the report."""

import heapq
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def percent(fraction: float | None) -> str:
    """Returns a fraction in percent, with one decimal."""
    return DASH if fraction is None else f"{100 * fraction:.1f}"


def points(difference: float | None) -> str:
    """Returns a difference of fractions in percentage points, with its sign."""
    return DASH if difference is None else f"{100 * difference:+.1f}".replace("-", MINUS)


def interval(figure: Mapping[str, float | None], difference: bool = False) -> str:
    """Returns the interval of a figure in percent, or of a difference in percentage points; empty if it is undefined."""
    if figure["low"] is None:
        return ""
    low, high = ((points if difference else percent)(figure[end]) for end in ("low", "high"))
    return f"{low} to {high}" if difference else f"{low}{DASH}{high}"


def count(number: float | None) -> str:
    """Returns a number, rounded, with commas between thousands."""
    return DASH if number is None else f"{number:,.0f}"


def sizes(one: Mapping[str, Any]) -> str:
    """Returns a range of sizes whose upper end is excluded, such as "from 4,096" if it is open."""
    return f"from {count(one['low'])}" if one["high"] is None else f"{count(one['low'])}{DASH}{count(one['high'])}"


def levels(one: Mapping[str, Any]) -> str:
    """Returns a range of confidences in percent."""
    return f"{100 * one['low']:.0f}{DASH}{100 * one['high']:.0f}%"


def least_certain(images: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """Returns the indices of the images with the lowest confidence, the lowest first."""
    return heapq.nsmallest(number, range(len(images)), key=lambda index: images[index]["confidence"])


def by_class(bins: Iterable[Mapping[str, Any]]) -> list[tuple[int, dict[int, Mapping[str, Any]]]]:
    """Returns the bins of each class by their lower edge; those of all classes together are left out."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for one in bins:
        if one["class"] is not None:
            found.setdefault(one["class"], {})[one["low"]] = one
    return sorted(found.items())


ASPECT = 4 / 3  # width over height of what `window` shows, as far as the image reaches


def window(box: list[int], height: int, width: int) -> dict[str, float]:
    """Returns the part of an image that shows a region with its surroundings: left, top, width and height, in pixels.

    Args:
      box: [top, left, height, width] of the region.
      height, width: of the image.
    """
    top, left, tall, wide = box
    wanted = max(2.5 * tall, 2.5 * wide / ASPECT, height / 4)
    shown_height, shown_width = min(height, wanted), min(width, wanted * ASPECT)
    x = min(max(0, left + wide / 2 - shown_width / 2), width - shown_width)
    y = min(max(0, top + tall / 2 - shown_height / 2), height - shown_height)
    return {"left": x, "top": y, "width": shown_width, "height": shown_height}


ALL = (percent, points, interval, count, sizes, levels, least_certain, by_class, window, urllib.parse.quote)
