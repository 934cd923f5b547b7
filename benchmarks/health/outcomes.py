"""What came out of the runs: gated against ungated and frozen, what other gates would have decided, and where a stop would have ended."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.health.answers import RIGHT
from benchmarks.health.measured import codes_of, shares
from benchmarks.health.stopping import GATE_RULES, PLANNED, STOP_RULES, seen_in, shortest_that_holds, stop_at
from benchmarks.lab.table import mean_interval

# A model is called healthy if its accuracy is at most so far below the base's
HEALTHY_DROP = 0.03


def accuracy_changes(run: dict[str, Any]) -> list[float]:
    """
    Return the true change of accuracy from the base at each measurement after the first step, over the monitor's answers and the
    held-out ones together.
    """
    base, *later = run["measurements"]
    asked = range(len(run["difficulties"])) if later[0]["asked"] == "all" else later[0]["asked"]
    samples = len(codes_of(later[0])[0])
    # The base's further answers make its accuracy surer
    codes = codes_of(base)
    monitor = [_right([codes[i] for i in asked]), *(_right(codes_of(one)) for one in later)]
    held_out = [one["held_out"]["all"]["accuracy"] for one in run["measurements"]]
    weights = (len(asked) * samples, _held_out_answers(run))
    both = np.average([monitor, held_out], axis=0, weights=weights)
    return [float(one - both[0]) for one in both[1:]]


def _right(codes: Sequence[str]) -> float:
    return float(shares(codes, [RIGHT] * len(codes)).mean())


def _held_out_answers(run: dict[str, Any]) -> int:
    return run["protocol"]["held_out"]["problems_a_difficulty"] * (len(run["measurements"][0]["held_out"]) - 1)


def ends(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a setting's runs ended with, by seed."""
    return {
        "seeds": [run["seed"] for run in runs],
        "tokens": [run["final"]["all"]["mean_tokens"] for run in runs],
        "accuracy": [run["final"]["all"]["accuracy"] for run in runs],
        "refreshes": [int(run["log"]["teacher/refreshes"][-1]) for run in runs],
        "due": [_due(run) for run in runs],
    }


def _due(run: dict[str, Any]) -> int:
    config = run["protocol"]["config"]
    return 0 if run["protocol"]["arm"] == "frozen" else config["max_steps"] // config["teacher_sync_steps"]


def paired(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Return the differences of the ends of two settings, one - other, over their common seeds: the mean and the half of a 95% interval
    over seeds (Student's t), of accuracy (share) and of tokens (share of the other's).
    """
    others = {run["seed"]: run["final"]["all"] for run in other}
    pairs = [(run["final"]["all"], others[run["seed"]]) for run in one if run["seed"] in others]
    found: dict[str, Any] = {"seeds": len(pairs)}
    if pairs:
        found["accuracy"] = mean_interval([a["accuracy"] - b["accuracy"] for a, b in pairs])
        found["tokens"] = mean_interval([a["mean_tokens"] / b["mean_tokens"] - 1 for a, b in pairs])
    return found


def paired_with_stop(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], margin: float) -> dict[str, Any]:
    """
    Return the differences between what the stop names in the runs of one setting, and the last measurement of another's, as [`paired`] does.

    Accuracy is that of [`accuracy_changes`]. Its monitor answers also chose the checkpoint, so it is a little too good.
    """
    named = {run["seed"]: stop_outcome(run, PLANNED, margin)["named"] for run in one}
    ends = {run["seed"]: stop_outcome(run, PLANNED, margin)["end"] for run in other}
    pairs = [(named[seed], ends[seed]) for seed in named.keys() & ends.keys()]
    found: dict[str, Any] = {"seeds": len(pairs)}
    if pairs:
        found["accuracy"] = mean_interval([a["all_accuracy_change"] - b["all_accuracy_change"] for a, b in pairs])
        found["tokens"] = mean_interval([a["tokens"] / b["tokens"] - 1 for a, b in pairs])
    return found


def gate_decisions(runs: Sequence[dict[str, Any]], margin: float) -> dict[str, dict[str, int]]:
    """
    Return how often each rule of the gate would have decided rightly at the due refreshes of some runs.

    A refresh is right to happen if the true accuracy at the measurement before it is at most 3 points below the base's.

    Returns:
        By rule: how many due refreshes found a healthy student, and how many of these it postpones; and the same for the others,
        and how many of these it allows.
    """
    found = {name: {"healthy": 0, "postponed": 0, "lost": 0, "allowed": 0} for name in GATE_RULES}
    for run in runs:
        due = run["protocol"]["config"]["teacher_sync_steps"]
        for seen, true in zip(seen_in(run), accuracy_changes(run), strict=True):
            # Measured after step k - 1, for the refresh at the start of step k
            if (seen.step + 1) % due:
                continue
            for name, allows in GATE_RULES.items():
                kind, mistake = ("healthy", "postponed") if true >= -HEALTHY_DROP else ("lost", "allowed")
                found[name][kind] += 1
                found[name][mistake] += allows(seen, margin) == (mistake == "allowed")
    return found


def stop_outcome(run: dict[str, Any], rule: str, margin: float) -> dict[str, Any]:
    """
    Return where a rule would have ended a run, and what it would have named.

    Returns:
        `stopped_at` (step or `None`); `named` and `best`, the step of the checkpoint that the rule names and of the one that labels
        would have chosen by the same naming from the whole run (0: the base); for both the tokens as a share of the base's and the
        change of accuracy from the base, on the held-out problems; and `end`, the same of the run's last measurement.
    """
    seen, true = seen_in(run), accuracy_changes(run)
    index = stop_at(seen, rule, margin)
    named = shortest_that_holds(seen if index is None else seen[: index + 1], margin)
    by_labels = [i for i, change in enumerate(true) if change >= -margin - 1e-9]
    best = min(by_labels, key=lambda i: seen[i].mean_tokens) if by_labels else None
    held_out = [one["held_out"]["all"] for one in run["measurements"]]

    def about(i: int | None) -> dict[str, float]:
        place = 0 if i is None else i + 1
        return {
            "step": run["measurements"][place]["step"],
            "tokens": held_out[place]["mean_tokens"] / held_out[0]["mean_tokens"],
            "accuracy_change": held_out[place]["accuracy"] - held_out[0]["accuracy"],
            "all_accuracy_change": 0.0 if i is None else true[i],
        }

    return {
        "stopped_at": None if index is None else seen[index].step,
        "named": about(named),
        "best": about(best),
        "end": about(len(seen) - 1),
    }


def is_healthy(run: dict[str, Any]) -> bool:
    """Whether a run's true accuracy is at most 3 points below the base's at each measurement."""
    return min(accuracy_changes(run)) >= -HEALTHY_DROP


def stops(runs: Sequence[dict[str, Any]], margin: float) -> dict[str, dict[str, Any]]:
    """
    Compare the rules of the stop over runs.

    Returns:
        By rule: in how many runs that stay healthy, and in how many others, it stops; and over the others the means of: the step of the
        stop, the regret in tokens (named - best, share of the base's) and in accuracy (best - named, share), and the accuracy change of
        what it names.
    """
    found = {}
    for rule in STOP_RULES:
        row: dict[str, Any] = {"healthy": 0, "false_stops": 0, "lost": 0, "stops": 0}
        regrets = []
        for run in runs:
            outcome = stop_outcome(run, rule, margin)
            kind, mark = ("healthy", "false_stops") if is_healthy(run) else ("lost", "stops")
            row[kind] += 1
            row[mark] += outcome["stopped_at"] is not None
            if kind == "lost":
                named, best = outcome["named"], outcome["best"]
                at = outcome["stopped_at"] or run["measurements"][-1]["step"]
                regrets.append(
                    (
                        at,
                        named["tokens"] - best["tokens"],
                        best["all_accuracy_change"] - named["all_accuracy_change"],
                        named["all_accuracy_change"],
                    )
                )
        if regrets:
            names = ("stop_step", "tokens_regret", "accuracy_regret", "named_accuracy_change")
            row |= dict(zip(names, map(float, np.mean(regrets, axis=0)), strict=True))
        found[rule] = row
    return found
