"""The protocol of an evaluation: what its samples depend on, and how they are graded. It is stored with the numbers."""

import importlib.metadata
from typing import TYPE_CHECKING, Any

from trl_crisp.evaluation.grading import Kind
from trl_crisp.evaluation.problems import Benchmark
from trl_crisp.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from trl_crisp.evaluation.engines import Engine

# The settings that a sample depends on; the model is described apart
_SAMPLING_SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "seed",
    "engine",
    "chat_template_kwargs",
    "prompt_template",
    "system",
)
_PACKAGES = ("trl-crisp", "math-verify")
# The names that the protocol gives to the grader of each kind, and to the authors' rules
_GRADERS: dict[Kind, str] = {
    "math": "the authors' rules, with plain notation read and near misses checked",
    "choice": "the letter of the answer line or of the box",
    "text": "a right answer as whole words in the answer line, or else in the first sentence",
}
_EXACT_GRADER = "the authors' rules"


def describe_sampling(
    settings: EvaluationSettings,
    instruction: str,
    benchmark: Benchmark,
    engine: "Engine",
    model: str,
    about_model: dict[str, Any],
) -> dict[str, Any]:
    """
    Return everything that a sample depends on.

    Args:
        settings: All but `model` and `instruction` is taken from here.
        instruction: The instruction's text.
        benchmark: The problems.
        engine: It describes itself.
        model: The name of the model that is measured.
        about_model: What tells the model's weights from others, such as a commit or a training step.

    Raises:
        ValueError: If `about_model` has a key that the protocol has already.
    """
    engine_protocol = engine.describe()
    protocol = {
        "model": model,
        "benchmark": settings.benchmark,
        "instruction": instruction,
        **{name: getattr(settings, name) for name in _SAMPLING_SETTINGS},
        **engine_protocol,
        "benchmark_source": benchmark.source,
        "benchmark_revision": benchmark.revision,
        "versions": {
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
            **engine_protocol["versions"],
        },
    }
    if doubled := protocol.keys() & about_model.keys():
        raise ValueError(f"about_model has {', '.join(sorted(doubled))}, which the protocol has already.")
    return {**protocol, **about_model}


def describe_grading(settings: EvaluationSettings, benchmark: Benchmark) -> dict[str, Any]:
    """Return which problems are graded, and how."""
    is_exact = settings.exact and benchmark.kind != "text"
    return {
        "problems": len(benchmark.problems),
        "kind": benchmark.kind,
        "kind_reason": benchmark.kind_reason,
        "grader": _EXACT_GRADER if is_exact else _GRADERS[benchmark.kind],
    }
