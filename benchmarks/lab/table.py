"""The lab's table and figures, from the JSON files of its runs."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.protocol import CURVE_PROBLEMS, check_protocol
from benchmarks.lab.settings import SETTINGS
from benchmarks.lab.task import DIFFICULTIES, MAX_SOLUTION_TOKENS
from benchmarks.marked import put_between_marks
from trl_crisp.report.figures import refresh_steps

# Two-sided 95% quantiles of Student's t by degrees of freedom, for intervals over a handful of seeds
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLUMNS = (
    "setting",
    "about",
    "seeds",
    "mean tokens",
    "change",
    f"cut at {MAX_SOLUTION_TOKENS} %",
    "accuracy %",
    "at k = 2",
    "at k = 7",
    "refreshes",
    "paper: tokens, accuracy",
)
# The paper's results for the base model, which has two rows for one setting
BASE_PAPER = {"plain": "4,884 tokens, 95.7", "concise": "-39%, 95.6 (v1); -22%, 94.2 (v2)"}
# Settings with a lower accuracy are left out of the figure of accuracy against length. Our choice: the broken runs are far below
# it, all others are above.
BROKEN_ACCURACY = 0.7
DIFFICULTY_COLUMNS = ("setting", "change of", *(f"k = {k}" for k in DIFFICULTIES))


def load(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each setting, in the order of the settings; raise ValueError if one has another protocol."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(directory.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        check_protocol(path, result)
        runs[result["setting"]].append(result)
    return {name: runs[name] for name in SETTINGS if name in runs}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95% interval over seeds (0 for one seed)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    half = _T_95[min(len(values) - 1, 9)] * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def base_of(runs: dict[str, list[dict[str, Any]]], form: str) -> dict[int, dict[str, Any]]:
    """Return the untrained model's result by seed; empty if it was not measured."""
    return {
        result["seed"]: result
        for results in runs.values()
        for result in results
        if not result["log"] and result["protocol"]["form"] == form
    }


def table_rows(runs: dict[str, list[dict[str, Any]]], names: list[str] | None = None) -> list[tuple[str, ...]]:
    """
    Return the cells of the table.

    Args:
        runs: The runs of each setting. Changes are against the untrained base of the same form and seed; if that is missing, the
            cell is empty.
        names: The settings that get a row. If `None`, all.
    """
    rows = []
    for name, results in runs.items():
        if names is not None and name not in names:
            continue
        form = results[0]["protocol"]["form"]
        base = base_of(runs, form)
        sides = [("plain", name, SETTINGS[name].about)]
        if not results[0]["log"]:
            prefix = "" if form == "tradeoff" else f"{form} "
            sides = [
                ("plain", f"{prefix}base", "plain prompt"),
                ("concise", f"{prefix}base, concise prompt", "at inference only"),
            ]
        for side, label, about in sides:
            cells = [
                label,
                about,
                str(len(results)),
                _cell([r[side]["all"]["mean_tokens"] for r in results], "{:.1f}"),
            ]
            is_base = side == "plain" and not results[0]["log"]
            measured = not is_base and all(r["seed"] in base for r in results)
            cells.append(
                _cell([_change(r, base[r["seed"]], side, "all") for r in results], "{:+.1f}%") if measured else ""
            )
            cells.append(_cell([100 * r[side]["all"]["truncated"] for r in results], "{:.1f}"))
            cells += [
                _cell([100 * r[side][group]["accuracy"] for r in results], "{:.1f}") for group in ("all", "2", "7")
            ]
            # A moving average is updated at every step and has no refreshes
            steps = () if name == "ema" else {r["log"][-1]["teacher/refreshes"] for r in results if r["log"]}
            cells.append(" ".join(f"{count:.0f}" for count in sorted(steps)))
            cells.append(BASE_PAPER[side] if name == "untrained" else SETTINGS[name].paper)
            rows.append(tuple(cells))
    return rows


def difficulty_rows(runs: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the change of the mean tokens and of the accuracy (in points) at each difficulty."""
    rows = []
    for name in ("frozen", "m50", "m20", "stability-frozen", "stability-m20"):
        results, base = runs.get(name, []), base_of(runs, SETTINGS[name].form)
        results = [r for r in results if r["seed"] in base]
        if not results:
            continue
        groups = [str(k) for k in DIFFICULTIES]
        rows.append(
            (
                name,
                "tokens",
                *(_cell([_change(r, base[r["seed"]], "plain", g) for r in results], "{:+.0f}%") for g in groups),
            )
        )
        points = [
            [100 * (r["plain"][g]["accuracy"] - base[r["seed"]]["plain"][g]["accuracy"]) for r in results]
            for g in groups
        ]
        rows.append((name, "accuracy, points", *(_cell(values, "{:+.1f}") for values in points)))
    return rows


def _change(result: dict[str, Any], base: dict[str, Any], side: str, group: str) -> float:
    return 100 * (result[side][group]["mean_tokens"] / base["plain"][group]["mean_tokens"] - 1)


def _cell(values: list[float], template: str) -> str:
    mean, half = mean_interval(values)
    text = template.format(mean)
    return f"{text} ± {template.format(half).lstrip('+').rstrip('%')}" if len(values) > 1 else text


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table for benchmarks/README.md."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(runs: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Return the tables of benchmarks/README.md by the names of their markers."""
    seconds = sum(result["cpu_seconds"] for results in runs.values() for result in results)
    count = sum(map(len, runs.values()))
    return {
        "settings": markdown(COLUMNS, table_rows(runs)),
        "difficulty": markdown(DIFFICULTY_COLUMNS, difficulty_rows(runs)),
        "time": f"{count} runs, {seconds / 3600:.1f} CPU hours.",
    }


def with_tables(text: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a text with the tables between their markers, `<!-- lab:NAME -->` and `<!-- /lab:NAME -->`."""
    for name, table in tables(runs).items():
        text = put_between_marks(text, f"lab:{name}", table)
    return text


def print_table(directory: Path, names: list[str] | None = None) -> None:
    """Print the table of a directory's runs, with the columns that fit on a terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    shown = [COLUMNS.index(column) for column in ("setting", "seeds", "mean tokens", "change", "accuracy %")]
    table = Table(box=SIMPLE, padding=(0, 1))
    for i in shown:
        table.add_column(COLUMNS[i], no_wrap=True)
    for row in table_rows(load(directory), names):
        table.add_row(*(row[i] for i in shown))
    Console().print(table)


def draw(directory: Path, output: Path) -> None:
    """Draw accuracy against length and difficulty, and length, accuracy and entropy during runs. Lines are means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: results for name, results in load(directory).items() if SETTINGS[name].form == "tradeoff"}
    fig, ((plane, length, accuracy, entropy), (tokens_by_k, accuracy_by_k, along, spot)) = plt.subplots(
        2, 4, figsize=(24, 10)
    )
    _draw_plane(plane, runs)
    for name in ("long-frozen", "m50", "long-m20", "m5", "m1"):
        if name not in runs:
            continue
        steps, mean_tokens = _mean_curve(runs[name], "mean_tokens")
        (line,) = length.plot(steps, mean_tokens, label=name)
        accuracy.plot(*_mean_curve(runs[name], "accuracy"), label=name)
        log = runs[name][0]["log"]
        if name in ("long-m20", "m50"):
            for step in refresh_steps(log):
                length.axvline(step, color=line.get_color(), linewidth=0.7, linestyle=":")
        values = np.mean([[entry["entropy"] for entry in r["log"]] for r in runs[name]], axis=0)
        entropy.plot([entry["step"] for entry in log], values, label=name)
    for name in ("untrained", "frozen", "m50", "m20"):
        for axis, key in ((tokens_by_k, "mean_tokens"), (accuracy_by_k, "accuracy")):
            if name in runs:
                values = [np.mean([r["plain"][str(k)][key] for r in runs[name]]) for k in DIFFICULTIES]
                axis.plot(DIFFICULTIES, values, "o-", label=name)
    if "long-m20" in runs:
        for k in DIFFICULTIES:
            along.plot(*_mean_curve(runs["long-m20"], "accuracy", str(k)), label=f"k = {k}")
        steps, mean_tokens = _mean_curve(runs["long-m20"], "mean_tokens")
        _, share = _mean_curve(runs["long-m20"], "accuracy")
        spot.plot(mean_tokens, share, "o-")
        for x, y, step in zip(mean_tokens, share, steps, strict=True):
            spot.annotate(str(step), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        spot.invert_xaxis()
    curve_problems = CURVE_PROBLEMS * len(DIFFICULTIES)
    length.set(xlabel="step", ylabel="mean tokens", title="Length during the run (dotted: a refresh)")
    accuracy.set(xlabel="step", ylabel="accuracy", title=f"Accuracy during the run ({curve_problems} problems)")
    entropy.set(xlabel="step", ylabel="nats per token", title="Student's entropy on its rollouts")
    tokens_by_k.set(xlabel="difficulty k", ylabel="mean tokens", title="Length by difficulty")
    accuracy_by_k.set(xlabel="difficulty k", ylabel="accuracy", ylim=(0, 1), title="Accuracy by difficulty")
    along.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title=f"long-m20 ({CURVE_PROBLEMS} problems each)")
    spot.set(xlabel="mean tokens", ylabel="accuracy", ylim=(0, 1), title="long-m20: where the sweet spot ends (steps)")
    for axis in (length, accuracy, entropy, tokens_by_k, accuracy_by_k, along):
        axis.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(output, dpi=100)


def _draw_plane(axis: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw each setting as a point. Settings that broke the model are only named in the title, since they would hide the others."""
    broken, markers = [], "osD^v<>P"
    for i, (name, results) in enumerate(runs.items()):
        for side in ("plain", "concise") if not results[0]["log"] else ("plain",):
            x = np.mean([r[side]["all"]["mean_tokens"] for r in results])
            y = np.mean([r[side]["all"]["accuracy"] for r in results])
            if y < BROKEN_ACCURACY:
                broken.append(name)
                continue
            label = {"plain": "base", "concise": "base, concise prompt"}[side] if not results[0]["log"] else name
            marker = "*" if side == "concise" else markers[i % len(markers)]
            axis.plot(x, y, marker, color=f"C{i % 10}", label=label)
    axis.set(
        xlabel="mean tokens",
        ylabel="accuracy",
        title=f"Accuracy against length\n(under {BROKEN_ACCURACY}: {', '.join(broken)})",
    )
    axis.legend(fontsize=7, ncol=2, loc="lower right")


def _mean_curve(results: list[dict[str, Any]], key: str, difficulty: str | None = None) -> tuple[list[int], Any]:
    """Return the steps of a setting's curves and the mean of the curves over seeds."""
    curves = [
        [(point["by_difficulty"][difficulty] if difficulty else point)[key] for point in r["curve"]] for r in results
    ]
    return [point["step"] for point in results[0]["curve"]], np.mean(curves, axis=0)


def main() -> None:
    """Print the table as markdown, and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m benchmarks.lab.table --figure benchmarks/results/lab.png"
    )
    parser.add_argument("--directory", type=Path, default=Path("benchmarks/results/lab"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--readme", type=Path, help="replace the text between the tables' markers in this file")
    args = parser.parse_args()
    runs = load(args.directory)
    if args.readme:
        args.readme.write_text(with_tables(args.readme.read_text(encoding="utf-8"), runs), encoding="utf-8")
    else:
        print("\n\n".join(tables(runs).values()))
    if args.figure:
        draw(args.directory, args.figure)


if __name__ == "__main__":
    main()
