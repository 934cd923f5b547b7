"""All numbers of the health experiment, from the JSONs of its runs."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.health.measured import Runs
from benchmarks.health.outcomes import ends, gate_decisions, is_healthy, paired, paired_with_stop, stop_outcome, stops
from benchmarks.health.power import calculate, frequencies_of, rule_chances
from benchmarks.health.settings import (
    MANY_SAMPLES,
    MONITOR_MARGIN,
    MONITOR_PROMPTS,
    MONITOR_SAMPLES,
    MORE_BASE_SAMPLES,
    SETTINGS,
    Setting,
)
from benchmarks.health.stopping import PLANNED
from benchmarks.health.tracking import errors, hard_third, left_by_the_cap, wrong_majority

FORMS = ("tradeoff", "stability")
BASES = ("full", "75", "50")
SAMPLES = (2, 3, 5)
PROMPTS = (16, 32, 64, 128)
MARGINS = (0.02, 0.025, 0.03, 0.04)
# N, K and the base's K
DESIGNS = tuple(
    (prompts, samples, base_samples)
    for base_samples in (5, 16)
    for prompts, samples in ((64, 2), (64, 5), (128, 2), (128, 5), (256, 2), (256, 5))
) + tuple((128, 5, base_samples) for base_samples in (2, 3, 4, 8))


def summarize(runs: Runs) -> dict[str, Any]:
    """Return the summary, as it is committed, of the runs."""
    everything = [run for results in runs.values() for run in results]
    # The runs with more answers are the same students as those of another setting: they only tell what more answers bring. Those of
    # the strict gate have another margin, and more answers of the base
    many = [run for run in everything if _samples(run) > MONITOR_SAMPLES]
    usual = [run for name, results in runs.items() if _is_usual(SETTINGS[name]) for run in results]
    by_base = {f"{form}, {base}": group for form in FORMS for base in BASES if (group := _of(usual, form, base))}
    full = [run for run in usual if run["protocol"]["base"] == "full"]
    by_samples = dict.fromkeys(SAMPLES, full) | ({MANY_SAMPLES: many} if many else {})
    with_more = [run for run in full if run["protocol"]["more_base_samples"]]
    frequencies = frequencies_of(with_more)
    return {
        "runs": {name: [run["seed"] for run in results] for name, results in runs.items()},
        "cpu_hours": sum(run["cpu_seconds"] for run in everything) / 3600,
        "monitor_time": _monitor_time(usual),
        "bases": {
            name: {
                "accuracy": sum(run["measurements"][0]["held_out"]["all"]["accuracy"] for run in group) / len(group),
                "tokens": sum(run["measurements"][0]["held_out"]["all"]["mean_tokens"] for run in group) / len(group),
                "level": sum(run["measurements"][0]["agreement"] for run in group) / len(group),
                "runs": len(group),
            }
            for name, group in by_base.items()
        },
        "tracking": {name: errors(group) for name, group in by_base.items()},
        "tracking_by_size": {
            f"K = {samples}, N = {prompts}": errors(group, samples, prompts) | {"runs": len(group)}
            for samples, group in by_samples.items()
            for prompts in PROMPTS
        },
        "hard_third": {name: hard_third(group) for name, group in by_base.items()},
        "wrong_majority": {name: wrong_majority(group) for name, group in by_base.items()},
        "rollouts_cap": {
            name: left_by_the_cap(group) | errors(group, cut=True)
            for name, group in by_base.items()
            if name.endswith("full")
        },
        "power": [calculate(frequencies, *design, MARGINS) for design in DESIGNS],
        "chances_of_rules": {
            str(base_samples): rule_chances(
                frequencies, MONITOR_PROMPTS, MONITOR_SAMPLES, base_samples, MONITOR_MARGIN
            )
            for base_samples in (MONITOR_SAMPLES, MONITOR_SAMPLES + MORE_BASE_SAMPLES)
        },
        "gate": {
            name: ends(runs[name])
            for name in SETTINGS
            if name in runs
            and (SETTINGS[name].base, SETTINGS[name].samples) == ("full", MONITOR_SAMPLES)
            and SETTINGS[name].sync_steps != 1
        },
        "gate_differences": _differences(runs),
        "gate_rules": {
            f"{margin:g}": gate_decisions(
                [run for run in full if run["protocol"]["arm"] != "frozen" and _sync(run) > 1], margin
            )
            for margin in MARGINS
        },
        "stop": {
            name: [
                stop_outcome(run, PLANNED, MONITOR_MARGIN) | {"seed": run["seed"], "healthy": is_healthy(run)}
                for run in results
            ]
            for name, results in runs.items()
        },
        "stop_rules": {f"{margin:g}": stops(full, margin) for margin in MARGINS},
    }


def _monitor_time(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the median share of a run's wall time that asking the monitor prompts takes, the base's answers included, by `monitor_steps`."""
    shares: dict[int, list[float]] = {}
    for run in runs:
        asked_s = sum(one["agreement_runtime"] for one in run["measurements"])
        shares.setdefault(run["protocol"]["config"]["monitor_steps"], []).append(asked_s / run["wall_seconds"])
    return {
        str(steps): {"runs": len(found), "median_share": statistics.median(found)}
        for steps, found in sorted(shares.items())
    }


def _of(runs: Sequence[dict[str, Any]], form: str, base: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["protocol"]["form"], run["protocol"]["base"]) == (form, base)]


def _samples(run: dict[str, Any]) -> int:
    return run["protocol"]["config"]["monitor_samples"]


def _sync(run: dict[str, Any]) -> int:
    return run["protocol"]["config"]["teacher_sync_steps"]


def _is_usual(setting: Setting) -> bool:
    return (setting.samples, setting.base_samples, setting.margin) == (MONITOR_SAMPLES, None, MONITOR_MARGIN)


def _differences(runs: Runs) -> dict[str, Any]:
    found = {}
    for form in FORMS:
        for gated in ("m50-gated", "m20-gated", "m20-strict-gated", "m10-gated", "m5-gated"):
            sync = gated.split("-")[0]
            for label, others in (("ungated", f"{form}-{sync}-ungated"), ("frozen", f"{form}-frozen")):
                if (difference := paired(runs.get(f"{form}-{gated}", []), runs.get(others, [])))["seeds"]:
                    found[f"{form}-{gated.removesuffix('-gated')}: gated - {label}"] = difference
            stopped = paired_with_stop(runs.get(f"{form}-{gated}", []), runs.get(f"{form}-frozen", []), MONITOR_MARGIN)
            if stopped["seeds"]:
                found[f"{form}-{gated.removesuffix('-gated')}: gated and stopped - frozen"] = stopped
    return found
