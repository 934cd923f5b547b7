"""What an evaluation measures. The defaults here are the protocol; the command line, training and the sampler take theirs from here."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from trl_crisp.evaluation.grading import KINDS, Kind
from trl_crisp.prompts.chat_template_flags import check_chat_template_kwargs

ENGINES = ("transformers", "vllm")


def _check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise `ValueError` if a value is not an integer, or is below `least`."""
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
        model: A Hub id or a directory of a model or an adapter.
        benchmark: See [`~trl_crisp.evaluation.problems.load_benchmark`].
        file: A local copy of the benchmark's rows.
        instruction: `""` for the plain prompt. A name from the catalogue, a text or a .txt file for the "concise prompt" baseline.
        samples: Answers per problem (8 by default, for mean@8).
        temperature, top_p, top_k: 0.6, 0.95 and 20 by default.
        max_new_tokens: An answer is cut at this many tokens, 30,000 by default.
        budgets: Smaller caps in tokens. The same samples are measured at them too.
        limit: Measure only this many problems, from the first; all if `None`.
        seed: The seed of the sampling.
        batch_size: Answers at once; the engine chooses if `None`.
        engine: One of [`ENGINES`].
        tensor_parallel_size: GPUs that share the model; vLLM only.
        exact: Grade exactly by the authors' rules.
        chat_template_kwargs: Flags of the chat template, such as `enable_thinking`.
        grader: The kind of the answers, one of [`~trl_crisp.evaluation.grading.KINDS`]. If `None`, a named benchmark has its own
            kind, and the kind of a file is found from its answers.
        prompt_template: See [`~trl_crisp.evaluation.problems.load_benchmark`].
        system: A system message before each prompt.

    Raises:
        ValueError: If a value is out of its range.
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
    tensor_parallel_size: int = 1
    exact: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    grader: Kind | None = None
    prompt_template: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown. Choose {' or '.join(ENGINES)}.")
        if self.grader is not None and self.grader not in KINDS:
            raise ValueError(f"grader={self.grader!r} has to be one of {', '.join(KINDS)}.")
        for name in ("samples", "max_new_tokens", "batch_size", "limit"):
            if getattr(self, name) is not None or name in ("samples", "max_new_tokens"):
                _check_integer(name, getattr(self, name), 1)
        _check_integer("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.tensor_parallel_size > 1 and self.engine != "vllm":
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs engine='vllm': transformers answers on one device. Set the engine, "
                "or leave it out."
            )
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
        """The budgets in tokens, in ascending order; `max_new_tokens` is the last."""
        return sorted({*self.budgets, self.max_new_tokens})

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of the sampling that [`~trl_crisp.evaluation.engines.Engine.generate`] takes."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size")
        return {name: getattr(self, name) for name in names}
