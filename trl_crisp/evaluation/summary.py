"""The measures of an evaluation: accuracy, lengths and shares, over all problems and over each level."""

from collections.abc import Sequence

import numpy as np

from trl_crisp.evaluation.metrics import pass_at_k, share
from trl_crisp.evaluation.records import ScoredProblem, Summary, has_anywhere


def summarize(problems: Sequence[ScoredProblem], budget_tokens: int, k: int) -> Summary:
    """
    Return the measures of some problems at a budget.

    Args:
        problems: At least one.
        budget_tokens: Answers that are longer count as this length, and are graded by what they say up to there.
        k: The samples of each problem.
    """
    samples = [sample for problem in problems for sample in problem.samples]
    texts = [sample.at_budget[budget_tokens] for sample in samples]
    grades = [text.grade for text in texts]
    tokens = np.array([min(sample.tokens, budget_tokens) for sample in samples], dtype=float)
    thinking = np.array([min(sample.thinking_tokens, budget_tokens) for sample in samples], dtype=float)
    correct = [[sample.at_budget[budget_tokens].grade.correct for sample in problem.samples] for problem in problems]
    words = sum(text.epistemic_words for text in texts)
    return Summary(
        problems=len(problems),
        samples=len(samples),
        accuracy=pass_at_k(correct, 1),
        answer_accuracy=share([grade.answer_correct for grade in grades]),
        boxed_accuracy=share([grade.boxed_correct for grade in grades]),
        anywhere_accuracy=share([bool(grade.anywhere_correct) for grade in grades])
        if has_anywhere(problems)
        else None,
        pass_at={tried: pass_at_k(correct, tried) for tried in _powers_of_two(k)},
        mean_tokens=float(tokens.mean()),
        median_tokens=float(np.median(tokens)),
        p90_tokens=float(np.quantile(tokens, 0.9)),
        p99_tokens=float(np.quantile(tokens, 0.99)),
        mean_thinking_tokens=float(thinking.mean()),
        mean_answer_tokens=float((tokens - thinking).mean()),
        truncated=share([not sample.ended_by_eos or sample.tokens > budget_tokens for sample in samples]),
        compresses=share([text.compresses for text in texts]),
        repeats=share([text.repeats for text in texts]),
        unparseable=share([grade.status == "unparseable" for grade in grades]),
        not_graded=share([grade.status in ("timeout", "error") for grade in grades]),
        epistemic_words_per_1000_tokens=1000 * words / max(float(tokens.sum()), 1.0),
    )


def _powers_of_two(k: int) -> list[int]:
    return sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k})


def summaries(
    problems: Sequence[ScoredProblem], budgets_tokens: Sequence[int], k: int
) -> dict[int, dict[str, Summary]]:
    """Return [`summarize`] by budget, for `all` problems and for each level."""
    levels = sorted({problem.level for problem in problems if problem.level is not None})
    groups = {
        "all": list(problems),
        **{f"level {level}": [problem for problem in problems if problem.level == level] for level in levels},
    }
    return {budget: {name: summarize(group, budget, k) for name, group in groups.items()} for budget in budgets_tokens}
