"""One evaluation: problems -> prompts -> samples on disk -> grades -> results. `trl-crisp eval` runs it."""

import hashlib
import importlib.metadata
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_crisp.evaluation.grading import KINDS, Kind, require_math_verify
from trl_crisp.evaluation.locking import locked
from trl_crisp.evaluation.problems import Benchmark, Problem, load_benchmark
from trl_crisp.evaluation.results import (
    Sample,
    SampleFile,
    check_comparable,
    compare,
    shared_budgets,
    summaries,
    write_results,
)
from trl_crisp.evaluation.scoring import score_samples
from trl_crisp.prompts.chat_template_flags import check_chat_template_kwargs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from trl_crisp.evaluation.engines import Engine
    from trl_crisp.evaluation.sampling import Completion

# Ours: more than any benchmark has problems, so that a larger --limit leaves the random numbers of the others as they are
_PLACES = 1_000_000
# Called with a stage, how many are done of how many, and a note
Tell = Callable[[str, int, int, str], None]
# What the protocol calls the grader of each kind, and the authors' rules to the letter
_GRADERS: dict[Kind, str] = {
    "math": "the authors' rules, with plain notation read and near misses checked",
    "choice": "the letter of the answer line or of the box",
    "text": "a right answer as whole words in the answer line, or else in the first sentence",
}
_EXACT_GRADER = "the authors' rules"


def _check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise `ValueError` for what is no integer, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} has to be an integer.")
    if least is not None and value < least:
        off = " 0 turns it off." if name == "top_k" else ""
        raise ValueError(f"{name}={value} has to be at least {least}.{off}")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What to measure. The defaults are the paper's protocol (Sec. "Evaluation").

    Attributes:
        model: A Hub id or a directory, of a model or of an adapter.
        benchmark: See [`~trl_crisp.evaluation.problems.load_benchmark`].
        file: A local copy of the benchmark's rows.
        instruction: `""` for the plain prompt; a name of the catalogue, a text or a .txt file for the "concise prompt" baseline.
        samples: Answers a problem (8, mean@8).
        temperature, top_p, top_k: 0.6, 0.95 and 20.
        max_new_tokens: 30,000.
        budgets: Smaller caps, in tokens, that the same samples are measured at too.
        limit: The first so many problems.
        seed: Of the sampling.
        batch_size: Answers at once; the engine's own choice if `None`.
        engine: One of [`~trl_crisp.evaluation.engines.ENGINES`].
        exact: Grade by the authors' rules to the letter.
        chat_template_kwargs: Flags of the chat template, such as `enable_thinking`.
        grader: The kind of the answers, one of [`~trl_crisp.evaluation.grading.KINDS`], where the benchmark's or the file's own is not
            wanted.
        prompt_template: See [`~trl_crisp.evaluation.problems.load_benchmark`].
        system: A system message before each prompt.
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
    batch_size: int | None = None
    engine: str = "transformers"
    exact: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    grader: Kind | None = None
    prompt_template: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.grader is not None and self.grader not in KINDS:
            raise ValueError(f"grader={self.grader!r} has to be one of {', '.join(KINDS)}.")
        for name in ("samples", "max_new_tokens", "batch_size", "limit"):
            if getattr(self, name) is not None or name in ("samples", "max_new_tokens"):
                _check_integer(name, getattr(self, name), 1)
        for name in ("seed", "top_k"):
            _check_integer(name, getattr(self, name), 0)
        for budget in self.budgets:
            _check_integer("budget", budget)
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} has to be a finite number.")
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature} has to be 0, for greedy answers, or more: the logits are divided by it."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} has to be above 0 and at most 1: it is the share of the probability that tokens are drawn from, and "
                "1 turns it off. For greedy answers give temperature 0."
            )
        if outside := [budget for budget in self.budgets if not 1 <= budget <= self.max_new_tokens]:
            raise ValueError(
                f"budget {outside[0]} is not between 1 and max_new_tokens={self.max_new_tokens}, which bounds the answers."
            )
        check_chat_template_kwargs(self.chat_template_kwargs)

    @property
    def all_budgets(self) -> list[int]:
        """The budgets in tokens, the cap the last of them."""
        return sorted({*self.budgets, self.max_new_tokens})

    @property
    def sampling(self) -> dict[str, Any]:
        """What [`~trl_crisp.evaluation.engines.Engine.generate`] takes."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size")
        return {name: getattr(self, name) for name in names}


def evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    on_progress: Tell | None = None,
    baseline: dict[str, Any] | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Sample, grade and summarize; go on where an earlier call with the same settings was interrupted.

    Args:
        settings: What to measure.
        output_dir: Receives samples.jsonl and results.json.
        on_progress: Called with a stage, how many are done of how many, and a note.
        baseline: Results to compare with, at every budget of both.
        on_start: Called before the sampling with the `protocol` and the `first_prompt` of the results.

    Returns:
        The results, as in results.json ([`~trl_crisp.evaluation.results`]).

    Raises:
        ValueError: For settings, problems, samples on disk or a baseline that do not fit, and while another process evaluates into
            the same directory.
        FileNotFoundError, PermissionError, ConnectionError: Where the model or the problems cannot be had.
        ImportError: Where math-verify or the engine is not installed.
    """
    require_math_verify()
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"output {str(output_dir)!r}: {str(path)!r} is a file. Give a directory, which need not be there yet."
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
    from trl_crisp.evaluation.engines import load_engine
    from trl_crisp.evaluation.loading import describe_weights, find_model
    from trl_crisp.prompts.instructions import resolve_instruction

    instruction = resolve_instruction(settings.instruction)
    benchmark = load_asked(settings)

    def longest(tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig") -> int:
        prompts = prompt_token_ids(
            benchmark.problems, instruction, tokenizer, settings.chat_template_kwargs, settings.system
        )
        check_positions(config, benchmark.problems, prompts, settings.max_new_tokens)
        return max(map(len, prompts)) + settings.max_new_tokens

    source = find_model(settings.model)
    engine = load_engine(settings.engine, source, longest, settings.batch_size)
    about = describe_weights(source)
    return measure(
        engine, settings, instruction, benchmark, output_dir, on_progress, baseline, about, on_start=on_start
    )


def load_asked(settings: EvaluationSettings) -> Benchmark:
    """Return the problems that the settings ask for. Warns where `exact` has no effect on them."""
    benchmark = load_benchmark(
        settings.benchmark, settings.limit, settings.file, settings.grader, settings.prompt_template
    )
    if settings.exact and benchmark.kind == "text":
        warnings.warn(
            f"exact has no effect on {settings.benchmark}: its answers are texts, and the authors have no rule for them.",
            stacklevel=2,
        )
    return benchmark


def measure(
    engine: "Engine",
    settings: EvaluationSettings,
    instruction: str,
    benchmark: Benchmark,
    output_dir: Path,
    on_progress: Tell | None = None,
    baseline: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    sampled_in_s: float | None = None,
    on_start: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    As [`evaluate`], with what it loads and resolves at hand.

    Args:
        about: What else the protocol has to say.
        sampled_in_s: How long the sampling took, where the engine's answers were there before.
    """
    prompts = prompt_token_ids(
        benchmark.problems, instruction, engine.tokenizer, settings.chat_template_kwargs, settings.system
    )
    check_positions(engine.config, benchmark.problems, prompts, settings.max_new_tokens)
    sampling_protocol = {**describe_sampling(settings, instruction, benchmark, engine), **(about or {})}
    protocol = {
        **sampling_protocol,
        "problems": len(benchmark.problems),
        "kind": benchmark.kind,
        "kind_reason": benchmark.kind_reason,
        "grader": _EXACT_GRADER if settings.exact and benchmark.kind != "text" else _GRADERS[benchmark.kind],
    }
    first_prompt = str(engine.tokenizer.decode(prompts[0]))
    if baseline is not None:
        if missing := sorted({"problems", "protocol", "summary"} - baseline.keys()):
            raise ValueError(f"the baseline's results have no {', '.join(missing)}: evaluate it again.")
        check_comparable(baseline, protocol, {problem.id: problem.answer for problem in benchmark.problems})
    file = SampleFile(output_dir / "samples.jsonl", sampling_protocol)
    _check_prompts(file, benchmark, prompts)
    if on_start is not None:
        on_start({"protocol": protocol, "first_prompt": first_prompt})
    started_s = time.monotonic()
    tokens = _sample(settings, benchmark, prompts, engine, file, on_progress)
    wall_s = time.monotonic() - started_s if sampled_in_s is None else sampled_in_s

    def text_at(sample: Sample, budget_tokens: int) -> str:
        is_cut = budget_tokens < len(sample.token_ids)
        return str(engine.tokenizer.decode(sample.token_ids[:budget_tokens])) if is_cut else sample.text

    problems = score_samples(
        benchmark.problems, file.samples, settings.samples, settings.all_budgets, text_at, settings.exact, on_progress
    )
    results = {
        "protocol": protocol,
        "first_prompt": first_prompt,
        "samples": settings.samples,
        "summary": summaries(problems, settings.all_budgets, settings.samples),
        "wall_s": round(wall_s, 1),
        "tokens_per_s": round(tokens / max(wall_s, 1e-9), 1),
        "problems": problems,
    }
    if baseline is not None:
        budgets = shared_budgets(baseline, results)
        results["comparison"] = {str(budget): compare(baseline, results, budget) for budget in budgets}
    write_results(output_dir / "results.json", results)
    return results


def check_positions(
    config: "PretrainedConfig", problems: Sequence[Problem], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """
    Raise `ValueError` where a prompt and its answer have more tokens than the model has positions, naming the problem.

    A model whose rotary embedding is stretched has more than its config's `max_position_embeddings`, and is not checked.

    Args:
        config: The model's.
        problems: The longest prompt is named by its problem's id.
        prompts: The problems' token ids.
        max_new_tokens: An answer is cut there.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type", "default") != "default":
        return
    row, longest = max(enumerate(prompts), key=lambda pair: len(pair[1]))
    prompt_tokens = len(longest)
    if prompt_tokens + max_new_tokens <= positions:
        return
    problem = f"problem {problems[row].id!r} (row {row})"
    if prompt_tokens >= positions:
        raise ValueError(
            f"{problem} has a prompt of {prompt_tokens} tokens, and the model was made for {positions} positions: there is no room for "
            "an answer. Shorten or remove the row."
        )
    raise ValueError(
        f"max_new_tokens={max_new_tokens} after a prompt of {prompt_tokens} tokens, that of {problem}, needs "
        f"{prompt_tokens + max_new_tokens} positions, and the model was made for {positions}: beyond them its answers mean "
        f"nothing. Give --max-new-tokens (along a training run --eval_benchmark_max_new_tokens) {positions - prompt_tokens} or less."
    )


def describe_sampling(
    settings: EvaluationSettings, instruction: str, benchmark: Benchmark, engine: "Engine"
) -> dict[str, Any]:
    """Return everything that a sample depends on."""
    values = asdict(settings)
    # These say how fast, of how many, and what is made of the samples afterwards
    for name in ("batch_size", "samples", "limit", "file", "exact", "budgets", "grader"):
        values.pop(name)
    described = engine.describe()
    packages = ("trl-crisp", "math-verify")
    return {
        **values,
        **described,
        "instruction": instruction,
        "benchmark_source": benchmark.source,
        "benchmark_revision": benchmark.revision,
        "versions": {**{name: importlib.metadata.version(name) for name in packages}, **described["versions"]},
    }


def prompt_token_ids(
    problems: Sequence[Problem],
    instruction: str,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
    system: str | None = None,
) -> list[list[int]]:
    """
    Return each problem's prompt as the model reads it, with the instruction where training puts it.

    Raises:
        ValueError: For a system message that the model's chat template refuses.
    """
    import jinja2

    from trl_crisp.config import DAPO_OPENING_SENTENCE
    from trl_crisp.prompts.instructions import build_teacher_prompt

    prompts = []
    for problem in problems:
        asked = [{"role": "user", "content": problem.prompt}]
        if system is not None:
            asked.insert(0, {"role": "system", "content": system})
        messages, _ = build_teacher_prompt(asked, instruction, DAPO_OPENING_SENTENCE)
        try:
            rendered: Any = tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )
        except jinja2.TemplateError as error:
            if system is None:
                raise
            raise ValueError(
                f"system={system!r}: the model's chat template refuses it ({error}). Leave it out, or put it into the prompt_template."
            ) from error
        prompts.append(list(rendered["input_ids"]))
    return prompts


def _check_prompts(file: SampleFile, benchmark: Benchmark, prompts: list[list[int]]) -> None:
    digests = {problem.id: sha256_of_ids(ids) for problem, ids in zip(benchmark.problems, prompts, strict=True)}
    for sample in file.samples.values():
        if digests.get(sample.problem, sample.prompt_sha256) != sample.prompt_sha256:
            raise ValueError(
                f"{file.path} has an answer to problem {sample.problem!r} with another prompt: the problem, the chat template or the "
                "tokenizer has changed. Give another --output, or remove the file."
            )


def sha256_of_ids(token_ids: Sequence[int]) -> str:
    """Return the digest of token ids."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()


def _sample(
    settings: EvaluationSettings,
    benchmark: Benchmark,
    prompts: list[list[int]],
    engine: "Engine",
    file: SampleFile,
    on_progress: Tell | None,
) -> int:
    total = len(prompts) * settings.samples
    missing = [
        (place, number)
        for place, number in in_sampling_order(len(prompts), settings.samples)
        if (benchmark.problems[place].id, number) not in file.samples
    ]
    there = total - len(missing)
    tokens = 0

    def keep(index: int, completion: "Completion") -> None:
        nonlocal tokens
        place, number = missing[index]
        tokens += len(completion.token_ids)
        problem_id = benchmark.problems[place].id
        file.add(make_sample(problem_id, number, prompts[place], completion, engine.tokenizer))

    def tell(done: int, note: str) -> None:
        if on_progress is not None:
            on_progress("sampling", there + done, total, note)

    if missing:
        engine.generate(
            [prompts[place] for place, _ in missing],
            [random_place(place, number) for place, number in missing],
            keep,
            tell,
            **settings.sampling,
        )
    return tokens


def in_sampling_order(problems: int, samples: int) -> list[tuple[int, int]]:
    """Return (place, number) of all samples: the first of every problem, then the second of every problem, and so on."""
    return [(place, number) for number in range(samples) for place in range(problems)]


def random_place(place: int, number: int) -> int:
    """Return what a sample's random numbers go by, together with the seed: a problem's place, and which of its samples it is."""
    return number * _PLACES + place


def make_sample(
    problem_id: str,
    number: int,
    prompt_ids: Sequence[int],
    completion: "Completion",
    tokenizer: "PreTrainedTokenizerBase",
) -> Sample:
    """Return a completion as it is kept."""
    from trl_crisp.prompts.thinking import count_thinking_tokens, find_think_ids

    ids = completion.token_ids
    said = ids[:-1] if completion.ended_by_eos else ids
    thinking = count_thinking_tokens(prompt_ids, ids, [1] * len(ids), find_think_ids(tokenizer))
    return Sample(
        problem=problem_id,
        number=number,
        text=str(tokenizer.decode(said)),
        token_ids=list(ids),
        thinking_tokens=thinking,
        ended_by_eos=completion.ended_by_eos,
        prompt_sha256=sha256_of_ids(prompt_ids),
    )
