"""results.json: the protocol and the numbers of an evaluation.

Schema version 1:

- `schema`, `schema_version`
- `protocol`: the model and its weights, the problems and their revision, the sampling, the grader, the versions of the libraries
- `first_prompt`: the first prompt as the model reads it, with special tokens
- `samples`: how many answers each problem has
- `summary`: by budget in tokens, for `all` problems and for each level: [`~trl_crisp.evaluation.records.Summary`]
- `wall_s`, `tokens_per_s`: of the sampling in this call, 0 if all samples were there
- `problems`: [`~trl_crisp.evaluation.records.ScoredProblem`], with the scores at each budget under `grades`
- `comparison`, with a baseline: by each budget that both have: [`~trl_crisp.evaluation.records.Comparison`]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.comparison import compare, shared_budgets
from trl_crisp.evaluation.records import ScoredProblem, problem_to_dict, summary_to_dict
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.evaluation.summary import summaries
from trl_crisp.run.files import write_json

SCHEMA = "trl-crisp evaluation"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SamplingPace:
    """
    How fast the answers were sampled.

    Attributes:
        tokens: How many were sampled.
        wall_s: How long it took, in seconds.
    """

    tokens: int
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.wall_s, 1e-9)


def write_results(
    output_dir: Path,
    settings: EvaluationSettings,
    protocol: dict[str, Any],
    first_prompt: str,
    problems: Sequence[ScoredProblem],
    pace: SamplingPace,
    baseline: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Summarize scored problems, compare them with a baseline, and write results.json.

    Args:
        output_dir: The directory of results.json.
        settings: The budgets and the samples per problem.
        protocol: What was measured, and how.
        first_prompt: The first prompt as the model reads it.
        problems: The scored problems.
        pace: How fast the answers were sampled.
        baseline: Results to compare with at each budget that both have.

    Returns:
        The results as in the file, without `schema` and `schema_version`.
    """
    by_budget = summaries(problems, settings.all_budgets, settings.samples)
    results: dict[str, Any] = {
        "protocol": protocol,
        "first_prompt": first_prompt,
        "samples": settings.samples,
        "summary": {
            str(budget): {name: summary_to_dict(summary) for name, summary in groups.items()}
            for budget, groups in by_budget.items()
        },
        "wall_s": round(pace.wall_s, 1),
        "tokens_per_s": round(pace.tokens_per_s, 1),
        "problems": [problem_to_dict(problem) for problem in problems],
    }
    if baseline is not None:
        results["comparison"] = {
            str(budget): compare(baseline, results, budget) for budget in shared_budgets(baseline, results)
        }
    write_json(output_dir / "results.json", {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **results})
    return results


def load_results(path: str | Path) -> dict[str, Any]:
    """
    Read a results file, or the one in a directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is of another kind, or of a schema version that this package does not read.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. `trl-crisp eval --output DIRECTORY` writes one.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}. `trl-crisp eval` writes results.json as a whole; write it again."
        ) from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} is not a result of trl-crisp eval: its schema is {schema!r}, not {SCHEMA!r}.")
    if (version := results.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, and this trl-crisp reads {SCHEMA_VERSION}. Read it with the "
            "trl-crisp that is in its protocol's versions, or evaluate again."
        )
    return results
