"""Prints results and progress on the terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_PIPE_WIDTH = 160
_LENGTHS = (
    "mean_tokens",
    "median_tokens",
    "p90_tokens",
    "p99_tokens",
    "mean_thinking_tokens",
    "mean_answer_tokens",
)
# The shares of right answers, and their column names for each kind of answer
_SHARES = {"accuracy": "accuracy", "answer_accuracy": "answer line", "boxed_accuracy": "box"}
_TEXT_SHARES = {"accuracy": "accuracy", "anywhere_accuracy": "anywhere"}
# Above this share of unread answers a message warns about the accuracy. Our choice: the accuracy then rests on a minority
_MOST = 0.5
# Time between two progress lines if there is no terminal for a bar. Our choice
_LINE_EVERY_S = 15.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield a function (stage, done, total, note) that draws a bar per stage or, without a terminal, prints a line regularly."""
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


def print_start(about: dict[str, Any]) -> None:
    """
    Print how the answers will be graded, and the first prompt.

    Args:
        about: `protocol` and `first_prompt`, which [`~trl_crisp.evaluation.evaluating.evaluate`] passes before it samples.
    """
    protocol = about["protocol"]
    print(
        f"{protocol['benchmark']}: {protocol['problems']} problems, graded as {protocol['kind']} ({protocol['kind_reason']}): "
        f"{protocol['grader']}.\nThe first prompt:\n{about['first_prompt']}",
        flush=True,
    )


def print_evaluation(results: dict[str, Any]) -> None:
    """
    Print an evaluation's tables, with one row per budget and level, and the changes against its baseline.

    Args:
        results: The results that [`~trl_crisp.evaluation.results.load_results`] returns.
    """
    console = make_console()
    protocol = results["protocol"]
    rows = [
        (f"{name}, {int(budget):,} tokens" if len(results["summary"]) > 1 else name, values)
        for budget, groups in results["summary"].items()
        for name, values in groups.items()
    ]
    k = str(results["samples"])
    names = _TEXT_SHARES if "anywhere_accuracy" in rows[0][1] else _SHARES
    accuracy = []
    tokens = []
    for label, values in rows:
        shares = [f"{values[key]:.1%}" for key in names]
        shares += [f"{values['pass_at'][k]:.1%}", f"{values['unparseable']:.1%}"]
        accuracy.append([label, *shares, str(round(values["not_graded"] * values["samples"]))])
        cut = [f"{values[key]:.1%}" for key in ("truncated", "repeats")]
        words = f"{values['epistemic_words_per_1000_tokens']:.1f}"
        tokens.append([label, *(f"{values[key]:,.0f}" for key in _LENGTHS), *cut, words])
    title = f"{protocol['model']} on {protocol['benchmark']}"
    headers = ["", *names.values(), f"pass@{k}", "no answer", "not graded"]
    console.print(make_table(f"{title}: correct answers", headers, accuracy))
    headers = ["", "mean", "median", "p90", "p99", "thinking", "answer", "cut", "repeats", "doubt words / 1,000"]
    console.print(make_table(f"{title}: tokens", headers, tokens))
    for budget, comparison in results.get("comparison", {}).items():
        groups = {"all": comparison, **comparison["by_pass_rate"]}
        columns = {f"{key}_change": f"{name}, points" for key, name in names.items()}
        unread = [comparison["unread_before"], comparison["unread_after"]]
        if None not in unread and max(unread) > _MOST:
            console.print(
                f"Most answers could not be read: {unread[0]:.0%} before, {unread[1]:.0%} after. The change of accuracy is therefore "
                "unreliable. Check the answers in samples.jsonl, the prompt and the grader."
            )
            columns = {"unread_change": "not read, points", **columns}
        changes = [[name, str(values["problems"]), *_changes(values, columns)] for name, values in groups.items()]
        headers = ["the baseline's pass rate", "problems", "tokens", *columns.values()]
        title = f"Against the baseline at {int(budget):,} tokens: 95% intervals over problems"
        console.print(make_table(title, headers, changes))
        if not comparison["by_pass_rate"]:
            console.print("Groups by the baseline's pass rate need at least two samples per problem.")


def make_console() -> Any:
    """Return rich's console on stdout, with a width also for a pipe or a file, which have none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def make_table(title: str, headers: list[str], rows: list[list[str]]) -> Any:
    """Return a table of rich, with a column for each header."""
    from rich.table import Table

    table = Table(title=title)
    for header in headers:
        # Cells that do not fit are folded, because a cut cell shows a wrong number
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    return table


def _changes(values: dict[str, Any], columns: Iterable[str]) -> list[str]:
    tokens = values["reduction"]
    shares = [values[column] for column in columns]
    return [
        "" if tokens is None else f"{-tokens['estimate']:+.0%} [{-tokens['high']:+.0%}, {-tokens['low']:+.0%}]",
        *(
            "" if one is None else f"{100 * one['estimate']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
            for one in shares
        ),
    ]
