"""From samples to scores: each sample is graded and measured at each budget."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trl_crisp.evaluation.grading import KINDS, Grade, Grader
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.records import ScoredProblem, ScoredSample, ScoredText
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.rollouts.text_measures import compresses, epistemic_words, repeats_itself

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score_samples(
    problems: Sequence[Problem],
    samples: Mapping[tuple[str, int], Sample],
    settings: EvaluationSettings,
    tokenizer: "PreTrainedTokenizerBase",
    on_progress: Tell | None = None,
) -> list[ScoredProblem]:
    """
    Grade and measure the samples of problems.

    Args:
        problems: The scores have their order.
        samples: By the problem's id and the sample's number. There may be more than are scored.
        settings: `samples` of each problem are scored, at `all_budgets`, exactly by the authors' rules if `exact`.
        tokenizer: Decodes the first tokens of answers that are longer than a budget.
        on_progress: Receives the stage, how many texts are graded, how many there are, and an empty note.
    """

    def text_at(sample: Sample, budget_tokens: int) -> str:
        is_cut = budget_tokens < len(sample.token_ids)
        return str(tokenizer.decode(sample.token_ids[:budget_tokens])) if is_cut else sample.text

    jobs = [
        (problem, number, budget, text_at(samples[problem.id, number], budget))
        for problem in problems
        for number in range(settings.samples)
        for budget in settings.all_budgets
    ]
    grades: dict[tuple[str, int, int], Grade] = {}
    with Grader(exact=settings.exact) as grader:
        for kind in KINDS:
            of_kind = [job for job in jobs if job[0].kind == kind]

            def tell(done: int, total: int = len(of_kind)) -> None:
                if on_progress is not None:
                    on_progress("grading", done, total, "")

            graded = grader.grade_all([(text, problem.answer) for problem, _, _, text in of_kind], kind, tell)
            for (problem, number, budget, _), grade in zip(of_kind, graded, strict=True):
                grades[problem.id, number, budget] = grade
    scored = {
        (problem.id, number, budget): ScoredText(
            grade=grades[problem.id, number, budget],
            compresses=compresses(text),
            repeats=repeats_itself(text),
            epistemic_words=epistemic_words(text),
        )
        for problem, number, budget, text in jobs
    }

    def score(sample: Sample) -> ScoredSample:
        return ScoredSample(
            tokens=len(sample.token_ids),
            thinking_tokens=sample.thinking_tokens,
            ended_by_eos=sample.ended_by_eos,
            at_budget={budget: scored[sample.problem, sample.number, budget] for budget in settings.all_budgets},
        )

    return [
        ScoredProblem(
            id=problem.id,
            level=problem.level,
            answer=problem.answer,
            samples=[score(samples[problem.id, number]) for number in range(settings.samples)],
            prompt=problem.prompt,
        )
        for problem in problems
    ]
