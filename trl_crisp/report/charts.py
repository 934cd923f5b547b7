"""The figures of a page, drawn by matplotlib as SVG that is put into the page. Colours are CSS variables, so they follow the theme."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_crisp.evaluation.records import Change
from trl_crisp.report import formats
from trl_crisp.report.names import distinct_labels
from trl_crisp.report.run_log import RunLog
from trl_crisp.report.sources import Compared, Evaluated

# Colours that matplotlib draws with, and the CSS variables that replace them in the SVG
_VARIABLES = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--grid",
    "#040404": "--base",
    "#050505": "--concise",
    "#060606": "--run-0",
    "#070707": "--run-1",
    "#080808": "--run-2",
    "#090909": "--run-3",
    "#0a0a0a": "--run-4",
    "#0b0b0b": "--run-5",
    "#0c0c0c": "--run-6",
    "#0d0d0d": "--run-7",
    "#0e0e0e": "--run-8",
    "#0f0f0f": "--run-9",
    "#101010": "--watch",
    "#111111": "--bad",
}
_COLOURS = {variable: colour for colour, variable in _VARIABLES.items()}
_INK, _MUTED, _GRID = (_COLOURS[name] for name in ("--ink", "--muted", "--grid"))
_BASE, _CONCISE, _WATCH, _BAD = (_COLOURS[name] for name in ("--base", "--concise", "--watch", "--bad"))
# How many runs have a colour of their own, in the figures and in the page's style sheet
RUN_COLOURS = 10
_RUNS = [_COLOURS[f"--run-{i}"] for i in range(RUN_COLOURS)]
# One more than colours, so that also later runs differ in one of the two
_RUN_MARKERS = ("o", "^", "v", "P", "X", "<", ">", "*", "p", "h", "8")
_STATUS_COLOURS = {"healthy": _RUNS[0], "watch": _WATCH, "unhealthy": _BAD}
# Inches; matplotlib writes points, so that a figure of 5 inches is 360 CSS pixels wide, as a phone is
_WIDTH = 5.0
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Names of models and levels may have dollar signs
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}
_LONGEST_LABEL = 24
# More groups of problems than this would fill pages of a figure (MMLU has 57 subjects). Ours
MOST_GROUPS = 16
# With this ratio between the longest and the shortest answers, a linear axis would show one bar. Ours
_LOG_RATIO = 30


@dataclass(frozen=True)
class Figure:
    """
    A drawn figure.

    Attributes:
        id: Its name in the page.
        title: Its heading.
        text: How to read it: the caption.
        numbers: What it shows, in words: with the caption, the text alternative.
        svg: The `<svg>` element. The text in it is escaped.
    """

    id: str
    title: str
    text: str
    numbers: str
    svg: str


def _draw(name: str, title: str, text: str, numbers: str, plot: Callable[[Any], None], height: float = 3.0) -> Figure:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The reader's browser draws the text, with fonts of its own
        warnings.filterwarnings(
            "ignore", r"Glyph \d+ .* missing from|Matplotlib currently does not support", UserWarning
        )
        figure = Canvas(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        plot(axes)
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return Figure(name, title, text, numbers, _inline(file.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Return the `<svg>` element of a file, with ids of its own, CSS variables as colours, and the page's font."""
    svg = svg[svg.index("<svg") :]
    # It holds rules for all elements of the page
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # The height follows from the width of the page
    return re.sub(r'<svg([^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"<svg\1\2", svg, count=1).replace(
        "<svg ", '<svg aria-hidden="true" focusable="false" ', 1
    )


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """Return names as a figure can show them: one line, without control characters, not too long, and distinct."""
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, distinct_labels(unique, _LONGEST_LABEL), strict=True))


def _model_labels(compared: Compared) -> dict[str, str]:
    return _labels([one.name for one in compared.all])


def _look(compared: Compared, one: Evaluated) -> dict[str, Any]:
    if one.role == "base":
        return {"color": _BASE, "marker": "s"}
    if one.role == "concise":
        return {"color": _CONCISE, "marker": "D"}
    return _run_look([other.name for other in compared.trained].index(one.name))


def _run_look(place: int) -> dict[str, Any]:
    return {"color": _RUNS[place % len(_RUNS)], "marker": _RUN_MARKERS[place % len(_RUN_MARKERS)]}


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _percents(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def accuracy_against_length(compared: Compared, during: Sequence[tuple[float, float]] = ()) -> Figure:
    """
    Draw each model's accuracy over its mean tokens, at all budgets, with the frontier of the full budget.

    `during` has the mean tokens and the accuracy along a run, on the same problems.
    """
    points = []
    for one in compared.all:
        for budget in compared.budgets_tokens:
            summary = one.summary(budget)
            points.append((one, budget, summary["mean_tokens"], summary["accuracy"]))
    full = [(length, accuracy) for _, budget, length, accuracy in points if budget == compared.budget_tokens]
    frontier = _frontier(full)
    labels = _model_labels(compared)

    def plot(axes: Any) -> None:
        for one in compared.all:
            own = [(length, accuracy) for other, _, length, accuracy in points if other is one]
            look = _look(compared, one)
            axes.plot(*zip(*own, strict=True), color=look["color"], linewidth=0.9, alpha=0.6)
            if len(own) > 1:
                axes.scatter(*zip(*own[:-1], strict=True), color=look["color"], marker=look["marker"], s=10, alpha=0.7)
            axes.scatter(*own[-1], color=look["color"], marker=look["marker"], s=60, zorder=3, label=labels[one.name])
        if len(during) > 1:
            axes.plot(
                *zip(*during, strict=True),
                color=_MUTED,
                linestyle=":",
                marker=".",
                markersize=4,
                label="during training",
            )
        if len(frontier) > 1:
            axes.step(
                *zip(*frontier, strict=True), where="post", color=_INK, linestyle="--", linewidth=0.8, label="frontier"
            )
        axes.set_xlabel("mean tokens per answer")
        axes.set_ylabel("accuracy")
        axes.set_xlim(left=0, right=1.1 * max(length for _, _, length, _ in points) or 1)
        low, high = min(p[3] for p in points), max(p[3] for p in points)
        # At least 10 points, so that noise does not look like a difference
        room = max(0.05, 0.15 * (high - low))
        axes.set_ylim(low - room, high + room)
        _thousands(axes.xaxis)
        _percents(axes.yaxis)
        axes.legend(loc="best")

    words = "; ".join(
        f"{one.name} {formats.percent(accuracy)} with {formats.tokens(length)} tokens"
        for one, (length, accuracy) in zip(compared.all, full, strict=True)
    )
    smaller = " Small marks are the same answers cut at smaller budgets." if len(compared.budgets_tokens) > 1 else ""
    return _draw(
        "accuracy-length",
        "Accuracy against length",
        f"Up and to the left is better. No model is both shorter and more accurate than those on the frontier.{smaller}",
        f"{words}.",
        plot,
    )


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both length and accuracy, from short to long."""
    found: list[tuple[float, float]] = []
    for length, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((length, accuracy))
    return found


def length_distributions(compared: Compared) -> Figure:
    """Draw the lengths of all answers of each model, as histograms with common bins."""
    lengths = {
        one.name: np.array(
            [
                min(sample.tokens, compared.budget_tokens)
                for problem in one.problems.values()
                for sample in problem.samples
            ],
            dtype=float,
        )
        for one in compared.all
    }
    every = np.maximum(np.concatenate(list(lengths.values())), 1)
    is_log = every.max() / max(float(np.quantile(every, 0.02)), 1.0) > _LOG_RATIO
    low, high = every.min(), max(every.max(), every.min() + 1)
    labels = _model_labels(compared)
    bins = np.geomspace(low, high, 33) if is_log else np.linspace(0, high, 33)

    def plot(axes: Any) -> None:
        for one in compared.all:
            values = np.maximum(lengths[one.name], 1)
            weights = np.full(len(values), 1 / len(values))
            colour = _look(compared, one)["color"]
            axes.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.16)
            axes.hist(
                values, bins, weights=weights, histtype="step", color=colour, linewidth=1.4, label=labels[one.name]
            )
            axes.axvline(values.mean(), color=colour, linewidth=1.2, linestyle="--")
        if is_log:
            axes.set_xscale("log")
        axes.set_xlabel("tokens per answer" + (" (log scale)" if is_log else ""))
        axes.set_ylabel("share of answers")
        _thousands(axes.xaxis)
        _percents(axes.yaxis)
        axes.legend(loc="upper right")

    words = "; ".join(
        f"{name}: mean {formats.tokens(values.mean())}, median {formats.tokens(float(np.median(values)))}, 90th percentile "
        f"{formats.tokens(float(np.quantile(values, 0.9)))}"
        for name, values in lengths.items()
    )
    return _draw(
        "lengths",
        "Lengths of the answers",
        f"Dashed lines are the means. Longer answers count as {compared.budget_tokens:,} tokens.",
        f"{words}.",
        plot,
    )


def changes_by_group(
    name: str, title: str, groups: Mapping[str, Mapping[str, Any] | Change], explanation: str
) -> Figure | None:
    """
    Draw the change of tokens and of accuracy in the largest groups of problems, with intervals.

    Args:
        name, title: The figure's.
        groups: By the group's name, from easy to read as a list from top to bottom.
        explanation: What the groups are, a sentence.

    Returns:
        `None` if no group has an interval.
    """
    rows: list[tuple[str, int, Mapping[str, Any] | None, Mapping[str, Any]]] = []
    for label, change in groups.items():
        if isinstance(change, Change):
            tokens, accuracy = (
                None if one is None else vars(one) for one in (change.reduction, change.changes["accuracy"])
            )
        else:
            tokens, accuracy = change["reduction"], change["accuracy_change"]
        if accuracy is not None:
            rows.append((label, _size(change), tokens, accuracy))
    if not rows:
        return None
    largest = sorted(range(len(rows)), key=lambda i: -rows[i][1])[:MOST_GROUPS]
    not_drawn = sum(_size(change) > 0 for change in groups.values()) - len(largest)
    rows = [rows[i] for i in sorted(largest)]
    labels = _labels([label for label, _, _, _ in rows])

    def plot(axes: Any) -> None:
        places = np.arange(len(rows))[::-1]
        for place, (_, _, tokens, accuracy) in zip(places, rows, strict=True):
            for offset, interval, sign, colour, marker in (
                (0.14, tokens, -100, _RUNS[0], "o"),
                (-0.14, accuracy, 100, _MUTED, "s"),
            ):
                if interval is None:
                    continue
                ends = [sign * interval["low"], sign * interval["high"]]
                axes.plot(ends, [place + offset] * 2, color=colour, linewidth=2.2, alpha=0.55)
                axes.plot(sign * interval["estimate"], place + offset, color=colour, marker=marker, markersize=5)
        axes.plot([], [], color=_RUNS[0], marker="o", label="tokens, %")
        axes.plot([], [], color=_MUTED, marker="s", label="accuracy, points")
        axes.axvline(0, color=_INK, linewidth=0.9)
        axes.set_yticks(places, [f"{labels[label]} ({count})" for label, count, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("change from the base")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    words = "; ".join(
        f"{label}: tokens {formats.interval_of_tokens(tokens)}, accuracy {formats.interval_in_points(accuracy)}"
        for label, _, tokens, accuracy in rows
    )
    height = 1.1 + 0.38 * len(rows)
    text = f"{explanation} 95% intervals over problems."
    if not_drawn:
        text += (
            f" {not_drawn} smaller group{'s are' if not_drawn > 1 else ' is'} not drawn. The verdict takes all into account, and the Markdown "
            "file and the embedded numbers have all."
        )
    return _draw(name, title, text, f"{words}.", plot, height)


def _size(change: Mapping[str, Any] | Change) -> int:
    return change.problems if isinstance(change, Change) else int(change["problems"])


def answer_formats(compared: Compared, names: Mapping[str, str]) -> Figure:
    """Draw the shares of right answers by each way of reading them."""
    summaries = [(one, one.summary(compared.budget_tokens)) for one in compared.all]
    labels = _model_labels(compared)

    def plot(axes: Any) -> None:
        width = 0.8 / len(summaries)
        for i, (one, summary) in enumerate(summaries):
            places = np.arange(len(names)) + (i - (len(summaries) - 1) / 2) * width
            bars = axes.bar(
                places,
                [summary[key] for key in names],
                width * 0.92,
                color=_look(compared, one)["color"],
                label=labels[one.name],
            )
            if len(summaries) <= 4:
                axes.bar_label(bars, [f"{100 * summary[key]:.0f}" for key in names], fontsize=8, padding=1)
        axes.set_xticks(range(len(names)), list(names.values()))
        axes.set_ylim(0, 1.08)
        axes.set_ylabel("right answers")
        axes.grid(axis="x", visible=False)
        _percents(axes.yaxis)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    words = "; ".join(
        f"{one.name}: {', '.join(f'{label} {formats.percent(summary[key])}' for key, label in names.items())}"
        for one, summary in summaries
    )
    return _draw(
        "formats",
        "Answer formats",
        "Training changes how answers are written, so one format alone misleads.",
        f"{words}.",
        plot,
    )


def accuracy_at_budgets(compared: Compared) -> Figure | None:
    """Draw accuracy over the budget; `None` if there is one budget only."""
    if len(compared.budgets_tokens) < 2:
        return None
    labels = _model_labels(compared)

    def plot(axes: Any) -> None:
        for one in compared.all:
            shares = [one.summary(budget)["accuracy"] for budget in compared.budgets_tokens]
            axes.plot(compared.budgets_tokens, shares, **_look(compared, one), markersize=5, label=labels[one.name])
        axes.set_xscale("log")
        axes.set_xticks(compared.budgets_tokens)
        axes.set_xlabel("budget, tokens (log scale)")
        axes.set_ylabel("accuracy")
        _thousands(axes.xaxis)
        _percents(axes.yaxis)
        axes.legend(loc="best")

    words = "; ".join(
        f"{one.name}: "
        + ", ".join(f"{formats.percent(one.summary(b)['accuracy'])} at {b:,}" for b in compared.budgets_tokens)
        for one in compared.all
    )
    return _draw("budgets", "Accuracy at budgets", "The same answers, cut at smaller budgets.", f"{words}.", plot)


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    is_share: bool = False
    # Whether the changes from the base have intervals in the log
    has_intervals: bool = False


_PANELS = (
    _Panel("loss", "Loss", "nats per token", (("loss", "loss"),)),
    _Panel("reverse-kl", "Reverse KL", "nats per token", (("reverse_kl", "reverse KL"),)),
    _Panel(
        "rollouts",
        "Length of the rollouts",
        "tokens",
        (("completions/mean_length", "mean"), ("completions/p95_length", "95th percentile")),
    ),
    _Panel("entropy", "Entropies", "nats per token", (("entropy", "student"), ("teacher_entropy", "teacher"))),
    _Panel(
        "shares",
        "Rollouts that go wrong",
        "share of rollouts",
        (
            ("completions/clipped_ratio", "clipped"),
            ("completions/repeats", "repeating"),
            ("completions/empty", "empty"),
        ),
        is_share=True,
    ),
)
_LINES = ("-", "--", ":", "-.")
# The marks in the curves of a single run: their names in the page's style sheet, and what they are
MARKS = {
    "refresh": "refresh of the teacher",
    "postponed": "refresh postponed",
    "best": "best checkpoint",
    "stop": "ended early",
    "watch": "health: watch",
    "unhealthy": "health: unhealthy",
    "healthy": "health: healthy again",
}


def marks_of(run: RunLog) -> dict[str, str]:
    """Return those of [`MARKS`] that the curves of a run have."""
    statuses = {event["status"] for event in run.events}
    has = {
        "refresh": run.refreshes,
        "postponed": run.postponed,
        "best": run.best_step is not None,
        "stop": run.ended_early,
        **{status: status in statuses for status in _STATUS_COLOURS},
    }
    return {name: text for name, text in MARKS.items() if has[name]}


def training_curves(runs: Sequence[RunLog]) -> list[Figure]:
    """Draw what the runs logged: loss, KL, lengths, entropies, and what was measured, with marks of what happened."""
    names = dict.fromkeys(name for run in runs for name in run.measured_names)
    shares = [(key, label) for name in names for key, label in _measured_series(name)]
    lengths = [(f"{name}_mean_tokens", _measured_on(name)) for name in names]
    panels = (
        *_PANELS,
        _Panel("measured", "Measured during training", "share of answers", _logged(shares, runs), True, True),
        _Panel("measured-tokens", "Length of the measured answers", "mean tokens", _logged(lengths, runs)),
    )
    figures = [_curves(panel, runs) for panel in panels]
    return [figure for figure in figures if figure is not None]


def _logged(series: Sequence[tuple[str, str]], runs: Sequence[RunLog]) -> tuple[tuple[str, str], ...]:
    return tuple((key, label) for key, label in series if any(run.series(key) for run in runs))


def _measured_series(name: str) -> list[tuple[str, str]]:
    if name == "eval_agreement":
        return [
            ("eval_agreement", "agreement with the base"),
            ("eval_agreement_accuracy", "accuracy, monitor prompts"),
        ]
    return [(f"{name}_accuracy", f"accuracy, {_measured_on(name)}")]


def _measured_on(name: str) -> str:
    return "monitor prompts" if name == "eval_agreement" else name.removeprefix("eval_")


def _interval_series(run: RunLog, key: str) -> list[tuple[int, float, float]]:
    """Return step, low and high of a measured share: the base's level plus the interval of the change from it."""
    level = run.at(0, key)
    ends = [dict(run.series(f"{key}_change_{end}")) for end in ("low", "high")]
    if level is None:
        return []
    return [(step, level + low, level + ends[1][step]) for step, low in ends[0].items() if step in ends[1]]


def _curves(panel: _Panel, runs: Sequence[RunLog]) -> Figure | None:
    # With several runs one line each, so that they can be told apart
    series = panel.series if len(runs) == 1 else panel.series[:1]
    lines = [
        (run, i, j, label, run.series(key)) for i, run in enumerate(runs) for j, (key, label) in enumerate(series)
    ]
    lines = [line for line in lines if line[-1]]
    if not lines:
        return None
    names = _labels([run.name if len(runs) > 1 else label for run, _, _, label, _ in lines])

    def plot(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for run, i, j, label, points in lines:
            look = _run_look(i if len(runs) > 1 else j)
            if len(runs) == 1:
                look["color"] = (_RUNS[0], _BASE, _CONCISE, _INK, *_RUNS[1:])[j % (len(_RUNS) + 3)]
            if len(points) >= 40:
                # A few markers along a line tell it from others and do not hide it
                look |= {"marker": None} if len(runs) == 1 else {"markevery": len(points) // 8}
            axes.plot(
                *zip(*points, strict=True),
                **look,
                linestyle=_LINES[j % 4],
                markersize=3,
                label=names[run.name if len(runs) > 1 else label],
            )
            intervals = _interval_series(run, series[j][0]) if panel.has_intervals else []
            if intervals:
                axes.fill_between(*zip(*intervals, strict=True), color=look["color"], alpha=0.15, linewidth=0)
        if len(runs) == 1:
            _mark(axes, runs[0])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(panel.unit)
        values = [value for line in lines for _, value in line[-1]]
        if min(values) >= 0 and not panel.is_share:
            # Room for the marks of the health events
            axes.set_ylim(0, 1.06 * max(values) or 1)
        if panel.is_share:
            top = 1.0 if max(values) >= 0.5 else max(max(values), 0.1)
            axes.set_ylim(-0.02 * top, 1.04 * top)
            _percents(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if len(lines) > 1 or panel.name.startswith("measured"):
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), ncols=3 if len(runs) == 1 else 2)

    about = "The band is the 95% interval of the change from the base." if panel.has_intervals else ""
    write = formats.percent if panel.is_share else _plain
    words = "; ".join(
        f"{f'{run.name}, ' if len(runs) > 1 else ''}{label}: {write(points[0][1])} at step {points[0][0]}, {write(points[-1][1])} at step "
        f"{points[-1][0]}"
        for run, _, _, label, points in lines
    )
    return _draw(f"run-{panel.name}", panel.title, about, f"{words}.", plot)


def _mark(axes: Any, run: RunLog) -> None:
    """Mark what happened; the page has the key ([`MARKS`])."""
    marks: list[tuple[Sequence[int], dict[str, Any]]] = [
        (run.refreshes, {"color": _MUTED, "linestyle": "--", "linewidth": 0.8}),
        (run.postponed, {"color": _WATCH, "linestyle": ":", "linewidth": 1.4}),
        ([run.last_step] if run.ended_early else [], {"color": _BAD, "linewidth": 1.4}),
        ([] if run.best_step is None else [run.best_step], {"color": _RUNS[0], "linestyle": "-.", "linewidth": 1.2}),
    ]
    for steps, look in marks:
        for step in steps:
            axes.axvline(step, **look)
    for event in run.events:
        colour = _STATUS_COLOURS.get(event["status"], _WATCH)
        look = {"marker": "v", "markersize": 7, "linestyle": "none", "color": colour, "clip_on": False}
        axes.plot(event["step"], 1, transform=axes.get_xaxis_transform(), **look)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share_names(summary: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the shares of right answers that a kind of answer has, and their names."""
    if "anywhere_accuracy" in summary:
        return {"accuracy": "as graded", "answer_accuracy": "answer line", "anywhere_accuracy": "anywhere"}
    either = "line or box" if kind == "choice" else "line or anywhere"
    return {"accuracy": either, "answer_accuracy": "answer line", "boxed_accuracy": "box"}
