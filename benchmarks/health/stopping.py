"""Rules for the stop and for the gate, as functions of the measurements alone, and what they would have done in the runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seen:
    """
    What a rule sees of a measurement: the step, the change of agreement with the ends of its 95% interval (shares), and mean tokens.
    """

    step: int
    change: float
    low: float
    high: float
    mean_tokens: float


def seen_in(run: dict[str, Any]) -> list[Seen]:
    """Return what the monitor of a run saw after the first step."""
    return [
        Seen(
            one["step"],
            one["agreement_change"],
            one["agreement_change_low"],
            one["agreement_change_high"],
            one["agreement_mean_tokens"],
        )
        for one in run["measurements"][1:]
    ]


Holds = Callable[[Seen, float], bool]


def _below(seen: Seen, margin: float) -> bool:
    # Rounding must not turn a drop of exactly the margin into more
    return seen.change < -margin - 1e-9


def _below_surely(seen: Seen, margin: float) -> bool:
    return _below(seen, margin) and seen.high < 0


def _surely_below(seen: Seen, margin: float) -> bool:
    return seen.high < -margin


# What counts against a measurement, and how often in a row it ends the run
STOP_RULES: dict[str, tuple[Holds, int]] = {
    "estimate below the margin and interval below 0, twice": (_below_surely, 2),
    "the same, once": (_below_surely, 1),
    "the same, three times": (_below_surely, 3),
    "estimate below the margin, once": (_below, 1),
    "estimate below the margin, twice": (_below, 2),
    "interval below the margin, once": (_surely_below, 1),
    "interval below the margin, twice": (_surely_below, 2),
}
PLANNED = next(iter(STOP_RULES))

# When a due refresh may happen
GATE_RULES: dict[str, Holds] = {
    "estimate at least -margin": lambda seen, margin: not _below(seen, margin),
    "interval's low end at least -margin": lambda seen, margin: seen.low >= -margin - 1e-9,
    "unless estimate below -margin and interval below 0": lambda seen, margin: not _below_surely(seen, margin),
}


def stop_at(seen: Sequence[Seen], rule: str, margin: float) -> int | None:
    """Return the index of the measurement after which a rule stops, `None` if it never does."""
    holds, times = STOP_RULES[rule]
    in_a_row = 0
    for i, one in enumerate(seen):
        in_a_row = in_a_row + 1 if holds(one, margin) else 0
        if in_a_row == times:
            return i
    return None


def shortest_that_holds(seen: Sequence[Seen], margin: float) -> int | None:
    """Return the index of the measurement with the fewest tokens whose change is at least -margin; `None` stands for the base."""
    holding = [i for i, one in enumerate(seen) if not _below(one, margin)]
    return min(holding, key=lambda i: seen[i].mean_tokens) if holding else None
