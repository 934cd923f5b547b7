"""The model card: what was trained and how, the results with their protocol, how to load the model, and what was not measured."""

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard

from trl_crisp.report.card_metadata import make_metadata
from trl_crisp.report.card_results import CardResults
from trl_crisp.report.rendering import make_environment
from trl_crisp.report.run_log import RunLog
from trl_crisp.report.run_verdict import judge_run
from trl_crisp.report.verdict import MUCH_CUT, Verdict

CARD_FILE = "README.md"
# Benchmarks on which accuracy falls first (the paper, and its limits)
_HARD = ("aime24", "aime25", "gpqa-diamond")
_STATUS_NAMES = ("healthy", "watch", "unhealthy")
_RESULT_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "engine",
    "dtype",
    "device",
    "grader",
    "system",
    "prompt_template",
)


@dataclass(frozen=True)
class CardFacts:
    """
    What a card says.

    Attributes:
        name: The model's name.
        repo: Its Hub id or, if it is not on the Hub, what a reader gives to load it.
        base: What it was trained from ([`~trl_crisp.models.origin.describe_origin`]).
        is_adapter: Whether it is an adapter.
        is_chat: Whether its tokenizer has a chat template.
        record: The training's record ([`~trl_crisp.run.training_record`]), `None` if nothing is known.
        results: The measurements of the model.
        run: The training's log, `None` if there is none.
        figure: The file name of a figure beside the card.
        result_links: Where each result's results.json is, by its path, relative to the card.
        has_tokenizer: Whether the tokenizer is with the model; otherwise that of the base is used.
        reports: The file names of the reports beside the card.
        tags: More tags.
    """

    name: str
    repo: str
    base: dict[str, Any]
    is_adapter: bool
    is_chat: bool
    record: dict[str, Any] | None = None
    results: Sequence[CardResults] = ()
    run: RunLog | None = None
    figure: str | None = None
    result_links: Mapping[Path, str] = field(default_factory=dict)
    has_tokenizer: bool = True
    reports: Sequence[str] = ()
    tags: Sequence[str] = ()


def make_card(facts: CardFacts) -> ModelCard:
    """
    Return a model card. Its metadata are parsed back, so a card that the Hub could not read is an error here.

    Raises:
        ValueError: If the record lacks something.
    """
    from jinja2 import UndefinedError

    record = facts.record or {}
    dataset = record.get("dataset") or {}
    tags = [*record.get("tags", []), *facts.tags]
    metadata = make_metadata(facts.name, facts.base, facts.is_adapter, dataset.get("hub_id"), tags, facts.results)
    environment = make_environment(
        is_html=False, line=_one_line, fence=code_fence, python=_python_text, shell=shlex.quote, link=quote
    )
    try:
        text = environment.get_template("card.md.j2").render(
            facts=facts,
            record=record,
            dataset=dataset,
            monitored=_monitored(facts),
            verdict=_verdict_of_run(facts),
            health=_health(facts),
            limits=_limits(facts),
            protocol_of=_protocol_of,
        )
    except UndefinedError as error:
        raise ValueError(
            f"the record of the training is not as trl-crisp writes it: {error.message}. Move crisp_training.json away, and the card says that "
            "nothing is known of the training."
        ) from error
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _monitored(facts: CardFacts) -> dict[str, Any] | None:
    """
    Return what was measured on the monitor prompts at the model's step, before and after: `agreement` with the base's majority answers,
    `accuracy`, each `None` if it was not, and `tokens`. `None` if neither was.
    """
    step = (facts.record or {}).get("step")
    if facts.run is None or not step:
        return None
    agreement, accuracy = (
        _before_and_after(facts.run, step, key) for key in ("eval_agreement", "eval_agreement_accuracy")
    )
    if agreement is None and accuracy is None:
        return None
    return {
        "agreement": agreement,
        "accuracy": accuracy,
        "tokens": [facts.run.at(number, "eval_agreement_mean_tokens") for number in (0, step)],
    }


def _before_and_after(run: RunLog, step: int, key: str) -> dict[str, Any] | None:
    before, after = (run.at(number, key) for number in (0, step))
    if before is None or after is None:
        return None
    change = {
        "estimate": after - before,
        **{end: run.at(step, f"{key}_change_{end}") for end in ("low", "high")},
    }
    return {"before": before, "after": after, "change": change if None not in change.values() else None}


def _verdict_of_run(facts: CardFacts) -> Verdict | None:
    """Return what the training's own measurements say of the model, if it was not measured on a benchmark."""
    step = (facts.record or {}).get("step")
    if facts.results or facts.run is None or not step:
        return None
    verdict = judge_run(facts.run, step)
    return None if verdict.level == "no verdict" else verdict


def _health(facts: CardFacts) -> str | None:
    """Return what the training's signals said at the model's step, and when that was."""
    run = facts.run
    if run is None:
        return None
    step = (facts.record or {}).get("step", run.last_step)
    if (status := run.status_at(step)) is None:
        return None
    event = run.event_at(step)
    reasons = event["reasons"] if status and event is not None else []
    return f"{run.when(step)}: {_STATUS_NAMES[status]}" + (f" ({'; '.join(reasons)})" if reasons else "")


def _limits(facts: CardFacts) -> list[str]:
    results, limits = facts.results, []
    monitored = _monitored(facts)
    if not results and monitored is not None and monitored["accuracy"] is not None:
        limits.append("Accuracy was measured on the monitor prompts alone, which are like those of the training.")
    elif not results:
        agrees = "" if monitored is None else " Agreement with the base is no accuracy."
        limits.append(f"Accuracy was not measured, so nothing here shows that the answers are still right.{agrees}")
    else:
        names = ", ".join(dict.fromkeys(result.benchmark for result in results))
        limits.append(f"Accuracy and length were measured on {names} alone; on other tasks both may differ.")
    if results and any(result.verdict is None for result in results):
        limits.append("The base was not measured in the same way everywhere, so the change is unknown there.")
    if not any(str(result.protocol.get("benchmark")) in _HARD for result in results):
        limits.append(
            "No hard benchmark (AIME, GPQA) was measured. Accuracy falls there first when reasoning is shortened."
        )
    if any(result.samples == 1 for result in results):
        limits.append("With one answer per problem, pass@k was not measured: shorter answers may be less diverse.")
    for result in results:
        cut = result.summary["truncated"]
        if cut > MUCH_CUT:
            limits.append(
                f"On {result.benchmark} {cut:.0%} of the answers were cut at {result.budget_tokens:,} tokens."
            )
    limits.append("This is one training run; how much another seed would differ was not measured.")
    limits.append("Safety, following of instructions, use of tools and other languages were not measured.")
    return limits


def _protocol_of(result: CardResults) -> str:
    protocol, summary = result.protocol, result.summary
    commit = protocol.get("benchmark_revision")
    parts = [
        f"{summary['problems']} problems of {result.source}" + (f" at {commit}" if commit else ""),
        f"{result.samples} answer{'s' * (result.samples > 1)} each",
        f"at most {result.budget_tokens:,} tokens",
    ]
    parts += [f"{key} {protocol[key]}" for key in _RESULT_KEYS if protocol.get(key) is not None]
    told = [one.results["protocol"].get("instruction") for one in result.compared.all if one.role == "concise"]
    parts += [f'told "{" ".join(str(text).split())}"' for text in told]
    versions = protocol.get("versions") or {}
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    if "step" in protocol:
        parts.append(f"measured during training, at step {protocol['step']}")
    return "; ".join(part for part in parts if part)


def log_is_drawable(run: RunLog | None) -> bool:
    """Whether a run's log has lengths of rollouts to draw."""
    return run is not None and any(math.isfinite(length) for _, length in run.series("completions/mean_length"))


def _python_text(text: str) -> str:
    """Return a text as Python's source has it. JSON's texts are Python's."""
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False)


def code_fence(text: str) -> str:
    """Return a text as a block of code, which no row of backticks in it ends."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
