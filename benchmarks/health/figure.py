"""The figure: accuracy, agreement and tokens along one run without and one with the gate."""

from pathlib import Path
from typing import Any

from benchmarks.health.measured import Runs, codes_of
from benchmarks.health.settings import MONITOR_MARGIN
from benchmarks.health.stopping import PLANNED, seen_in, shortest_that_holds, stop_at

UNGATED, GATED, SEED = "tradeoff-m20-ungated", "tradeoff-m20-gated", 0


def draw(runs: Runs, output: Path) -> None:
    """Draw tokens above accuracy and agreement; refreshes are dotted, and the stop and the checkpoint that it names are marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"every refresh": UNGATED, "refreshes gated by agreement": GATED}
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(2, 2, figsize=(10, 5.2), sharex=True, sharey="row", height_ratios=(3, 4))
    for column, (title, name) in enumerate(names.items()):
        run = next(run for run in runs[name] if run["seed"] == SEED)
        _draw_run(axes[0][column], axes[1][column], run)
        axes[0][column].set_title(title, fontsize=12)
        axes[1][column].set_xlabel("optimizer step")
    axes[0][0].set_ylabel("mean tokens")
    axes[1][0].set_ylabel("share of answers")
    axes[1][0].legend(loc="lower left", frameon=False)
    fig.tight_layout()
    fig.savefig(output, dpi=130)
    plt.close(fig)


def _draw_run(tokens: Any, share: Any, run: dict[str, Any]) -> None:
    measured = run["measurements"]
    steps = [one["step"] for one in measured]
    right = ["".join(codes_of(one)) for one in measured]
    tokens.plot(steps, [one["agreement_mean_tokens"] for one in measured], color="#333333")
    tokens.set_ylim(0)
    share.plot(
        steps, [codes.count("T") / len(codes) for codes in right], color="#1f77b4", label="accuracy (needs labels)"
    )
    share.plot(
        steps,
        [one["agreement"] for one in measured],
        "--",
        color="#d95f02",
        label="agreement with the base (needs none)",
    )
    share.axhline(measured[0]["agreement"] - MONITOR_MARGIN, color="#d95f02", linewidth=0.8, alpha=0.5)
    share.set_ylim(0, 1)
    counts = run["log"]["teacher/refreshes"]
    refreshed = [
        step for step, before, now in zip(run["log"]["step"][1:], counts, counts[1:], strict=False) if now > before
    ]
    for axis in (tokens, share):
        for step in refreshed:
            axis.axvline(step, color="#999999", linewidth=0.8, linestyle=":")
    seen = seen_in(run)
    index = stop_at(seen, PLANNED, MONITOR_MARGIN)
    if index is None:
        return
    named = shortest_that_holds(seen[: index + 1], MONITOR_MARGIN)
    for axis, key in ((tokens, "agreement_mean_tokens"), (share, "agreement")):
        axis.axvline(seen[index].step, color="#c00000", linewidth=1.2)
        if named is not None:
            axis.plot(seen[named].step, measured[named + 1][key], "o", color="#2ca02c", markersize=8)
    share.text(seen[index].step + 2, 0.93, "stop", color="#c00000")
    if named is not None:
        tokens.annotate(
            "the checkpoint it names",
            (seen[named].step, measured[named + 1]["agreement_mean_tokens"]),
            xytext=(12, 22),
            textcoords="offset points",
            color="#2ca02c",
            arrowprops={"arrowstyle": "-", "color": "#2ca02c"},
        )
