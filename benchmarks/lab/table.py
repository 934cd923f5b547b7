"""The lab's table and figures, from the JSON files of its runs."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.settings import SETTINGS

# Two-sided 95% quantiles of Student's t by degrees of freedom, for intervals over a handful of seeds
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLUMNS = ("setting", "about", "seeds", "tokens", "change", "accuracy", "k = 2", "k = 7", "refreshes")


def load(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each setting, in the order of the settings."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(directory.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        runs[result["setting"]].append(result)
    return {name: runs[name] for name in SETTINGS if name in runs}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95% interval over seeds (0 for one seed)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    half = _T_95[min(len(values) - 1, 9)] * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def table_rows(runs: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the cells of the table; changes are against the untrained base of the same form."""
    base_tokens = {}
    for results in runs.values():
        for result in results:
            if not result["log"]:
                base_tokens[result["protocol"]["form"]] = result["plain"]["all"]["mean_tokens"]
    rows = []
    for name, results in runs.items():
        sides = [("plain", name, SETTINGS[name].about)]
        if not results[0]["log"]:
            sides = [("plain", "base", "plain prompt"), ("concise", "base, concise prompt", "at inference only")]
        for side, label, about in sides:
            base = base_tokens.get(results[0]["protocol"]["form"])
            tokens = [result[side]["all"]["mean_tokens"] for result in results]
            cells = [label, about, str(len(results)), _cell(tokens, 1)]
            cells.append("" if base is None else f"{np.mean(tokens) / base - 1:+.0%}")
            cells += [_cell([r[side][group]["accuracy"] for r in results], 3) for group in ("all", "2", "7")]
            refreshes = {r["log"][-1]["teacher/refreshes"] for r in results if r["log"]}
            cells.append(" ".join(f"{count:.0f}" for count in sorted(refreshes)))
            rows.append(tuple(cells))
    return rows


def _cell(values: list[float], digits: int) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Return the table for benchmarks/README.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def print_table(directory: Path, names: list[str] | None = None) -> None:
    """Print the table of a directory's runs."""
    from rich.console import Console
    from rich.table import Table

    runs = {name: results for name, results in load(directory).items() if names is None or name in names}
    table = Table(*COLUMNS)
    for row in table_rows(runs):
        table.add_row(*row)
    Console().print(table)


def draw(directory: Path, output: Path) -> None:
    """Draw accuracy against length, and length and accuracy along the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: results for name, results in load(directory).items() if SETTINGS[name].form == "tradeoff"}
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5))
    for name, results in runs.items():
        sides = ("plain", "concise") if not results[0]["log"] else ("plain",)
        for side in sides:
            x = np.mean([r[side]["all"]["mean_tokens"] for r in results])
            y = np.mean([r[side]["all"]["accuracy"] for r in results])
            label = {"plain": "base", "concise": "base, concise prompt"}[side] if len(sides) == 2 else name
            left.plot(x, y, "s" if len(sides) == 2 else "o")
            left.annotate(label, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.set(xlabel="mean tokens", ylabel="accuracy", title="Accuracy against length")
    for name in ("long-frozen", "long-m20", "m50", "m5", "m1"):
        if name not in runs:
            continue
        curves = [r["curve"] for r in runs[name]]
        steps = [point["step"] for point in curves[0]]
        for axis, key in ((middle, "mean_tokens"), (right, "accuracy")):
            axis.plot(steps, np.mean([[point[key] for point in curve] for curve in curves], axis=0), label=name)
        log = runs[name][0]["log"]
        counts = [entry["teacher/refreshes"] for entry in log]
        marks = [
            entry["step"]
            for entry, before in zip(log[1:], counts, strict=False)
            if entry["teacher/refreshes"] > before
        ]
        if name in ("long-m20", "m50"):
            for step in marks:
                middle.axvline(step, color="grey", linewidth=0.5, linestyle=":")
    middle.set(xlabel="step", ylabel="mean tokens", title="Length along the run (dotted: a refresh)")
    right.set(xlabel="step", ylabel="accuracy", title="Accuracy along the run")
    middle.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(output, dpi=120)


def main() -> None:
    """Print the table as markdown, and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m benchmarks.lab.table --figure benchmarks/results/lab.png"
    )
    parser.add_argument("--directory", type=Path, default=Path("benchmarks/results/lab"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    print(markdown(table_rows(load(args.directory))))
    if args.figure:
        draw(args.directory, args.figure)


if __name__ == "__main__":
    main()
