"""The runs' JSONs as arrays: the reference, agreement and accuracy of each prompt, from all of the answers or from a part of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.health.answers import NONE, RIGHT
from benchmarks.health.settings import MONITOR_SAMPLES
from trl_crisp.health.reference import Reference, Votes, find_reference

Array = NDArray[np.float64]
# Runs' JSONs by setting
Runs = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Point:
    """
    One measurement of a run, all per prompt that has a reference.

    Attributes:
        step: Optimizer steps done.
        change: Agreement less the base's own level, [prompts].
        agreement: The share of the student's answers that are the reference, [prompts].
        accuracy: The share of the same answers that are right, [prompts].
        accuracy_change: Accuracy less that of the base's answers to the same prompts, [prompts].
        tokens: Mean tokens of the answers, [prompts].
    """

    step: int
    change: Array
    agreement: Array
    accuracy: Array
    accuracy_change: Array
    tokens: Array


@dataclass(frozen=True)
class Base:
    """
    The base on the prompts that have a reference.

    Attributes:
        prompts: The numbers of these prompts.
        level: Its own agreement, [prompts].
        accuracy: The share of its answers that are right, [prompts].
        is_reference_right: [prompts].
    """

    prompts: list[int]
    level: Array
    accuracy: Array
    is_reference_right: NDArray[np.bool_]


def load(directory: Path) -> Runs:
    """Return the runs of each setting, sorted by seed."""
    runs: Runs = {}
    for path in sorted(directory.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(result["setting"], []).append(result)
    return {name: sorted(results, key=lambda result: result["seed"]) for name, results in sorted(runs.items())}


def codes_of(measurement: dict[str, Any], cut: bool = False) -> list[str]:
    """
    Return the codes of a measurement's answers, one text for each prompt.

    Args:
        measurement: As it is in the JSON.
        cut: Treat answers that are longer than the rollouts' cap as cut there: they have no final answer.
    """
    codes = measurement["answers"].split()
    if not cut:
        return codes
    longer = measurement["longer_than_rollouts"].split()
    return [
        "".join(NONE if is_long == "1" else code for code, is_long in zip(row, flags, strict=True))
        for row, flags in zip(codes, longer, strict=True)
    ]


def reference_of(codes: str) -> Reference | None:
    """Return the majority answer of a base's answers to one prompt, in code, by the package's rule."""
    answers = [None if code == NONE else code for code in codes]
    return find_reference(Votes(answers, [[one is not None and one == other for one in answers] for other in answers]))


def shares(codes: Sequence[str], answers: Sequence[str]) -> Array:
    """Return the share of each prompt's answers that are the given one, [prompts]."""
    return np.array([row.count(answer) / len(row) for row, answer in zip(codes, answers, strict=True)])


def points_of(run: dict[str, Any], samples: int = MONITOR_SAMPLES, cut: bool = False) -> tuple[Base, list[Point]]:
    """
    Return the base and the measurements of a run, as the monitor would have seen them with fewer answers.

    Args:
        run: A run's JSON.
        samples: Answers per prompt that are used, the first ones, of the base and of the student.
        cut: The monitor's answers have the rollouts' cap. Accuracy is always that of whole answers.
    """
    asked_base, *measurements = run["measurements"]
    base_codes = [row[:samples] for row in codes_of(asked_base, cut)]
    whole = [row[:samples] for row in codes_of(asked_base)]
    references = [reference_of(row) for row in base_codes]
    prompts = [i for i, reference in enumerate(references) if reference is not None]
    found = [reference for reference in references if reference is not None]
    level = np.array([reference.base_agreement for reference in found])
    base_accuracy = shares([whole[i] for i in prompts], [RIGHT] * len(prompts))
    base = Base(prompts, level, base_accuracy, np.array([reference.answer == RIGHT for reference in found]))
    points = []
    for one in measurements:
        place = {
            prompt: i for i, prompt in enumerate(range(len(references)) if one["asked"] == "all" else one["asked"])
        }
        # With fewer of the base's answers another prompt may have a reference that the run never asked for
        rows = [(i, place[prompt]) for i, prompt in enumerate(prompts) if prompt in place]
        kept = [i for i, _ in rows]
        codes, uncut = codes_of(one, cut), codes_of(one)
        agreement = shares([codes[j][:samples] for _, j in rows], [found[i].answer for i in kept])
        accuracy = shares([uncut[j][:samples] for _, j in rows], [RIGHT] * len(rows))
        points.append(
            Point(
                one["step"],
                agreement - level[kept],
                agreement,
                accuracy,
                accuracy - base_accuracy[kept],
                np.array([one["tokens"][j] / len(codes[j]) for _, j in rows]),
            )
        )
    return base, points
