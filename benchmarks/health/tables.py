"""The tables of benchmarks/README.md, from the summary of the health experiment."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.lab.table import markdown, mean_interval
from benchmarks.marked import is_marked, put_between_marks


def tables(summary: dict[str, Any]) -> dict[str, str]:
    """Return the tables by the names of their markers."""
    return {
        "tracking": _tracking(summary),
        "size": _size(summary),
        "hard": _hard(summary),
        "cap": _cap(summary),
        "power": _power(summary),
        "rules": _rules(summary),
        "gate": _gate(summary),
        "differences": _differences(summary),
        "gate-rules": _gate_rules(summary),
        "stop": _stop(summary),
        "stop-rules": _stop_rules(summary),
        "monitor-time": _monitor_time(summary),
        "time": f"{sum(map(len, summary['runs'].values()))} runs, {summary['cpu_hours']:.1f} CPU hours.",
    }


def with_tables(text: str, summary: dict[str, Any]) -> str:
    """Return a text with the tables between their markers, `<!-- health:NAME -->` and `<!-- /health:NAME -->`; others have none."""
    for name, table in tables(summary).items():
        if is_marked(text, f"health:{name}"):
            text = put_between_marks(text, f"health:{name}", table)
    return text


def _points(share: float | None, signed: bool = True) -> str:
    return "" if share is None else f"{100 * share:{'+' if signed else ''}.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _tracking(summary: dict[str, Any]) -> str:
    columns = (
        "base",
        "runs",
        "base right %",
        "base's level %",
        "level: bias, largest error",
        "change: bias, largest error",
        "correlation: level, change",
        "majority wrong %",
        "no majority %",
    )
    rows = []
    for name, base in summary["bases"].items():
        one, wrong = summary["tracking"][name], summary["wrong_majority"][name]
        rows.append(
            (
                name,
                str(base["runs"]),
                _points(base["accuracy"], False),
                _points(base["level"], False),
                f"{_points(one['level_bias'])}, {_points(one['level_largest_error'], False)}",
                f"{_points(one['change_bias'])}, {_points(one['change_largest_error'], False)}",
                f"{_number(one['level_correlation'])}, {_number(one['change_correlation'])}",
                _points(wrong["share"], False),
                _points(wrong["share_without_majority"], False),
            )
        )
    return markdown(columns, rows)


def _size(summary: dict[str, Any]) -> str:
    columns = (
        "answers per prompt K, prompts N",
        "runs",
        "change: bias",
        "largest error",
        "correlation",
        "RMS error to the accuracy of all answers",
    )
    return markdown(
        columns,
        [
            (
                name,
                str(one["runs"]),
                _points(one["change_bias"]),
                _points(one["change_largest_error"], False),
                _number(one["change_correlation"]),
                _points(one["change_rms_to_all"], False),
            )
            for name, one in summary["tracking_by_size"].items()
        ],
    )


def _hard(summary: dict[str, Any]) -> str:
    columns = (
        "base",
        "hard third: base's level %",
        "accuracy of the same answers %",
        "of further answers %",
        "healthy student: change of agreement, of accuracy",
        "majority wrong: base's level, agreement, accuracy %",
        "correlation of the changes there",
    )
    rows = []
    for name, hard in summary["hard_third"].items():
        wrong = summary["wrong_majority"][name]
        rows.append(
            (
                name,
                _points(hard["base_level"], False),
                _points(hard["base_accuracy"], False),
                _points(hard["base_accuracy_of_further_answers"], False),
                f"{_points(hard['healthy_change'])}, {_points(hard['healthy_accuracy_change'])}"
                if hard["healthy_measurements"]
                else "never healthy",
                ", ".join(_points(wrong[key], False) for key in ("base_level", "agreement", "accuracy")),
                _number(wrong["change_correlation"]),
            )
        )
    return markdown(columns, rows)


def _cap(summary: dict[str, Any]) -> str:
    columns = (
        "base",
        "base's answers cut %",
        "prompts with a majority %",
        "base's level %",
        "change: bias, largest error",
        "correlation of the change",
    )
    return markdown(
        columns,
        [
            (
                name,
                _points(one["cut"], False),
                _points(one["with_reference"], False),
                _points(one["base_level"], False),
                f"{_points(one['change_bias'])}, {_points(one['change_largest_error'], False)}",
                _number(one["change_correlation"]),
            )
            for name, one in summary["rollouts_cap"].items()
        ],
    )


def _power(summary: dict[str, Any]) -> str:
    margins = list(summary["power"][0]["by_margin"])
    columns = (
        "N",
        "K",
        "K of the base",
        "bias",
        "standard error",
        *(f"margin {100 * float(m):g}: false alarm %, power %" for m in margins),
    )
    return markdown(
        columns,
        [
            (
                str(one["prompts"]),
                str(one["samples"]),
                str(one["base_samples"]),
                _points(one["bias"]),
                _points(one["standard_error"], False),
                *(
                    f"{100 * one['by_margin'][m]['false_alarm']:.0f}, {100 * one['by_margin'][m]['power']:.0f}"
                    for m in margins
                ),
            )
            for one in summary["power"]
        ],
    )


def _rules(summary: dict[str, Any]) -> str:
    by_base = summary["chances_of_rules"]
    columns = ("rule", *(f"{n} answers of the base: healthy, 5 points lost, 10 points lost %" for n in by_base))
    return markdown(
        columns,
        [
            (
                rule,
                *(
                    ", ".join(f"{100 * by_base[n][rule][key]:.0f}" for key in ("healthy", "0.05", "0.1"))
                    for n in by_base
                ),
            )
            for rule in next(iter(by_base.values()))
        ],
    )


def _mean(values: Iterable[float], template: str) -> str:
    values = list(values)
    mean, half = mean_interval(values)
    return f"{mean:{template}} ± {half:{template.lstrip('+')}}" if len(values) > 1 else f"{mean:{template}}"


def _gate(summary: dict[str, Any]) -> str:
    columns = ("setting", "seeds", "mean tokens", "accuracy %", "refreshes of those due")
    return markdown(
        columns,
        [
            (
                name,
                str(len(one["seeds"])),
                _mean(one["tokens"], ".1f"),
                _mean((100 * value for value in one["accuracy"]), ".1f"),
                ", ".join(f"{done}/{due}" for done, due in zip(one["refreshes"], one["due"], strict=True)),
            )
            for name, one in summary["gate"].items()
        ],
    )


def _difference(interval: Sequence[float], seeds: int) -> str:
    # One seed has no interval
    return f"{100 * interval[0]:+.1f}" + (f" ± {100 * interval[1]:.1f}" if seeds > 1 else "")


def _differences(summary: dict[str, Any]) -> str:
    columns = ("difference", "seeds", "accuracy, points", "tokens %")
    return markdown(
        columns,
        [
            (
                name,
                str(one["seeds"]),
                *(_difference(one[key], one["seeds"]) for key in ("accuracy", "tokens")),
            )
            for name, one in summary["gate_differences"].items()
            if one["seeds"]
        ],
    )


def _gate_rules(summary: dict[str, Any]) -> str:
    columns = ("rule of the gate", "margin", "healthy refreshes postponed", "others allowed")
    return markdown(
        columns,
        [
            (
                rule,
                f"{100 * float(margin):g}",
                f"{one['postponed']} of {one['healthy']}",
                f"{one['allowed']} of {one['lost']}",
            )
            for margin, rules in summary["gate_rules"].items()
            for rule, one in rules.items()
        ],
    )


def _stop(summary: dict[str, Any]) -> str:
    columns = (
        "setting",
        "seeds",
        "stops after step",
        "names step",
        "tokens %",
        "accuracy change",
        "labels choose step",
        "tokens %",
        "accuracy change",
        "last: tokens %",
        "accuracy change",
    )
    rows = []
    for name, outcomes in summary["stop"].items():
        cells = [name, str(len(outcomes)), ", ".join(str(one["stopped_at"] or "none") for one in outcomes)]
        for key in ("named", "best", "end"):
            if key != "end":
                cells.append(", ".join(str(one[key]["step"]) for one in outcomes))
            cells.append(f"{100 * statistics.mean(one[key]['tokens'] for one in outcomes):.0f}")
            cells.append(_points(statistics.mean(one[key]["accuracy_change"] for one in outcomes)))
        rows.append(tuple(cells))
    return markdown(columns, rows)


def _stop_rules(summary: dict[str, Any]) -> str:
    columns = (
        "rule of the stop",
        "margin",
        "healthy runs stopped",
        "others stopped",
        "after step (mean)",
        "regret: tokens %",
        "regret: accuracy, points",
        "named: accuracy change",
    )
    return markdown(
        columns,
        [
            (
                rule,
                f"{100 * float(margin):g}",
                f"{one['false_stops']} of {one['healthy']}",
                f"{one['stops']} of {one['lost']}",
                f"{one['stop_step']:.0f}" if "stop_step" in one else "",
                *(_points(one.get(key)) for key in ("tokens_regret", "accuracy_regret", "named_accuracy_change")),
            )
            for margin, rules in summary["stop_rules"].items()
            for rule, one in rules.items()
        ],
    )


def _monitor_time(summary: dict[str, Any]) -> str:
    columns = ("measured every ... steps", "runs", "share of the run's time, median %")
    return markdown(
        columns,
        [
            (steps, str(one["runs"]), f"{100 * one['median_share']:.0f}")
            for steps, one in summary["monitor_time"].items()
        ],
    )
