"""Numbers as the page shows them. A value that is undefined is a dash."""

from collections.abc import Mapping
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
