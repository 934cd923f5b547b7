"""The power calculation: how surely a measurement, a gate and a stop tell a healthy model from one that has lost five points.

A simulated base gives each prompt's answers with the frequencies of 16 answers that the lab's base gave. A healthy student is the same
model again. A student that has lost d points gives, at random, an answer that no other answer equals instead of its own, so often that
accuracy is d points less. All answers of one simulated run are compared with the one reference of that run, as in training, so the error of the base's
level is that of all its measurements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.health.answers import NONE, RIGHT
from benchmarks.health.measured import Array, codes_of
from benchmarks.health.stopping import GATE_RULES, STOP_RULES, Seen, stop_at

RUNS = 400
SEED = 0
# Measurements of a simulated run that stays healthy, and those of a loss in which a stop should come
RUN_MEASUREMENTS = 15
LOST_MEASUREMENTS = 4


@dataclass(frozen=True)
class Frequencies:
    """
    The answers of a base to its prompts.

    Attributes:
        shares: Share of each answer, [prompts, answers]: the right one first, then the wrong ones; the last is no answer.
    """

    shares: Array


def frequencies_of(runs: Sequence[dict[str, Any]]) -> Frequencies:
    """Return the frequencies in all answers of the base, over the prompts of runs."""
    rows = [row for run in runs for row in codes_of(run["measurements"][0])]
    wrong = sorted({code for row in rows for code in row} - {RIGHT, NONE})
    return Frequencies(np.array([[row.count(code) / len(row) for code in (RIGHT, *wrong, NONE)] for row in rows]))


def draw_counts(shares: Array, samples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each answer is among some samples, [prompts, answers]."""
    return rng.multinomial(samples, shares / shares.sum(axis=1, keepdims=True))


def reference_and_level(
    counts: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], Array, NDArray[np.bool_]]:
    """
    Return each prompt's majority answer (ties broken at random), the base's own level, and whether there is a majority.

    Args:
        counts: How often each answer was given, [prompts, answers]; the last answer is none.
        rng: For the ties.
    """
    given, total = counts[:, :-1], counts.sum(axis=1)
    largest = given.max(axis=1)
    reference = (given + rng.random(given.shape) * 0.5).argmax(axis=1)
    has_one = (largest > 1) | ((largest == 1) & (given.sum(axis=1) == 1))
    level = np.zeros(len(counts))
    for answer in range(given.shape[1]):
        others = given.copy()
        others[:, answer] -= 1
        most = others.max(axis=1)
        leads = (others[:, answer] == most) & (most > 0)
        leading = (others == most[:, None]).sum(axis=1)
        level += np.where(leads, given[:, answer] / leading, 0.0)
    return reference, level / total, has_one


def simulate(
    frequencies: Frequencies,
    prompts: int,
    samples: int,
    base_samples: int,
    lost: Sequence[float],
    rng: np.random.Generator,
) -> list[Seen]:
    """
    Simulate the measurements of one run.

    Args:
        frequencies: The base.
        prompts: N.
        samples: K, of the student.
        base_samples: K of the base.
        lost: What the student has lost at each measurement, as a share of all answers.
        rng: Random numbers.

    Returns:
        The measurements. Their intervals are normal ones, whose ends differ little from the bootstrap's.
    """
    shares = frequencies.shares[rng.integers(len(frequencies.shares), size=prompts)]
    reference, level, has_one = reference_and_level(draw_counts(shares, base_samples, rng), rng)
    shares, reference, level = shares[has_one], reference[has_one], level[has_one]
    right = frequencies.shares[:, 0].mean()
    seen = []
    for number, drop in enumerate(lost):
        kept = shares * (1 - drop / right)
        # What is lost goes to answers that equal no other
        probabilities = np.concatenate([kept, 1 - kept.sum(axis=1, keepdims=True)], axis=1).clip(0)
        counts = draw_counts(probabilities, samples, rng)
        change = counts[np.arange(len(counts)), reference] / samples - level
        half = 1.96 * change.std() / np.sqrt(len(change))
        seen.append(Seen(number + 1, change.mean(), change.mean() - half, change.mean() + half, 0.0))
    return seen


def calculate(
    frequencies: Frequencies,
    prompts: int,
    samples: int,
    base_samples: int,
    margins: Sequence[float],
    drop: float = 0.05,
) -> dict[str, Any]:
    """
    Return how a measurement does at chance: bias and standard error of the change of a healthy student, and for each margin the chance
    that it is below (a false alarm if healthy; the power if the student has lost `drop`).
    """
    rng = np.random.default_rng([SEED, prompts, samples, base_samples])
    healthy, lost = np.array(
        [
            [one.change for one in simulate(frequencies, prompts, samples, base_samples, (0.0, drop), rng)]
            for _ in range(RUNS)
        ]
    ).T
    return {
        "prompts": prompts,
        "samples": samples,
        "base_samples": base_samples,
        "bias": float(healthy.mean()),
        "standard_error": float(healthy.std(ddof=1)),
        "by_margin": {
            f"{margin:g}": {
                "false_alarm": float((healthy < -margin - 1e-9).mean()),
                "power": float((lost < -margin - 1e-9).mean()),
            }
            for margin in margins
        },
    }


def rule_chances(
    frequencies: Frequencies, prompts: int, samples: int, base_samples: int, margin: float
) -> dict[str, dict[str, float]]:
    """
    Return how each rule does at chance.

    Returns:
        For a rule of the stop: the chance that it ends a run that is healthy at 15 measurements, and that it ends one within 4
        measurements after a loss of 5 and of 10 points. For a rule of the gate: the chance that it postpones a refresh of a healthy student, and
        that it allows one after a loss of 5 and of 10 points.
    """
    rng = np.random.default_rng([SEED, prompts, samples, base_samples, 1])
    sizes = (prompts, samples, base_samples)
    healthy = [simulate(frequencies, *sizes, (0.0,) * RUN_MEASUREMENTS, rng) for _ in range(RUNS)]
    lost = {
        drop: [simulate(frequencies, *sizes, (drop,) * LOST_MEASUREMENTS, rng) for _ in range(RUNS)]
        for drop in (0.05, 0.1)
    }
    found: dict[str, dict[str, float]] = {}
    for rule in STOP_RULES:
        found[f"stop: {rule}"] = {
            "healthy": _share(stop_at(run, rule, margin) is not None for run in healthy),
            **{
                f"{drop:g}": _share(stop_at(run, rule, margin) is not None for run in runs)
                for drop, runs in lost.items()
            },
        }
    for rule, allows in GATE_RULES.items():
        found[f"gate: {rule}"] = {
            "healthy": _share(not allows(one, margin) for run in healthy for one in run),
            **{f"{drop:g}": _share(allows(one, margin) for run in runs for one in run) for drop, runs in lost.items()},
        }
    return found


def _share(flags: Iterable[bool]) -> float:
    return float(np.mean(list(flags)))
