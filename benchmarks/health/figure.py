"""The figure: accuracy, agreement and tokens along runs without and with the gate."""

from pathlib import Path
from typing import Any

from benchmarks.health.answers import RIGHT
from benchmarks.health.measured import Runs, codes_of
from benchmarks.health.settings import MONITOR_MARGIN
from benchmarks.health.stopping import PLANNED, seen_in, shortest_that_holds, stop_at

SEED = 0
PANELS = {
    "tradeoff, every refresh": "tradeoff-m20-ungated",
    "tradeoff, gated": "tradeoff-m20-gated",
    "stability, every refresh": "stability-m20-ungated",
    "stability, gated": "stability-m20-gated",
}


def draw(runs: Runs, output: Path) -> None:
    """Draw tokens above accuracy and agreement along four runs, with their refreshes, the stop and the checkpoint that it names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig, axes = plt.subplots(2, len(PANELS), figsize=(14, 5), sharex=True, sharey="row", height_ratios=(3, 4))
        for column, (title, name) in enumerate(PANELS.items()):
            run = next(run for run in runs[name] if run["seed"] == SEED)
            _draw_run(axes[0][column], axes[1][column], run)
            axes[0][column].set_title(title, fontsize=12)
            axes[1][column].set_xlabel("optimizer step")
        axes[0][0].set_ylabel("mean tokens")
        axes[1][0].set_ylabel("share of answers")
        handles = {
            label: handle for axis in fig.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        fig.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, frameon=False)
        fig.tight_layout(rect=(0, 0.07, 1, 1))
        fig.savefig(output, dpi=120)
        plt.close(fig)


def _draw_run(tokens: Any, share: Any, run: dict[str, Any]) -> None:
    measured = run["measurements"]
    steps = [one["step"] for one in measured]
    right = ["".join(codes_of(one)) for one in measured]
    tokens.plot(steps, [one["agreement_mean_tokens"] for one in measured], color="#333333")
    tokens.set_ylim(0)
    accuracy = [codes.count(RIGHT) / len(codes) for codes in right]
    share.plot(steps, accuracy, color="#1f77b4", linewidth=2, label="accuracy")
    agreement = [one["agreement"] for one in measured]
    share.plot(steps, agreement, "--", color="#d95f02", label="agreement with the base")
    share.set_ylim(0, 1)
    counts = run["log"]["teacher/refreshes"]
    refreshed = [
        step for step, before, now in zip(run["log"]["step"][1:], counts, counts[1:], strict=False) if now > before
    ]
    for axis in (tokens, share):
        for step in refreshed:
            axis.axvline(step, color="#999999", linewidth=0.9, linestyle=":", label="refresh of the teacher")
    seen = seen_in(run)
    index = stop_at(seen, PLANNED, MONITOR_MARGIN)
    named = shortest_that_holds(seen if index is None else seen[: index + 1], MONITOR_MARGIN)
    for axis, key in ((tokens, "agreement_mean_tokens"), (share, "agreement")):
        if index is not None:
            axis.axvline(seen[index].step, color="#c00000", linewidth=1.4, label="stop")
        place = 0 if named is None else named + 1
        axis.plot(steps[place], measured[place][key], "o", color="#2ca02c", markersize=8, label="checkpoint to keep")
