"""Which problems a page shows in full, before and after, by stated rules.

A problem is right if at least half of its samples are. Its tokens are the mean over its samples.

- "shortened": right before and after, and shorter. Ordered by the share of tokens that is gone.
- "newly wrong": right before, and not after. Ordered by the fall of the pass rate.
- "newly right": right after, and not before. Ordered by the rise of the pass rate.
- "hardest": the third of the problems with the lowest pass rates before; of equal ones, those with more tokens before.

Shown are the first of each kind in turn, each problem once. Of a problem's samples the one is shown that is right if the problem
is right, and wrong if it is wrong, with the length nearest to the median of such samples; of equal ones the first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trl_crisp.evaluation.records import ScoredProblem

Kind = Literal["shortened", "newly wrong", "newly right", "hardest"]

KINDS: dict[Kind, str] = {
    "shortened": "right before and after, and shorter; most shortened first",
    "newly wrong": "right before, wrong after",
    "newly right": "wrong before, right after",
    "hardest": "the third of the problems that the base solves least often",
}
MOST_IN_FULL = 60
_RIGHT = 0.5


@dataclass(frozen=True)
class Side:
    """One problem's measures on one side: the pass rate, the mean tokens, and the number of the sample to show."""

    pass_rate: float
    mean_tokens: float
    shown_sample: int

    @property
    def is_right(self) -> bool:
        """Whether at least half of the samples are right."""
        return self.pass_rate >= _RIGHT


@dataclass(frozen=True)
class Pair:
    """
    A problem before and after.

    Attributes:
        id, level: The problem's.
        before, after: Its measures.
        kinds: Those that it belongs to, of [`KINDS`].
        number: Its place among the pairs shown in full, from 0; `None` if only its row is shown.
    """

    id: str
    level: str | None
    before: Side
    after: Side
    kinds: tuple[Kind, ...]
    number: int | None = None

    @property
    def reduction(self) -> float:
        """The share of tokens that is gone. NaN if there were none."""
        return 1 - self.after.mean_tokens / self.before.mean_tokens if self.before.mean_tokens else math.nan


def choose_pairs(
    before: Mapping[str, ScoredProblem],
    after: Mapping[str, ScoredProblem],
    budget_tokens: int,
    most: int = MOST_IN_FULL,
) -> list[Pair]:
    """
    Return a pair for each problem, in the order of `before`, of which at most `most` have a `number`.

    Args:
        before: The base's problems by id.
        after: The same problems of another model.
        budget_tokens: Answers count up to this length.
        most: How many pairs are shown in full.
    """
    sides = {
        name: (measure_side(problem, budget_tokens), measure_side(after[name], budget_tokens))
        for name, problem in before.items()
    }
    plain = {name: Pair(name, before[name].level, *pair, kinds=()) for name, pair in sides.items()}
    ordered = _order_kinds(list(plain.values()))
    numbers: dict[str, int] = {}
    queues = {kind: iter(names) for kind, names in ordered.items()}
    while queues and len(numbers) < most:
        for kind in list(queues):
            name = next((name for name in queues[kind] if name not in numbers), None)
            if name is None:
                del queues[kind]
            elif len(numbers) < most:
                numbers[name] = len(numbers)
    members = {kind: set(names) for kind, names in ordered.items()}
    return [
        Pair(
            pair.id,
            pair.level,
            pair.before,
            pair.after,
            tuple(kind for kind in KINDS if pair.id in members[kind]),
            numbers.get(pair.id),
        )
        for pair in plain.values()
    ]


def _order_kinds(pairs: list[Pair]) -> dict[Kind, list[str]]:
    shortened = [p for p in pairs if p.before.is_right and p.after.is_right and p.reduction > 0]
    wrong = [p for p in pairs if p.before.is_right and not p.after.is_right]
    right = [p for p in pairs if p.after.is_right and not p.before.is_right]
    hardest = sorted(pairs, key=lambda p: (p.before.pass_rate, -p.before.mean_tokens))[: math.ceil(len(pairs) / 3)]
    return {
        "shortened": [p.id for p in sorted(shortened, key=lambda p: -p.reduction)],
        "newly wrong": [p.id for p in sorted(wrong, key=lambda p: p.after.pass_rate - p.before.pass_rate)],
        "newly right": [p.id for p in sorted(right, key=lambda p: p.before.pass_rate - p.after.pass_rate)],
        "hardest": [p.id for p in hardest],
    }


def measure_side(problem: ScoredProblem, budget_tokens: int) -> Side:
    """Return a problem's measures and the sample that stands for it."""
    correct = [sample.at_budget[budget_tokens].grade.correct for sample in problem.samples]
    lengths = [min(sample.tokens, budget_tokens) for sample in problem.samples]
    pass_rate = sum(correct) / len(correct)
    typical = [i for i, flag in enumerate(correct) if flag == (pass_rate >= _RIGHT)]
    middle = sorted(lengths[i] for i in typical)[len(typical) // 2]
    shown = min(typical, key=lambda i: (abs(lengths[i] - middle), i))
    return Side(pass_rate, sum(lengths) / len(lengths), shown)
