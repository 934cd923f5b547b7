"""One preflight from start to end: prompts, answers, reverse KL, numbers, verdicts, the run's needs. `trl-crisp preflight` runs it."""

import gc
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_crisp.evaluation.engines import Engine, TransformersEngine, load_engine, require_engine
from trl_crisp.evaluation.grading import require_math_verify
from trl_crisp.evaluation.loading import (
    ModelSource,
    describe_weights,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
)
from trl_crisp.evaluation.locking import locked
from trl_crisp.evaluation.problems import Benchmark, Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.prompts import check_positions
from trl_crisp.evaluation.protocol import describe_sampling
from trl_crisp.evaluation.row_answers import find_labels
from trl_crisp.evaluation.sample_file import Sample, SampleFile
from trl_crisp.evaluation.sample_problems import all_draws, sample_problems
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.reference import checked
from trl_crisp.models.checks import probe_model
from trl_crisp.preflight.asking import Told, draw_prompts, resolve_all
from trl_crisp.preflight.divergence import mean_reverse_kl
from trl_crisp.preflight.measuring import Samples, measure
from trl_crisp.preflight.results import run_needs, write_preflight
from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.prompts.pairs import check_columns
from trl_crisp.prompts.thinking import find_think_ids
from trl_crisp.rows.prompts import load_prompts

# The plain prompt, among the ways to tell the teacher
PLAIN = Told("plain", "")


def run_preflight(
    settings: PreflightSettings,
    output_dir: Path,
    on_progress: Tell | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
    answer_of: Callable[[str], str | None] | None = None,
) -> dict[str, Any]:
    """
    Ask a model its training prompts, plain and under each instruction, and judge the instructions.

    If it was interrupted, the same call resumes it. More prompts, samples or instructions start from the answers that are there.

    Args:
        settings: What to measure.
        output_dir: Receives preflight.json, and the answers in samples/.
        on_progress: Receives a stage, how many of its items are done, how many it has, and a note.
        on_start: Receives `prompts`, `labels` and `first_prompts` of the results, and the number of `rows`, before anything is sampled.
        answer_of: Returns the final answer of a text, or `None`. It replaces `grader`; a right answer is one that is equal as a
            string, to one of them if a row has several.

    Returns:
        The results as in preflight.json ([`~trl_crisp.preflight.results`]).

    Raises:
        ValueError: If the settings, the rows, the model or the samples on disk do not fit.
        FileNotFoundError, PermissionError, ConnectionError: If the model, the rows or an instruction's file cannot be loaded.
        ImportError: If math-verify or the engine is not installed.
        TypeError: If `answer_of` returns something else than a text or `None`.
    """
    if answer_of is not None:
        if settings.grader is not None:
            warnings.warn(f"grader={settings.grader!r} has no effect with answer_of, which replaces it.", stacklevel=2)
        answer_of = checked(answer_of)
    require_math_verify()
    require_engine(settings.engine)
    resolve_all(settings.instructions)
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"output {str(output_dir)!r}: {str(path)!r} is a file. Give a directory; it is made if it does not exist."
            )
    source = find_model(settings.model)
    dataset, _ = load_prompts(settings.rows)
    check_columns(dataset)
    with locked(output_dir):
        return _run(settings, source, dataset, output_dir, on_progress or (lambda *args: None), on_start, answer_of)


def _run(
    settings: PreflightSettings,
    source: ModelSource,
    dataset: Any,
    output_dir: Path,
    tell: Tell,
    on_start: Callable[[dict[str, Any]], None] | None,
    answer_of: Callable[[str], str | None] | None,
) -> dict[str, Any]:
    start_s = time.monotonic()
    is_text = isinstance(dataset[0]["prompt"], str)
    tokenizer = load_tokenizer(source, needs_chat_template=not is_text)
    config = load_config(source)
    asking = draw_prompts(dataset, tokenizer, settings)
    labels = find_labels([one.columns for one in asking.asked], settings.grader, answer_of is not None)
    plain_ids = [one.plain_ids for one in asking.asked]
    told_ids = [[one.told_ids[i] for one in asking.asked] for i in range(len(asking.told))]
    problems = [Problem(str(one.row), one.columns["prompt"], "", is_whole_prompt=True) for one in asking.asked]
    longest = [max((one.plain_ids, *one.told_ids), key=len) for one in asking.asked]
    check_positions(config, problems, longest, settings.max_completion_length, "--max_completion_length")
    first_prompts = {
        PLAIN.name: str(tokenizer.decode(plain_ids[0])),
        **{one.name: str(tokenizer.decode(ids[0])) for one, ids in zip(asking.told, told_ids, strict=True)},
    }
    needs = run_needs(settings, asking, config)
    if on_start is not None:
        on_start(
            {
                "prompts": {"asked": len(asking.asked), "with_label": labels.count},
                "rows": asking.rows,
                "labels": {"column": labels.column, "kind": labels.kind, "reason": labels.reason},
                "first_prompts": first_prompts,
            }
        )

    answers = _ask(settings, source, tokenizer, problems, longest, asking.told, plain_ids, told_ids, output_dir, tell)
    kl_nats, kl_reason = _reverse_kl(answers, source, tokenizer, plain_ids, told_ids, tell)
    measured = measure(
        answers.plain,
        answers.told,
        plain_ids,
        told_ids,
        labels,
        find_think_ids(tokenizer),
        answer_of,
        lambda done, total: tell("grading", done, total, ""),
    )
    return write_preflight(
        output_dir,
        settings,
        answers.protocol,
        asking,
        labels,
        first_prompts,
        measured,
        kl_nats,
        kl_reason,
        needs,
        tokenizer,
        time.monotonic() - start_s,
    )


@dataclass
class _Answers:
    """The sampled answers, their protocol, and the model of transformers, if that sampled them."""

    plain: Samples
    told: list[Samples]
    protocol: dict[str, Any]
    model: Any
    pass_positions: bool


def _ask(
    settings: PreflightSettings,
    source: ModelSource,
    tokenizer: Any,
    problems: Sequence[Problem],
    longest: Sequence[Sequence[int]],
    told: Sequence[Told],
    plain_ids: Sequence[Sequence[int]],
    told_ids: Sequence[Sequence[Sequence[int]]],
    output_dir: Path,
    tell: Tell,
) -> _Answers:
    longest_tokens = max(map(len, longest)) + settings.max_completion_length
    engine = load_engine(settings.engine, source, tokenizer, longest_tokens, settings.batch_size)
    model = engine.model if isinstance(engine, TransformersEngine) else None
    # Refuses a model that cannot be trained, before anything is sampled
    pass_positions = model is not None and probe_model(model, _pad_id(tokenizer))
    about_model = describe_weights(source)
    # Each answer has the digest of its prompt, so nothing else needs to tell which rows they answer
    benchmark = Benchmark(settings.dataset, settings.dataset, "", list(problems))

    def protocol_of(one: Told, sampling: EvaluationSettings) -> dict[str, Any]:
        return describe_sampling(sampling, one.text, benchmark, engine, settings.model, about_model)

    def ask(one: Told, ids: Sequence[Sequence[int]], sampling: EvaluationSettings) -> Samples:
        path = output_dir / "samples" / f"{_file_name(one)}.jsonl"
        file = SampleFile(path, protocol_of(one, sampling))
        return _sample(engine, file, problems, ids, sampling, f"{one.name} answers", tell)

    plain = ask(PLAIN, plain_ids, settings.sampling)
    answers = [ask(one, ids, settings.told_sampling) for one, ids in zip(told, told_ids, strict=True)]
    return _Answers(plain, answers, protocol_of(PLAIN, settings.sampling), model, pass_positions)


def _sample(
    engine: Engine,
    file: SampleFile,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    sampling: EvaluationSettings,
    stage: str,
    tell: Tell,
) -> Samples:
    file.check_prompts(problems, prompts)
    draws = all_draws(len(problems), sampling.samples)
    missing = [draw for draw in draws if (problems[draw.row].id, draw.number) not in file.samples]
    there = len(draws) - len(missing)

    def keep(index: int, sample: Sample) -> None:
        file.add(sample)

    sample_problems(
        engine,
        problems,
        prompts,
        missing,
        sampling,
        keep,
        lambda done, note: tell(stage, there + done, len(draws), note),
    )
    return [[file.samples[problem.id, number] for number in range(sampling.samples)] for problem in problems]


def _reverse_kl(
    answers: _Answers,
    source: ModelSource,
    tokenizer: Any,
    plain_ids: Sequence[Sequence[int]],
    told_ids: Sequence[Sequence[Sequence[int]]],
    tell: Tell,
) -> tuple[list[float] | None, str | None]:
    """Return the reverse KL under each instruction, or `None` and why it could not be computed."""
    rows = [(row, sample) for row, of_prompt in enumerate(answers.plain) for sample in of_prompt]
    start_s = time.monotonic()

    def on_rows(done: int) -> None:
        left_s = (time.monotonic() - start_s) / done * (len(rows) - done)
        tell("reverse KL", done, len(rows), f"about {left_s:.0f} s left" if left_s else "")

    try:
        model, pass_positions = answers.model, answers.pass_positions
        if model is None:
            # vLLM's process ends with its engine, and gives its memory back
            gc.collect()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = load_model(source, tokenizer).to(device).eval()
            pass_positions = probe_model(model, _pad_id(tokenizer))
        found = mean_reverse_kl(
            model,
            [plain_ids[row] for row, _ in rows],
            [[ids[row] for row, _ in rows] for ids in told_ids],
            [sample.token_ids for _, sample in rows],
            pass_positions,
            on_rows,
        )
    except torch.OutOfMemoryError:
        return None, "the memory did not hold the model and the hidden states of the longest answers"
    return found, None


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _file_name(told: Told) -> str:
    """Return a name that tells instructions apart: the user's, if it is a short word, or the digest of the text."""
    if re.fullmatch(r"[a-z_]+\d*|(?:percent|words):\d+", told.name):
        return told.name.replace(":", "-")
    return f"text-{hashlib.sha256(told.text.encode()).hexdigest()[:12]}"
