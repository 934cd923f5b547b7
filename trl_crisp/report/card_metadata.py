"""The metadata of a model card, and the results in the two forms that the Hub reads: `model-index`, and the files of `.eval_results/`."""

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from trl_crisp.report.card_results import CardResults

LIBRARY_TAGS = ("generated_from_trainer", "trl", "crisp", "arxiv:2603.05433")
# Benchmarks that the Hub has a leaderboard for: name -> (dataset, task in its eval.yaml, problems). A part of a benchmark is no
# result of it. Other datasets are not known to be registered there (huggingface.co/docs/hub/eval-results)
_LEADERBOARDS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", 1319),
    "gpqa-diamond": ("Idavidrein/gpqa", "gpqa_diamond", 198),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def make_metadata(
    name: str,
    base: dict[str, Any],
    is_adapter: bool,
    dataset_hub_id: str | None,
    tags: Sequence[str],
    results: Sequence[CardResults],
) -> ModelCardData:
    """
    Return a card's metadata.

    Args:
        name: The model's name.
        base: As [`~trl_crisp.models.origin.describe_origin`] returns it.
        is_adapter: Whether the model is an adapter.
        dataset_hub_id: The Hub id of the rows that it was trained on.
        tags: More tags.
        results: The measurements of the model.
    """
    hub_id = base.get("hub_id")
    relation: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if hub_id else {}
    return ModelCardData(
        base_model=hub_id,
        datasets=[dataset_hub_id] if dataset_hub_id else None,
        library_name="peft" if is_adapter else "transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        model_name=name,
        pipeline_tag="text-generation",
        tags=[*LIBRARY_TAGS, *tags],
        eval_results=[one for result in results for one in _model_index_of(result)] or None,
        **relation,
    )


def _model_index_of(result: CardResults) -> list[EvalResult]:
    protocol, summary = result.protocol, result.summary
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Text Generation",
        "dataset_type": result.source,
        "dataset_name": result.benchmark,
        "dataset_revision": _commit_of(protocol),
        "dataset_args": {"problems": summary["problems"]},
    }
    how = {
        "samples_per_problem": result.samples,
        "temperature": protocol.get("temperature"),
        "max_new_tokens": result.budget_tokens,
    }
    values = [("accuracy", f"accuracy (mean@{result.samples})", summary["accuracy"])]
    if "anywhere_accuracy" in summary:
        values.append(("accuracy_anywhere", "right anywhere in the answer", summary["anywhere_accuracy"]))
    values.append(("mean_tokens", "mean tokens per answer", summary["mean_tokens"]))
    return [
        EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(value, 4), metric_args=how)
        for kind, name, value in values
    ]


def leaderboard_entry(result: CardResults, url: str | None = None) -> EvalResultEntry | None:
    """
    Return a result as `.eval_results/*.yaml` has it: accuracy in percent. `None` if the Hub has no leaderboard for it.

    Args:
        result: It has to be of the whole benchmark.
        url: Where its results.json is on the Hub.
    """
    name = str(result.protocol.get("benchmark"))
    dataset, task, problems = _LEADERBOARDS.get(name, (None, "", 0))
    if dataset is None or result.source != dataset or result.summary["problems"] != problems:
        return None
    protocol = result.protocol
    return EvalResultEntry(
        dataset_id=dataset,
        task_id=task,
        value=round(100 * result.summary["accuracy"], 2),
        dataset_revision=_commit_of(protocol),
        source_url=url,
        source_name=None if url is None else "results.json of trl-crisp eval",
        notes=f"accuracy in %, mean@{result.samples}, temperature {protocol.get('temperature')}, up to {result.budget_tokens:,} tokens, graded by "
        "trl-crisp eval",
    )


def _commit_of(protocol: dict[str, Any]) -> str | None:
    revision = str(protocol.get("benchmark_revision"))
    return revision if _COMMIT.fullmatch(revision) else None
