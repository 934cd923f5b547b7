"""From samples to the rows of results.json: each sample graded and measured at each budget."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from trl_crisp.evaluation.grading import KINDS, Grader
from trl_crisp.evaluation.metrics import compresses, epistemic_words, repeats_itself
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.results import Sample


def score_samples(
    problems: Sequence[Problem],
    samples: dict[tuple[str, int], Sample],
    samples_a_problem: int,
    budgets_tokens: Sequence[int],
    text_at: Callable[[Sample, int], str],
    exact: bool = False,
    on_progress: Callable[[str, int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Return the problems as in results.json.

    Args:
        problems: In the order that they get there.
        samples: By the problem's id and the sample's number; more than are asked for are left out.
        samples_a_problem: The first so many of each.
        budgets_tokens: Each sample is graded by what it says up to there.
        text_at: Returns what a sample's first so many tokens say.
        exact: Grade by the authors' rules to the letter.
        on_progress: Called with the stage, how many are graded of how many, and no note.
    """
    budgets = [str(budget) for budget in budgets_tokens]
    jobs = [
        (problem, number, budget, text_at(samples[problem.id, number], int(budget)))
        for problem in problems
        for number in range(samples_a_problem)
        for budget in budgets
    ]
    grades: dict[tuple[str, int, str], Any] = {}
    with Grader(exact=exact) as grader:
        for kind in KINDS:
            of_kind = [job for job in jobs if job[0].kind == kind]

            def tell(done: int, total: int = len(of_kind)) -> None:
                if on_progress is not None:
                    on_progress("grading", done, total, "")

            graded = grader.grade_all([(text, problem.answer) for problem, _, _, text in of_kind], kind, tell)
            for (problem, number, budget, _), grade in zip(of_kind, graded, strict=True):
                grades[problem.id, number, budget] = grade
    texts = {(problem.id, number, budget): text for problem, number, budget, text in jobs}

    def measures(sample: Sample) -> dict[str, Any]:
        by_budget = {}
        for budget in budgets:
            key = (sample.problem, sample.number, budget)
            # Only texts have a flag for what is said anywhere
            grade = {
                name: value for name, value in asdict(grades[key]).items() if name == "answer" or value is not None
            }
            by_budget[budget] = {
                **grade,
                "compresses": compresses(texts[key]),
                "repeats": repeats_itself(texts[key]),
                "epistemic_words": epistemic_words(texts[key]),
            }
        return {
            "tokens": len(sample.token_ids),
            "thinking_tokens": sample.thinking_tokens,
            "ended_by_eos": sample.ended_by_eos,
            "grades": by_budget,
        }

    return [
        {
            "id": problem.id,
            "level": problem.level,
            "answer": problem.answer,
            "samples": [measures(samples[problem.id, number]) for number in range(samples_a_problem)],
        }
        for problem in problems
    ]
