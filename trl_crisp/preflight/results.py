"""preflight.json: what was measured, the verdicts, and what a run needs.

Schema version 1. Shares are in [0, 1], lengths in tokens, intervals are paired 95% bootstrap intervals over prompts
(`estimate`, `low`, `high`, `confidence`).

- `schema`, `schema_version`
- `settings`: [`~trl_crisp.preflight.settings.PreflightSettings`]
- `protocol`: what the plain answers depend on: the model's weights, the sampling, the engine, the versions of the libraries
- `first_prompts`: the first prompt, `plain` and under each instruction, as the model reads it
- `prompts`: how many were asked (`asked`), how many have the plain prompt's majority answer (`with_reference`) and a right answer
  (`with_label`), how many have a teacher prompt of their own (`own_teacher_prompt`), how many drawn rows were too long (`dropped`)
- `labels`: the column of the right answers or `null`, how answers are compared (`kind`), and why (`reason`)
- `endings`: how the prompts end: `generation_prompt_tokens` of them open the model's turn, `generation_prompt` is their text, and
  `common_tokens` is the least number of last tokens that a plain prompt and its teacher prompt share; training refuses fewer of them
  than the turn has
- `judged_by`: `accuracy`, `agreement` or `null`
- `plain`: [`~trl_crisp.preflight.measuring.Counted`]
- `instructions`: of each its `name`, `text`, `counted` (the same), `effect` ([`~trl_crisp.preflight.measuring.Effect`]),
  `reverse_kl_nats` (per token of the plain answers, as the first step of training would log it) and `verdict`
  ([`~trl_crisp.preflight.verdict.Verdict`])
- `reverse_kl_reason`: why there is no reverse KL; `null` if there is
- `recommendation`: [`~trl_crisp.preflight.verdict.Recommendation`]
- `notes`: what limits these numbers, in words
- `run`: `steps` (of all rows, those that are too long among them), `rollouts_per_step` and `rollout_tokens` (at the plain prompt's mean
  length), `prompt_tokens` (of the longest prompt asked, plain or told, for which the memory is computed), the memory of the run on one
  GPU, by part ([`~trl_crisp.models.memory.RunMemory`]), with `full` fine-tuning and with `lora`, or `null` and `memory_reason`
- `answers`: of each prompt its `row`, `label`, `reference` (the majority's answer, its votes and the leave-one-out level), and the
  scores of its answers ([`~trl_crisp.preflight.measuring.PromptScores`]), `plain` and by instruction (`told`)
- `wall_s`: how long it took, in seconds
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trl_crisp.evaluation.row_answers import Labels
from trl_crisp.health.judge import choose_judge
from trl_crisp.models.memory import NoEstimateError, estimate_memory
from trl_crisp.preflight.asking import OWN_PROMPTS, Asking
from trl_crisp.preflight.measuring import Measured
from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.preflight.verdict import MUCH_CUT, judge, recommend
from trl_crisp.prompts.instructions import looks_like_math, speaks_of_math
from trl_crisp.run.files import write_json

SCHEMA = "trl-crisp preflight"
SCHEMA_VERSION = 1


def write_preflight(
    output_dir: Path,
    settings: PreflightSettings,
    protocol: dict[str, Any],
    asking: Asking,
    labels: Labels,
    first_prompts: dict[str, str],
    measured: Measured,
    kl_nats: Sequence[float] | None,
    kl_reason: str | None,
    needs: dict[str, Any],
    tokenizer: Any,
    wall_s: float,
) -> dict[str, Any]:
    """
    Judge what was measured, and write preflight.json.

    Args:
        output_dir: The directory of preflight.json.
        settings, protocol, asking, labels, first_prompts, measured: What was asked and measured.
        kl_nats: The reverse KL under each instruction; `None` if it could not be computed, and `kl_reason` says why.
        needs: See [`run_needs`].
        tokenizer: The model's tokenizer.
        wall_s: How long it took.

    Returns:
        The results as in the file, without `schema` and `schema_version`.
    """
    count = len(asking.asked)
    names = [told.name for told in asking.told]
    judged_by = choose_judge(count, labels.count, measured.plain.accuracy, measured.plain.agreement, settings.margin)
    cut = measured.plain.truncated
    verdicts = [
        judge(name, effect, judged_by, settings.margin, count, cut, settings.max_completion_length)
        for name, effect in zip(names, measured.effects, strict=True)
    ]
    lengths = [counted.mean_tokens for counted in measured.told]
    turn_ids = asking.asked[0].plain_ids[-asking.generation_prompt_tokens :] if asking.generation_prompt_tokens else []
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "protocol": protocol,
        "first_prompts": first_prompts,
        "prompts": {
            "asked": count,
            "with_reference": sum(reference is not None for reference in measured.references),
            "with_label": labels.count,
            "own_teacher_prompt": asking.own_prompts,
            "dropped": asking.dropped,
        },
        "labels": {"column": labels.column, "kind": labels.kind, "reason": labels.reason},
        "endings": {
            "generation_prompt_tokens": asking.generation_prompt_tokens,
            "generation_prompt": str(tokenizer.decode(turn_ids)),
            "common_tokens": min(
                _common_ending(one.plain_ids, told_ids) for one in asking.asked for told_ids in one.told_ids
            ),
        },
        "judged_by": judged_by,
        "plain": asdict(measured.plain),
        "instructions": [
            {
                "name": told.name,
                "text": told.text,
                "counted": asdict(measured.told[i]),
                "effect": asdict(measured.effects[i]),
                "reverse_kl_nats": None if kl_nats is None else kl_nats[i],
                "verdict": asdict(verdicts[i]),
            }
            for i, told in enumerate(asking.told)
        ],
        "reverse_kl_reason": kl_reason,
        "recommendation": asdict(recommend(names, verdicts, lengths, measured.effects, cut)),
        "notes": _notes(settings, asking, measured),
        "run": {
            **needs,
            "rollout_tokens": round(needs["steps"] * needs["rollouts_per_step"] * measured.plain.mean_tokens),
        },
        "answers": [
            {
                "row": one.row,
                "label": labels.golds[i],
                "reference": None if (reference := measured.references[i]) is None else asdict(reference),
                "plain": asdict(measured.plain_scores[i]),
                "told": {name: asdict(measured.told_scores[j][i]) for j, name in enumerate(names)},
            }
            for i, one in enumerate(asking.asked)
        ],
        "wall_s": round(wall_s, 1),
    }
    write_json(output_dir / "preflight.json", {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **results})
    return results


def _common_ending(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many last tokens two prompts share."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[-1 - n] != other[-1 - n]), shortest)


def _notes(settings: PreflightSettings, asking: Asking, measured: Measured) -> list[str]:
    notes = []
    known = sum(reference is not None for reference in measured.references)
    if not measured.has_agreement:
        notes.append(
            f"Agreement could not be measured: only {known} of {len(measured.references)} prompts have a majority answer. The task may have "
            "no final answers that can be compared (--grader text needs a line `Answer: ...`)."
        )
    levels = {"accuracy": measured.plain.accuracy, "agreement": measured.plain.agreement}
    notes += [
        f"The plain prompt's {name} is {level:.1%}, which cannot fall by more than the margin, so {name} does not judge."
        for name, level in levels.items()
        if level is not None and level <= settings.margin
    ]
    if measured.plain.truncated > MUCH_CUT:
        notes.append(
            f"{measured.plain.truncated:.0%} of the plain answers were cut at {settings.max_completion_length:,} tokens. They lack their full "
            "length and final answer, so the reduction is too small, and the changes of agreement and accuracy favour shorter answers. Raise "
            "--max_completion_length."
        )
    if settings.max_steps is None and asking.rows < settings.rollouts_per_step:
        notes.append(
            f"The rows do not fill one step: there are {asking.rows}, and a step has {settings.rollouts_per_step} rollouts. Give more rows, or a "
            "smaller batch."
        )
    if settings.max_steps is None and asking.dropped:
        drawn = asking.dropped + len(asking.asked)
        notes.append(
            f"The steps are those of all {asking.rows:,} rows: {asking.dropped} of the {drawn} drawn are longer than "
            f"max_prompt_length={settings.max_prompt_length} tokens, and training leaves such rows out, so it has fewer steps."
        )
    if 0 < asking.own_prompts < len(asking.asked):
        notes.append(
            f"{asking.own_prompts} of {len(asking.asked)} prompts have a teacher prompt of their own, which replaces the instruction, so these "
            "numbers are of both kinds together. Measure the rows of each kind alone."
        )
    share = sum(looks_like_math(one.columns["prompt"]) for one in asking.asked) / len(asking.asked)
    for told in asking.told:
        if told.name != OWN_PROMPTS and speaks_of_math(told.text) and share < 0.5:
            notes.append(
                f"{told.name} speaks of a math problem, but only {share:.0%} of the prompts look like one. Try --instruction general, or a text "
                "of your own."
            )
    return notes


def run_needs(settings: PreflightSettings, asking: Asking, config: Any) -> dict[str, Any]:
    """
    Return the `run` of the results but for `rollout_tokens`. Nothing needs to be sampled for it.

    Raises:
        ValueError: If the adapter does not fit the model.
    """
    prompt_tokens = max(len(ids) for one in asking.asked for ids in (one.plain_ids, *one.told_ids))
    needs: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "steps": settings.max_steps or asking.rows // settings.rollouts_per_step,
        "rollouts_per_step": settings.rollouts_per_step,
        "full": None,
        "lora": None,
        "memory_reason": None,
    }
    targets = settings.lora_target_modules
    lora = {"lora_r": settings.lora_r, "lora_target_modules": targets[0] if targets == ("all-linear",) else targets}
    adapters: dict[str, dict[str, Any]] = {"full": {}, "lora": lora}
    for name, adapter in adapters.items():
        try:
            memory = estimate_memory(
                config,
                prompt_tokens=prompt_tokens,
                completion_tokens=settings.max_completion_length,
                micro_batch=settings.per_device_train_batch_size,
                rollouts_at_once=settings.rollouts_per_step,
                dtype=getattr(torch, settings.dtype),
                **adapter,
            )
        except NoEstimateError as error:
            needs["memory_reason"] = str(error)
        else:
            needs[name] = {**asdict(memory), "update_gib": memory.update_gib, "peak_gib": memory.peak_gib}
    return needs
