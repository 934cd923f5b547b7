"""How numbers are written on a page: percent, points, tokens, and intervals."""

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"  # noqa: RUF001


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share in [0, 1] as percent."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}%"


def tokens(count: float | None) -> str:
    """Write a number of tokens; with a decimal if it is small."""
    if count is None or not math.isfinite(count):
        return NOTHING
    return f"{count:,.0f}" if abs(count) >= 100 else f"{count:.1f}"


def points(change: float | None) -> str:
    """Write a difference of shares in points, with its sign."""
    return NOTHING if change is None or not math.isfinite(change) else f"{_signed(100 * change, 1)} points"


def interval_in_points(change: Mapping[str, Any] | None, unit: str = " points") -> str:
    """Write an interval of a difference of shares: `+3.7 points [-1.1, +9.0]`."""
    if change is None:
        return NOTHING
    estimate, low, high = (_signed(100 * change[key], 1) for key in ("estimate", "low", "high"))
    return f"{estimate}{unit} [{low}, {high}]"


def interval_of_tokens(reduction: Mapping[str, Any] | None) -> str:
    """Write a reduction as the change of tokens: `-74% [-77%, -71%]`."""
    if reduction is None:
        return NOTHING
    estimate, low, high = (_signed(-100 * reduction[key], 0) for key in ("estimate", "low", "high"))
    return f"{estimate}% [{high}%, {low}%]"


def change_of_tokens(reduction: float | None) -> str:
    """Write a reduction as the change of tokens: `-74%`."""
    return NOTHING if reduction is None or not math.isfinite(reduction) else f"{_signed(-100 * reduction, 0)}%"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    # A change that rounds to nothing has no sign
    return text[1:] if float(text) == 0 else text
