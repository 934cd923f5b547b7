"""One evaluation from start to end: prompts, samples, scores, results. `trl-crisp eval` runs it."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.comparison import check_comparable
from trl_crisp.evaluation.engines import load_engine, require_engine
from trl_crisp.evaluation.grading import require_math_verify
from trl_crisp.evaluation.loading import describe_weights, find_model, load_config, load_tokenizer
from trl_crisp.evaluation.locking import locked
from trl_crisp.evaluation.problems import Benchmark, load_benchmark
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.prompts import check_positions, prompt_token_ids
from trl_crisp.evaluation.protocol import describe_grading, describe_sampling
from trl_crisp.evaluation.results import SamplingPace, write_results
from trl_crisp.evaluation.sample_file import Sample, SampleFile
from trl_crisp.evaluation.sample_problems import all_draws, sample_problems
from trl_crisp.evaluation.scoring import score_samples
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.prompts.instructions import resolve_instruction


def evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    on_progress: Tell | None = None,
    baseline: dict[str, Any] | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Sample answers, score them and write the results. An interrupted evaluation resumes if it is called again with its settings.

    Args:
        settings: What to measure.
        output_dir: Receives samples.jsonl and results.json.
        on_progress: Receives a stage, how many of its items are done, how many it has, and a note.
        baseline: Results to compare with, at every budget that both have.
        on_start: Receives `protocol` and `first_prompt` of the results before the sampling.

    Returns:
        The results as in results.json ([`~trl_crisp.evaluation.results`]).

    Raises:
        ValueError: If the settings, the problems, the samples on disk or the baseline do not fit, or if another process evaluates into
            the same directory.
        FileNotFoundError, PermissionError, ConnectionError: If the model or the problems cannot be loaded.
        ImportError: If math-verify or the engine is not installed.
    """
    require_math_verify()
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"output {str(output_dir)!r}: {str(path)!r} is a file. Give a directory; it is made if it does not exist."
            )
    with locked(output_dir):
        return _evaluate(settings, output_dir, on_progress, baseline, on_start)


def _evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    on_progress: Tell | None,
    baseline: dict[str, Any] | None,
    on_start: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    instruction = resolve_instruction(settings.instruction)
    benchmark = load_asked(settings)
    problems = benchmark.problems
    source = find_model(settings.model)
    require_engine(settings.engine)
    tokenizer = load_tokenizer(source)
    prompts = prompt_token_ids(problems, instruction, tokenizer, settings.chat_template_kwargs, settings.system)
    check_positions(load_config(source), problems, prompts, settings.max_new_tokens)
    longest_tokens = max(map(len, prompts)) + settings.max_new_tokens
    engine = load_engine(
        settings.engine, source, tokenizer, longest_tokens, settings.batch_size, settings.tensor_parallel_size
    )

    about_model = describe_weights(source)
    sampling_protocol = describe_sampling(settings, instruction, benchmark, engine, settings.model, about_model)
    protocol = {**sampling_protocol, **describe_grading(settings, benchmark)}
    if baseline is not None:
        if missing := sorted({"problems", "protocol", "summary"} - baseline.keys()):
            raise ValueError(f"the baseline's results have no {', '.join(missing)}: evaluate it again.")
        check_comparable(baseline, protocol, {problem.id: problem.answer for problem in problems})
    file = SampleFile(output_dir / "samples.jsonl", sampling_protocol)
    file.check_prompts(problems, prompts)
    first_prompt = str(tokenizer.decode(prompts[0]))
    if on_start is not None:
        on_start({"protocol": protocol, "first_prompt": first_prompt})

    draws = all_draws(len(problems), settings.samples)
    missing_draws = [draw for draw in draws if (problems[draw.row].id, draw.number) not in file.samples]
    tokens = 0

    def keep(index: int, sample: Sample) -> None:
        nonlocal tokens
        tokens += len(sample.token_ids)
        file.add(sample)

    def tell(done: int, note: str) -> None:
        if on_progress is not None:
            on_progress("sampling", len(draws) - len(missing_draws) + done, len(draws), note)

    started_s = time.monotonic()
    sample_problems(engine, problems, prompts, missing_draws, settings, keep, tell)
    pace = SamplingPace(tokens, time.monotonic() - started_s)
    scored = score_samples(problems, file.samples, settings, tokenizer, on_progress)
    return write_results(output_dir, settings, protocol, first_prompt, scored, pace, baseline)


def load_asked(settings: EvaluationSettings) -> Benchmark:
    """Return the problems that the settings ask for. Warns if `exact` has no effect on them."""
    benchmark = load_benchmark(
        settings.benchmark, settings.limit, settings.file, settings.grader, settings.prompt_template
    )
    if settings.exact and benchmark.kind == "text":
        warnings.warn(
            f"exact has no effect on {settings.benchmark}: its answers are texts, and the authors have no rule for them.",
            stacklevel=2,
        )
    return benchmark
