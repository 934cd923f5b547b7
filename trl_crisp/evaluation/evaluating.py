"""One evaluation: problems -> prompts -> samples on disk -> grades -> results. `trl-crisp eval` runs it."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_crisp.evaluation.grading import Grader, find_answer
from trl_crisp.evaluation.metrics import epistemic_words, repeats_itself
from trl_crisp.evaluation.problems import Benchmark, Problem, load_benchmark
from trl_crisp.evaluation.results import Sample, SampleFile, summaries, write_results

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Ours: more than any benchmark has problems, so that a larger --limit leaves the random numbers of the others as they are
_PLACES = 1_000_000


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What to measure. The defaults are the paper's protocol (Sec. "Evaluation").

    Attributes:
        model: A Hub id, a directory, or a directory with an adapter.
        benchmark: See [`~trl_crisp.evaluation.problems.load_benchmark`].
        file: A local copy of the benchmark's rows.
        instruction: `""` for the plain prompt; a name of the catalogue, a text or a .txt file for the "concise prompt" baseline.
        samples: Answers a problem (8, mean@8).
        temperature, top_p, top_k: 0.6, 0.95 and 20.
        max_new_tokens: 30,000.
        budgets: Smaller caps, in tokens, that the same samples are measured at too.
        limit: The first so many problems.
        seed: Of the sampling.
        batch_size: Answers at once (ours).
        exact: Grade by the authors' rules to the letter.
        chat_template_kwargs: Flags of the chat template, such as `enable_thinking`.
    """

    model: str
    benchmark: str
    file: str | None = None
    instruction: str = ""
    samples: int = 8
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 30_000
    budgets: tuple[int, ...] = ()
    limit: int | None = None
    seed: int = 0
    batch_size: int = 32
    exact: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1.")
        if too_large := [budget for budget in self.budgets if not 1 <= budget <= self.max_new_tokens]:
            raise ValueError(
                f"budget {too_large[0]} is not between 1 and max_new_tokens={self.max_new_tokens}, which bounds the answers."
            )

    @property
    def all_budgets(self) -> list[int]:
        """The budgets in tokens, the cap the last of them."""
        return sorted({*self.budgets, self.max_new_tokens})


def evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    on_progress: Callable[[str, int, int, str], None] | None = None,
) -> dict[str, Any]:
    """
    Sample, grade and summarize; go on where an earlier call with the same settings was interrupted.

    Args:
        settings: What to measure.
        output_dir: Receives samples.jsonl and results.json.
        on_progress: Called with a stage, how many are done of how many, and a note.

    Returns:
        The results, as in results.json ([`~trl_crisp.evaluation.results`]).

    Raises:
        ValueError: For settings, problems, or samples on disk that do not fit.
        FileNotFoundError, PermissionError, ConnectionError, ImportError: Where model, problems or engine cannot be had.
    """
    from trl_crisp.instructions import resolve_instruction

    instruction = resolve_instruction(settings.instruction)
    benchmark = load_benchmark(settings.benchmark, settings.limit, settings.file)
    model, tokenizer = load_model(settings)
    prompts = [_prompt_ids(problem, instruction, tokenizer, settings) for problem in benchmark.problems]
    protocol = describe_sampling(settings, instruction, benchmark, model)
    file = SampleFile(output_dir / "samples.jsonl", protocol)
    started_s = time.monotonic()
    tokens = _sample(settings, benchmark, prompts, model, tokenizer, file, on_progress)
    wall_s = time.monotonic() - started_s
    problems = grade_samples(benchmark.problems, file.samples, settings, on_progress)
    results = {
        "protocol": {
            **protocol,
            "problems": len(problems),
            "grader": "the authors' rules" if settings.exact else "the authors' rules, with digits and emphasis read",
        },
        "samples": settings.samples,
        "summary": summaries(problems, settings.all_budgets, settings.samples),
        "wall_s": round(wall_s, 1),
        "tokens_per_s": round(tokens / max(wall_s, 1e-9), 1),
        "problems": problems,
    }
    write_results(output_dir / "results.json", results)
    return results


def load_model(settings: EvaluationSettings) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load the model, with its adapter where the directory holds one, and its tokenizer, onto the GPU if there is one."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_crisp.models import check_model

    path = Path(settings.model)
    is_adapter = (path / "adapter_config.json").is_file()
    if not is_adapter:
        check_model(settings.model, "main", False)
    # An adapter answers faster when it is merged
    model: Any = (
        AutoPeftModelForCausalLM.from_pretrained(settings.model, dtype="auto").merge_and_unload()
        if is_adapter
        else AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto")
    )
    has_tokenizer = not is_adapter or (path / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(settings.model if has_tokenizer else model.config._name_or_path)
    if not tokenizer.chat_template:
        raise ValueError(
            f"model {settings.model!r} has no chat template, so the prompts cannot be put as a user's messages. Use a model "
            "trained on conversations, or set tokenizer.chat_template and save the tokenizer beside the model."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def describe_sampling(
    settings: EvaluationSettings, instruction: str, benchmark: Benchmark, model: "PreTrainedModel"
) -> dict[str, Any]:
    """Return everything that a sample depends on."""
    values = asdict(settings)
    # These say how fast, of how many, and what is made of the samples afterwards
    for name in ("batch_size", "samples", "limit", "file", "exact"):
        values.pop(name)
    packages = ("trl-crisp", "transformers", "torch", "math-verify")
    return {
        **values,
        "engine": "transformers",
        "instruction": instruction,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type if model.device.type != "cpu" else f"{platform.machine()} CPU",
        "benchmark_source": benchmark.source,
        "benchmark_revision": benchmark.revision,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _prompt_ids(
    problem: Problem, instruction: str, tokenizer: "PreTrainedTokenizerBase", settings: EvaluationSettings
) -> list[int]:
    from trl_crisp.config import DAPO_OPENING_SENTENCE
    from trl_crisp.instructions import build_teacher_prompt

    messages, _ = build_teacher_prompt(
        [{"role": "user", "content": problem.prompt}], instruction, DAPO_OPENING_SENTENCE
    )
    rendered: Any = tokenizer.apply_chat_template(
        messages,  # type: ignore[arg-type]
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(settings.chat_template_kwargs or {}),
    )
    return list(rendered["input_ids"])


def _sample(
    settings: EvaluationSettings,
    benchmark: Benchmark,
    prompts: list[list[int]],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    file: SampleFile,
    on_progress: Callable[[str, int, int, str], None] | None,
) -> int:
    from trl_crisp.evaluation.sampling import Completion, SamplingProgress, sample

    total = len(prompts) * settings.samples
    # The first sample of every problem before the second of any: an interrupted run has seen all problems
    missing = [
        (place, number)
        for number in range(settings.samples)
        for place, problem in enumerate(benchmark.problems)
        if (problem.id, number) not in file.samples
    ]
    there = total - len(missing)
    tokens = 0

    def keep(index: int, completion: Completion) -> None:
        nonlocal tokens
        place, number = missing[index]
        tokens += len(completion.token_ids)
        file.add(make_sample(benchmark.problems[place].id, number, prompts[place], completion, tokenizer, settings))

    def tell(now: SamplingProgress) -> None:
        if on_progress is not None:
            left = (
                "" if now.left_at_most_s is None else f", {now.left_at_most_s:.0f} s left if the rest runs to the cap"
            )
            on_progress("sampling", there + now.rows_done, total, f"{now.tokens_per_s:.0f} tokens/s{left}")

    if missing:
        sample(
            model,
            [prompts[place] for place, _ in missing],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
            batch_size=settings.batch_size,
            places=[number * _PLACES + place for place, number in missing],
            progress=tell,
            on_completion=keep,
        )
    return tokens


def make_sample(
    problem_id: str,
    number: int,
    prompt_ids: Sequence[int],
    completion: Any,
    tokenizer: "PreTrainedTokenizerBase",
    settings: EvaluationSettings,
) -> Sample:
    """Return a completion as it is kept."""
    from trl_crisp.thinking import count_thinking_tokens

    ids = completion.token_ids
    said = ids[:-1] if completion.ended_by_eos else ids
    think_ids: Any = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    thinking = 0
    if all(token_id is not None and token_id != tokenizer.unk_token_id for token_id in think_ids):
        open_id, close_id = think_ids
        last = next((i for i in reversed(prompt_ids) if i in think_ids), close_id)
        thinking = count_thinking_tokens(ids, [1] * len(ids), open_id, close_id, last == open_id)
    return Sample(
        problem=problem_id,
        number=number,
        text=str(tokenizer.decode(said)),
        tokens=len(ids),
        thinking_tokens=thinking,
        ended_by_eos=completion.ended_by_eos,
        characters_at={
            str(budget): len(str(tokenizer.decode(ids[:budget])))
            for budget in settings.all_budgets
            if budget < len(ids)
        },
    )


def grade_samples(
    problems: Sequence[Problem],
    samples: dict[tuple[str, int], Sample],
    settings: EvaluationSettings,
    on_progress: Callable[[str, int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Return the problems as in results.json, each sample graded at each budget."""
    jobs = list(_texts_to_grade(problems, samples, settings))
    grades: dict[tuple[str, int, str], Any] = {}
    with Grader(exact=settings.exact) as grader:
        for kind in ("math", "choice"):
            of_kind = [job for job in jobs if job[0].kind == kind]

            def tell(done: int, total: int = len(of_kind)) -> None:
                if on_progress is not None:
                    on_progress("grading", done, total, "")

            graded = grader.grade_all([(text, problem.answer) for problem, _, _, text in of_kind], kind, tell)  # type: ignore[arg-type]
            for (problem, number, budget, _), grade in zip(of_kind, graded, strict=True):
                grades[problem.id, number, budget] = grade
    rows = []
    texts = {(problem.id, number, budget): text for problem, number, budget, text in jobs}
    for problem in problems:
        rows.append(
            {
                "id": problem.id,
                "level": problem.level,
                "answer": problem.answer,
                "samples": [
                    _measures(samples[problem.id, number], grades, texts, settings)
                    for number in range(settings.samples)
                ],
            }
        )
    return rows


def _texts_to_grade(
    problems: Sequence[Problem], samples: dict[tuple[str, int], Sample], settings: EvaluationSettings
) -> Iterator[tuple[Problem, int, str, str]]:
    for problem in problems:
        for number in range(settings.samples):
            sample = samples[problem.id, number]
            for budget in map(str, settings.all_budgets):
                yield problem, number, budget, sample.text[: sample.characters_at.get(budget, len(sample.text))]


def _measures(
    sample: Sample,
    grades: dict[tuple[str, int, str], Any],
    texts: dict[tuple[str, int, str], str],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    by_budget = {}
    for budget in map(str, settings.all_budgets):
        key = (sample.problem, sample.number, budget)
        by_budget[budget] = {
            **asdict(grades[key]),
            "answer": find_answer(texts[key], settings.exact),
            "repeats": repeats_itself(texts[key]),
            "epistemic_words": epistemic_words(texts[key]),
        }
    return {
        "tokens": sample.tokens,
        "thinking_tokens": sample.thinking_tokens,
        "ended_by_eos": sample.ended_by_eos,
        "grades": by_budget,
    }
