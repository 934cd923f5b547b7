"""Results and progress on the terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ours: how often a line is printed where there is no terminal to draw a bar on
_LINE_EVERY_S = 15.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield a function (stage, done, total, note) that draws a bar a stage, or prints a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        last_s: dict[str, float] = {}

        def print_line(stage: str, done: int, total: int, note: str) -> None:
            if done == total or time.monotonic() - last_s.get(stage, 0.0) > _LINE_EVERY_S:
                last_s[stage] = time.monotonic()
                print(f"{stage}: {done}/{total}{', ' if note else ''}{note}", file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield draw


def print_evaluation(results: dict[str, Any], comparison: dict[str, Any] | None = None) -> None:
    """
    Print an evaluation's table, a row a budget and level.

    Args:
        results: As [`~trl_crisp.evaluation.results.load_results`] gives them.
        comparison: As [`~trl_crisp.evaluation.results.compare`] gives it.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    protocol = results["protocol"]
    table = Table(title=f"{protocol['model']} on {protocol['benchmark']}")
    columns = (
        "",
        "accuracy",
        "answer line",
        "box",
        "pass@k",
        "mean tokens",
        "median",
        "p90",
        "cut",
        "repeats",
        "no answer",
    )
    for column in (*columns, "not graded"):
        table.add_column(column, justify="left" if not column else "right")
    for budget, groups in results["summary"].items():
        for name, values in groups.items():
            label = f"{name}, {int(budget):,} tokens" if len(results["summary"]) > 1 else name
            shares = ("accuracy", "answer_accuracy", "boxed_accuracy", "pass_at_k")
            lengths = ("mean_tokens", "median_tokens", "p90_tokens")
            flags = ("truncated", "repeats", "unparseable", "not_graded")
            cells = [f"{values[key]:.1%}" for key in shares] + [f"{values[key]:,.0f}" for key in lengths]
            table.add_row(label, *cells, *(f"{values[key]:.1%}" for key in flags))
    console.print(table)
    if comparison is None:
        return
    table = Table(title="Against the baseline: 95% intervals over problems")
    for column in ("the baseline's pass rate", "problems", "tokens", "accuracy, points"):
        table.add_column(column, justify="right")
    for name, values in {"all": comparison, **comparison["by_pass_rate"]}.items():
        table.add_row(name, str(values["problems"]), *_changes(values))
    console.print(table)


def _changes(values: dict[str, Any]) -> tuple[str, str]:
    if values["reduction"] is None:
        return "", ""
    tokens, accuracy = values["reduction"], values["accuracy_change"]
    return (
        f"{-tokens['estimate']:+.0%} [{-tokens['high']:+.0%}, {-tokens['low']:+.0%}]",
        f"{100 * accuracy['estimate']:+.1f} [{100 * accuracy['low']:+.1f}, {100 * accuracy['high']:+.1f}]",
    )
