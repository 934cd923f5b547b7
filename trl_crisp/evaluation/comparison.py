"""What changed from one evaluation to another of the same problems."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_crisp.evaluation.metrics import paired_bootstrap_difference, paired_bootstrap_reduction
from trl_crisp.evaluation.records import (
    Change,
    Comparison,
    ScoredProblem,
    comparison_to_dict,
    has_anywhere,
    problem_from_dict,
)

# If one of these differs between two results, their difference is not one of the models or of the instruction
_COMPARED = (
    "benchmark_revision",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "chat_template_kwargs",
    "prompt_template",
    "system",
    "kind",
    "grader",
)
# The shares of right answers, and the flag of a grade that each counts
_FLAGS = {"accuracy": "correct", "answer_accuracy": "answer_correct", "boxed_accuracy": "boxed_correct"}
_TEXT_FLAGS = {**_FLAGS, "anywhere_accuracy": "anywhere_correct"}
# Ours: the edges of the groups of problems by the baseline's pass rate, from hard to easy
PASS_RATE_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Even and odd samples of a problem
_HALVES = (slice(0, None, 2), slice(1, None, 2))

_Array = NDArray[np.float64]


def compare(base: dict[str, Any], other: dict[str, Any], budget_tokens: int) -> dict[str, Any]:
    """
    Return what changed from one result to another, as results.json has it.

    Args:
        base: The baseline's results, as [`~trl_crisp.evaluation.results.load_results`] returns them.
        other: The other results.
        budget_tokens: A budget that both were measured at.

    Returns:
        The fields of [`~trl_crisp.evaluation.records.Comparison`]: `budget_tokens`; those of its `all`, with each of `changes` under
        its name and `_change`; `by_pass_rate`.

    Raises:
        ValueError: If all answers of the baseline are empty. See also [`check_comparable`] and [`compare_problems`].
    """
    check_comparable(base, other["protocol"], {problem["id"]: problem["answer"] for problem in other["problems"]})
    before = [problem_from_dict(problem) for problem in base["problems"]]
    after = [problem_from_dict(problem) for problem in other["problems"]]
    if not any(sample.tokens for problem in before for sample in problem.samples):
        raise ValueError(
            "the answers in the baseline all have length 0, so a reduction is not defined: check how they were sampled."
        )
    return comparison_to_dict(compare_problems(before, after, budget_tokens))


def compare_problems(base: Sequence[ScoredProblem], other: Sequence[ScoredProblem], budget_tokens: int) -> Comparison:
    """
    Return what changed from the baseline's scores to others of the same problems.

    Args:
        base: The baseline's problems.
        other: The same problems, in any order.
        budget_tokens: A budget that both were graded at.

    Raises:
        ValueError: If a problem was not graded at the budget.
    """
    flags = _TEXT_FLAGS if has_anywhere(base) and has_anywhere(other) else _FLAGS
    others = {problem.id: problem for problem in other}
    pairs = [
        (_measure(problem, flags, budget_tokens), _measure(others[problem.id], flags, budget_tokens))
        for problem in base
    ]
    means = [(before.mean(axis=1), after.mean(axis=1)) for before, after in pairs]
    has_halves = all(before.shape[1] > 1 for before, _ in pairs)
    groups = _group_by_pass_rate(pairs) if has_halves else {}
    return Comparison(
        budget_tokens=budget_tokens,
        all=_change(means, list(flags)),
        by_pass_rate={name: _change(group, list(flags)) for name, group in groups.items()},
    )


def check_comparable(base: dict[str, Any], protocol: dict[str, Any], answers: Mapping[str, str | list[str]]) -> None:
    """
    Check that a baseline and another evaluation differ in the model and the instruction alone.

    Args:
        base: The baseline's results.
        protocol: The other's protocol.
        answers: The other's right answers, by the problem's id.

    Raises:
        ValueError: If they differ in more. The message names the difference.
    """
    before = json.loads(json.dumps(base["protocol"]))
    now = json.loads(json.dumps(protocol))
    # Two unknown revisions need not be the same
    unknown = {"benchmark_revision"} if now.get("benchmark_revision") is None else set()
    if differing := [key for key in _COMPARED if before.get(key) != now.get(key) or key in unknown]:
        listed = "".join(f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differing)
        raise ValueError(f"the baseline was measured in another way, so a difference would say nothing:{listed}")
    theirs = {problem["id"]: problem["answer"] for problem in base["problems"]}
    if one_sided := sorted(theirs.keys() ^ answers.keys()):
        raise ValueError(
            f"{len(one_sided)} problems are in one of the results only, such as {one_sided[0]!r}: evaluate both with the same "
            "--benchmark and --limit."
        )
    if other := [name for name in theirs if theirs[name] != answers[name]]:
        raise ValueError(
            f"problem {other[0]!r} has the answer {theirs[other[0]]!r} in the baseline and {answers[other[0]]!r} here: these are "
            "different problems."
        )


def shared_budgets(base: dict[str, Any], other: dict[str, Any]) -> list[int]:
    """Return the budgets in tokens that both results were measured at."""
    return sorted(int(budget) for budget in base["summary"].keys() & other["summary"].keys())


def _measure(problem: ScoredProblem, flags: Mapping[str, str], budget_tokens: int) -> _Array:
    """Return a problem's measures, [measures, samples]: the tokens, the flags in their order, and whether no answer was read."""
    if missing := [sample for sample in problem.samples if budget_tokens not in sample.at_budget]:
        raise ValueError(
            f"problem {problem.id!r} was not graded at a budget of {budget_tokens} tokens; the budgets there are "
            f"{', '.join(map(str, missing[0].at_budget))}."
        )
    grades = [sample.at_budget[budget_tokens].grade for sample in problem.samples]
    return np.array(
        [
            [min(sample.tokens, budget_tokens) for sample in problem.samples],
            *([getattr(grade, flag) for grade in grades] for flag in flags.values()),
            [grade.status != "ok" for grade in grades],
        ],
        dtype=float,
    )


def _group_by_pass_rate(pairs: Sequence[tuple[_Array, _Array]]) -> dict[str, list[tuple[_Array, _Array]]]:
    """
    Return the problems' means before and after, in groups by the baseline's pass rate.

    One half of the baseline's samples chooses the group of a problem, and the other half is measured; then the halves change roles. A
    group that is measured by the samples that chose it would show a change without any: by chance, the problems of a low group were
    answered worse than the model does on average, and those of a high group better.

    Args:
        pairs: Each problem's measures before and after, from [`_measure`].
    """
    accuracy_row = 1
    groups = {}
    for low, high in itertools.pairwise(PASS_RATE_EDGES):
        group = []
        for before, after in pairs:
            views = []
            for chosen_by, measured_by in (_HALVES, _HALVES[::-1]):
                pass_rate = before[accuracy_row, chosen_by].mean()
                # The last group includes its upper edge
                if low <= pass_rate < high or pass_rate == high == PASS_RATE_EDGES[-1]:
                    views.append((before[:, measured_by].mean(axis=1), after.mean(axis=1)))
            if views:
                mean_before, mean_after = np.mean(views, axis=0)
                group.append((mean_before, mean_after))
        groups[f"{low:.0%} to {high:.0%}"] = group
    return groups


def _change(problems: Sequence[tuple[_Array, _Array]], flags: Sequence[str]) -> Change:
    """
    Return what changed over some problems.

    Args:
        problems: Each problem's mean measures before and after, [measures] each.
        flags: The names of the measures between the tokens and the unread answers.
    """
    names = [*flags, "unread"]
    if len(problems) < 2:
        return Change(len(problems), None, dict.fromkeys(names), None, None)
    before_MP, after_MP = (np.array(side).T for side in zip(*problems, strict=True))
    differences = [paired_bootstrap_difference(*rows) for rows in zip(before_MP[1:], after_MP[1:], strict=True)]
    return Change(
        problems=len(problems),
        reduction=paired_bootstrap_reduction(before_MP[0], after_MP[0]) if before_MP[0].any() else None,
        changes=dict(zip(names, differences, strict=True)),
        unread_before=float(before_MP[-1].mean()),
        unread_after=float(after_MP[-1].mean()),
    )
