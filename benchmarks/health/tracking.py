"""How far agreement tracks accuracy: bias, largest error and correlation, by base, by K and N, and on the prompts where it is hard."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.health.measured import Array, codes_of, points_of, reference_of, shares
from benchmarks.health.settings import MONITOR_PROMPTS, MONITOR_SAMPLES

# Random parts of the prompts per run, if fewer than all are used
DRAWS = 20


def errors(
    runs: Sequence[dict[str, Any]], samples: int = MONITOR_SAMPLES, prompts: int = MONITOR_PROMPTS, cut: bool = False
) -> dict[str, float]:
    """
    Compare agreement with accuracy over all measurements after the first step. Shares, not points.

    Args:
        runs: Runs' JSONs.
        samples: K, the answers per prompt that are used.
        prompts: N, how many prompts are used: with fewer than the run has, 20 random parts of each run's.
        cut: See `points_of`.

    Returns:
        Bias, largest error and correlation of the level and of the change from the base's own, against the accuracy of the same answers
        and prompts, and `change_rms_to_all`: the root mean square of the change's difference from the change of accuracy in all answers
        of the measurement.
    """
    rows = []
    for run in runs:
        base, points = points_of(run, samples, cut)
        _, all_points = points_of(run, run["protocol"]["config"]["monitor_samples"])
        rng = np.random.default_rng([run["seed"], prompts])
        count = len(base.prompts)
        parts = [np.arange(count)]
        if prompts < MONITOR_PROMPTS:
            parts = [rng.permutation(count)[: round(prompts * count / MONITOR_PROMPTS)] for _ in range(DRAWS)]
        for point, everything in zip(points, all_points, strict=True):
            for part in parts:
                values = (point.agreement, point.accuracy, point.change, point.accuracy_change)
                rows.append(
                    [*(float(value[part].mean()) for value in values), float(everything.accuracy_change.mean())]
                )
    agreement, accuracy, change, accuracy_change, all_change = np.array(rows).T
    found: dict[str, float] = {"measurements": len(rows)}
    for name, seen, true in (("level", agreement, accuracy), ("change", change, accuracy_change)):
        found[f"{name}_bias"] = float((seen - true).mean())
        found[f"{name}_largest_error"] = float(np.abs(seen - true).max())
        found[f"{name}_correlation"] = correlation(seen, true)
    found["change_rms_to_all"] = float(np.sqrt(((change - all_change) ** 2).mean()))
    return found


def correlation(one: Array, other: Array) -> float:
    """Return Pearson's correlation; NaN if a side does not vary."""
    if one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def hard_third(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """
    Look at the third of the prompts on which the base agrees least with itself.

    Returns:
        Means over the runs: the base's level there, the accuracy of the five answers that chose the third, the accuracy of the base's
        further answers (`NaN` without such), and, over the measurements at which accuracy in all prompts is at most 3 points below the
        base's, the change of agreement and of accuracy there.
    """
    rows, healthy = [], []
    for run in runs:
        base, points = points_of(run)
        third = np.argsort(base.level, kind="stable")[: len(base.prompts) // 3]
        codes = codes_of(run["measurements"][0])
        further = [codes[base.prompts[i]][MONITOR_SAMPLES:] for i in third]
        later = float(shares(further, ["T"] * len(further)).mean()) if further[0] else float("nan")
        rows.append((float(base.level[third].mean()), float(base.accuracy[third].mean()), later))
        healthy += [
            (float(point.change[third].mean()), float(point.accuracy_change[third].mean()))
            for point in points
            if point.accuracy_change.mean() >= -0.03
        ]
    level, chosen, later_accuracy = np.array(rows).T
    known = later_accuracy[~np.isnan(later_accuracy)]
    changes = np.array(healthy).reshape(-1, 2)
    return {
        "base_level": float(level.mean()),
        "base_accuracy": float(chosen.mean()),
        "base_accuracy_of_further_answers": float(known.mean()) if len(known) else float("nan"),
        "healthy_measurements": len(changes),
        "healthy_change": float(changes[:, 0].mean()) if len(changes) else float("nan"),
        "healthy_accuracy_change": float(changes[:, 1].mean()) if len(changes) else float("nan"),
    }


def wrong_majority(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """
    Look at the prompts whose majority answer is wrong.

    Returns:
        The share of such prompts and of prompts without a majority; over these prompts, the base's level, and agreement and accuracy
        at all measurements after the first step; and the correlation of their change of agreement with that of accuracy.
    """
    shares_wrong, no_reference, rows, levels = [], [], [], []
    for run in runs:
        base, points = points_of(run)
        total = len(codes_of(run["measurements"][0]))
        wrong = ~base.is_reference_right
        no_reference.append(1 - len(base.prompts) / total)
        shares_wrong.append(float(wrong.mean()))
        if wrong.any():
            levels.append(float(base.level[wrong].mean()))
            rows += [
                [float(value[wrong].mean()) for value in (p.agreement, p.accuracy, p.change, p.accuracy_change)]
                for p in points
            ]
    agreement, accuracy, change, accuracy_change = np.array(rows).reshape(-1, 4).T
    nan = float("nan")
    return {
        "share": float(np.mean(shares_wrong)),
        "share_without_majority": float(np.mean(no_reference)),
        "base_level": float(np.mean(levels)) if levels else nan,
        "agreement": float(agreement.mean()) if rows else nan,
        "accuracy": float(accuracy.mean()) if rows else nan,
        "change_correlation": correlation(change, accuracy_change) if rows else nan,
    }


def left_by_the_cap(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """
    Return what the rollouts' cap leaves of the base's answers: the share of them that it cuts, the share of prompts with a reference,
    and the base's own level.
    """
    rows = []
    for run in runs:
        base = run["measurements"][0]
        flags = "".join(row[:MONITOR_SAMPLES] for row in base["longer_than_rollouts"].split())
        found = [one for row in codes_of(base, cut=True) if (one := reference_of(row[:MONITOR_SAMPLES])) is not None]
        level = float(np.mean([one.base_agreement for one in found])) if found else float("nan")
        rows.append((flags.count("1") / len(flags), len(found) / len(codes_of(base)), level))
    cut, with_reference, level = np.array(rows).T
    return {
        "cut": float(cut.mean()),
        "with_reference": float(with_reference.mean()),
        "base_level": float(level.mean()),
    }
