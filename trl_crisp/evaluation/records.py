"""The records of an evaluation, from a graded answer to results.json, and how they are written as JSON and read back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl_crisp.evaluation.grading import Grade
from trl_crisp.evaluation.metrics import Interval
from trl_crisp.prompts.instructions import Prompt


@dataclass(frozen=True)
class ScoredText:
    """
    What an answer says up to a budget.

    Attributes:
        grade: Whether it is right.
        compresses: See [`~trl_crisp.evaluation.metrics.compresses`].
        repeats: See [`~trl_crisp.rollouts.text_measures.repeats_itself`].
        epistemic_words: How many words of doubt and checking it has.
    """

    grade: Grade
    compresses: bool
    repeats: bool
    epistemic_words: int


@dataclass(frozen=True)
class ScoredSample:
    """
    One sampled answer, without its text.

    Attributes:
        tokens: The length of the whole answer, including the token that ended it.
        thinking_tokens: How many of them are thinking.
        ended_by_eos: Whether the model ended the answer; `False` if it was cut at the cap.
        at_budget: The score of the answer's first tokens, by the budget in tokens.
    """

    tokens: int
    thinking_tokens: int
    ended_by_eos: bool
    at_budget: dict[int, ScoredText]


@dataclass(frozen=True)
class ScoredProblem:
    """
    A problem and its scored samples.

    Attributes:
        id: The problem's id.
        level: Its difficulty or subject, if the benchmark has one.
        answer: The right answer; a list if several texts are right.
        samples: In the order of their numbers.
        prompt: The user's message, or a list of messages; `None` in results of older versions.
    """

    id: str
    level: str | None
    answer: str | list[str]
    samples: list[ScoredSample]
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Summary:
    """
    The measures of some problems at a budget. Shares are in [0, 1].

    Attributes:
        problems, samples: How many there are.
        accuracy: The share of answers that are right by the answer line or the whole response (mean@k).
        answer_accuracy, boxed_accuracy: The shares that are right by the answer line, and by the box.
        anywhere_accuracy: The share in which any part of the response is right; `None` if the answers are not texts.
        pass_at: pass@1, 2, 4 ... k, unbiased.
        mean_tokens, median_tokens, p90_tokens, p99_tokens: Lengths; an answer that is longer than the budget counts as the budget.
        mean_thinking_tokens, mean_answer_tokens: The two parts of the mean.
        truncated: The share of answers that were cut at the budget.
        compresses: The share of which the last 10,000 characters compress more than 10x.
        repeats: The share that compresses, or ends in a loop.
        unparseable: The share in which no answer was found.
        not_graded: The share for which grading took too long or failed.
        epistemic_words_per_1000_tokens: Words of doubt and checking.
    """

    problems: int
    samples: int
    accuracy: float
    answer_accuracy: float
    boxed_accuracy: float
    anywhere_accuracy: float | None
    pass_at: dict[int, float]
    mean_tokens: float
    median_tokens: float
    p90_tokens: float
    p99_tokens: float
    mean_thinking_tokens: float
    mean_answer_tokens: float
    truncated: float
    compresses: float
    repeats: float
    unparseable: float
    not_graded: float
    epistemic_words_per_1000_tokens: float


@dataclass(frozen=True)
class Change:
    """
    What changed from a baseline over some problems. The intervals are paired bootstrap 95% intervals over problems.

    Attributes:
        problems: How many there are. With fewer than two, all other values are `None`.
        reduction: 1 - mean tokens / the baseline's mean tokens. `None` also if all of the baseline's answers are empty.
        changes: The differences of the shares, by the share's name: `accuracy`, `answer_accuracy`, `boxed_accuracy`, of texts
            `anywhere_accuracy`, and `unread`.
        unread_before, unread_after: The shares of answers in which no answer was found, or that could not be graded.
    """

    problems: int
    reduction: Interval | None
    changes: dict[str, Interval | None]
    unread_before: float | None
    unread_after: float | None


@dataclass(frozen=True)
class Comparison:
    """
    What changed from a baseline.

    Attributes:
        budget_tokens: Longer answers count as this length, on both sides.
        all: Over all problems.
        by_pass_rate: Over groups of problems by the baseline's pass rate. Empty if the baseline has one sample per problem.
    """

    budget_tokens: int
    all: Change
    by_pass_rate: dict[str, Change]


def problem_to_dict(problem: ScoredProblem) -> dict[str, Any]:
    """Return a problem as results.json has it."""
    return {
        "id": problem.id,
        "level": problem.level,
        "answer": problem.answer,
        **({} if problem.prompt is None else {"prompt": problem.prompt}),
        "samples": [
            {
                "tokens": sample.tokens,
                "thinking_tokens": sample.thinking_tokens,
                "ended_by_eos": sample.ended_by_eos,
                "grades": {str(budget): _text_to_dict(text) for budget, text in sample.at_budget.items()},
            }
            for sample in problem.samples
        ],
    }


def _text_to_dict(text: ScoredText) -> dict[str, Any]:
    grade = asdict(text.grade)
    if text.grade.anywhere_correct is None:
        del grade["anywhere_correct"]
    return {
        **grade,
        "compresses": text.compresses,
        "repeats": text.repeats,
        "epistemic_words": text.epistemic_words,
    }


def problem_from_dict(values: dict[str, Any]) -> ScoredProblem:
    """Read a problem of results.json back: the inverse of [`problem_to_dict`]."""
    return ScoredProblem(
        id=values["id"],
        level=values["level"],
        answer=values["answer"],
        samples=[
            ScoredSample(
                tokens=sample["tokens"],
                thinking_tokens=sample["thinking_tokens"],
                ended_by_eos=sample["ended_by_eos"],
                at_budget={int(budget): _text_from_dict(text) for budget, text in sample["grades"].items()},
            )
            for sample in values["samples"]
        ],
        prompt=values.get("prompt"),
    )


def _text_from_dict(values: dict[str, Any]) -> ScoredText:
    return ScoredText(
        grade=Grade(
            answer_correct=values["answer_correct"],
            boxed_correct=values["boxed_correct"],
            correct=values["correct"],
            status=values["status"],
            answer=values.get("answer"),
            anywhere_correct=values.get("anywhere_correct"),
        ),
        compresses=values["compresses"],
        repeats=values["repeats"],
        epistemic_words=values["epistemic_words"],
    )


def summary_to_dict(summary: Summary) -> dict[str, Any]:
    """Return a summary as results.json has it."""
    values = {**asdict(summary), "pass_at": {str(k): value for k, value in summary.pass_at.items()}}
    if summary.anywhere_accuracy is None:
        del values["anywhere_accuracy"]
    return values


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as results.json has it."""
    return {
        "budget_tokens": comparison.budget_tokens,
        **_change_to_dict(comparison.all),
        "by_pass_rate": {name: _change_to_dict(change) for name, change in comparison.by_pass_rate.items()},
    }


def _change_to_dict(change: Change) -> dict[str, Any]:
    return {
        "problems": change.problems,
        "reduction": change.reduction and asdict(change.reduction),
        **{f"{name}_change": interval and asdict(interval) for name, interval in change.changes.items()},
        "unread_before": change.unread_before,
        "unread_after": change.unread_after,
    }


def has_anywhere(problems: Sequence[ScoredProblem]) -> bool:
    """Whether the problems' answers are texts, which alone are graded by what a response says anywhere."""
    return all(
        text.grade.anywhere_correct is not None
        for problem in problems
        for sample in problem.samples
        for text in sample.at_budget.values()
    )
