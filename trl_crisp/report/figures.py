"""Figures from logs. They need matplotlib, from the extra `report`, and no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LENGTH_KEY = "completions/mean_length"
REFRESHES_KEY = "teacher/refreshes"


def refresh_steps(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the logged steps at which the count of the teacher's refreshes has grown.

    If every step is logged (`logging_steps` 1) these are the steps of the refreshes; otherwise the first logged steps after them.
    """
    steps, seen = [], 0
    for entry in log_history:
        if REFRESHES_KEY in entry:
            if entry[REFRESHES_KEY] > seen:
                steps.append(int(entry["step"]))
            seen = entry[REFRESHES_KEY]
    return steps


def completion_length_figure(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Length of the rollouts in training"
) -> Path:
    """Draw the mean length of the rollouts (tokens) over the steps into `path`, with a mark at each refresh.

    `log_history` is `trainer.state.log_history`. The extension of `path` sets the format (.png, .svg, .pdf).
    Raises `ValueError` if no entry has a length.
    """
    points = [(entry["step"], entry[LENGTH_KEY]) for entry in log_history if entry.get(LENGTH_KEY) is not None]
    if not points:
        raise ValueError(
            f"None of the {len(log_history)} log entries has {LENGTH_KEY!r}, so there is nothing to draw: pass "
            "trainer.state.log_history of a run that trained at least logging_steps steps."
        )
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, lengths_tokens = zip(*points, strict=True)
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, lengths_tokens, marker="o", markersize=3.5, linewidth=1.2, color="#1f4e79", label="mean length")
    for number, step in enumerate(refresh_steps(log_history)):
        label = "teacher refreshed" if number == 0 else None
        axes.axvline(step, color="#c55a11", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("tokens per rollout")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
