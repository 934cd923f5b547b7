"""Results and runs on disk, written by the code that writes them in an evaluation, with answers that are made up."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.grading import Grade
from trl_crisp.evaluation.records import ScoredProblem, ScoredSample, ScoredText
from trl_crisp.evaluation.results import SamplingPace, write_results
from trl_crisp.evaluation.sample_file import Sample, SampleFile
from trl_crisp.evaluation.settings import EvaluationSettings

BUDGET = 1000
# (problem's number, sample's number) -> (tokens, is right)
Answers = Callable[[int, int], tuple[int, bool]]


def write_evaluation(
    directory: Path,
    answer: Answers,
    *,
    problems: int = 12,
    samples: int = 2,
    budgets: Sequence[int] = (250,),
    weights: str = "base",
    instruction: str = "",
    text: Callable[[int, int], str] | None = None,
    level: Callable[[int], str | None] = lambda i: f"level {i % 3}",
    prompt: Callable[[int], Any] = lambda i: f"What is {i} + {i}?",
    names: Callable[[int], str] = lambda i: f"problem/{i}",
    status: str = "ok",
    baseline: dict[str, Any] | None = None,
    protocol: dict[str, Any] | None = None,
) -> Path:
    """Write results.json and, if `text` is given, samples.jsonl; return the directory. Answers are right at a budget if they end there."""
    settings = EvaluationSettings(
        model="model", benchmark="sums.jsonl", samples=samples, max_new_tokens=BUDGET, budgets=tuple(budgets)
    )

    def score(i: int, j: int) -> ScoredSample:
        tokens, is_right = answer(i, j)

        def at(budget: int) -> ScoredText:
            right = is_right and tokens <= budget
            grade = Grade(
                answer_correct=right, boxed_correct=False, correct=right, status="ok" if right else status, answer=None
            )
            return ScoredText(grade, compresses=False, repeats=False, epistemic_words=1)

        return ScoredSample(tokens, 0, tokens < BUDGET, {budget: at(budget) for budget in settings.all_budgets})

    scored = [
        ScoredProblem(names(i), level(i), str(2 * i), [score(i, j) for j in range(samples)], prompt(i))
        for i in range(problems)
    ]
    sampling = {
        "model": f"made/{weights}",
        "benchmark": "sums.jsonl",
        "instruction": instruction,
        "temperature": 0.6,
        "max_new_tokens": BUDGET,
        "benchmark_revision": "sha256:0",
        "weights_sha256": weights,
        **(protocol or {}),
    }
    if text is not None:
        file = SampleFile(directory / "samples.jsonl", sampling)
        for i in range(problems):
            for j in range(samples):
                file.add(Sample(names(i), j, text(i, j), [1, 2], 0, True, "0"))
    directory.mkdir(parents=True, exist_ok=True)
    graded = {**sampling, "problems": problems, "kind": "math", "grader": "made"}
    write_results(directory, settings, graded, "<user>first prompt", scored, SamplingPace(0, 0.0), baseline)
    return directory


def write_run(directory: Path, entries: Sequence[dict[str, Any]], **state: Any) -> Path:
    """Write a run's trainer_state.json; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    last = max((entry["step"] for entry in entries), default=0)
    values = {"global_step": last, "max_steps": last, "log_history": list(entries), **state}
    (directory / "trainer_state.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def training_log(steps: int = 20) -> list[dict[str, Any]]:
    """Return the log of a run whose teacher is refreshed at step 10 and postponed at step 15, and which is measured every 10 steps."""
    entries: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        entries.append(
            {
                "step": step,
                "loss": 0.5 / step,
                "reverse_kl": 0.02 + 0.5 / step,
                "entropy": 0.3,
                "teacher_entropy": 0.25,
                "completions/mean_length": 100 - 3 * step,
                "completions/p95_length": 180 - 4 * step,
                "completions/clipped_ratio": 0.02,
                "completions/repeats": 0.0,
                "completions/empty": 0.0,
                "teacher/refreshes": float(step >= 10),
                "teacher/postponed": float(step >= 15),
                "health/status": float(step > 18),
            }
        )
    entries.append({"step": 0, "eval_agreement": 0.8, "eval_agreement_mean_tokens": 100.0})
    entries += [
        {
            "step": step,
            "eval_agreement": 0.79,
            "eval_agreement_mean_tokens": 100.0 - 3 * step,
            "eval_agreement_reduction": 0.03 * step,
            "eval_agreement_change": -0.01,
            "eval_agreement_change_low": -0.025,
            "eval_agreement_change_high": 0.01,
        }
        for step in (10, 20)
    ]
    return sorted(entries, key=lambda entry: entry["step"])
