"""Which prompts are asked: drawn from the rows to train on, each with the prompts that training would make of it."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.prompts.instructions import Prompt, resolve_instruction
from trl_crisp.prompts.pairs import PromptPairs, PromptReport

# The name of the teacher prompts that the rows have themselves
OWN_PROMPTS = "teacher_prompt"
# Ours: a name in a table
_NAME_CHARACTERS = 40


@dataclass(frozen=True)
class Told:
    """
    One way to tell the teacher.

    Attributes:
        name: What the user gave; a text is cut for the table.
        text: The instruction's text.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Asked:
    """
    One prompt that is asked.

    Attributes:
        row: The number of its row, as in training's messages.
        columns: The row.
        plain_ids: The token ids of the student's prompt.
        told_ids: Those of the teacher's prompt under each instruction.
    """

    row: int
    columns: dict[str, Any]
    plain_ids: list[int]
    told_ids: list[list[int]]


@dataclass(frozen=True)
class Asking:
    """
    What is asked.

    Attributes:
        told: The instructions.
        asked: The prompts.
        rows: The rows to train on.
        dropped: How many rows that were drawn have a prompt that is too long for training.
        generation_prompt_tokens: How many tokens open the model's turn, at the end of each prompt.
        own_prompts: How many of the prompts have a teacher prompt of their own, which replaces the instruction.
    """

    told: list[Told]
    asked: list[Asked]
    rows: int
    dropped: int
    generation_prompt_tokens: int
    own_prompts: int


def resolve_all(instructions: Sequence[str]) -> list[Told]:
    """
    Return the instructions' texts.

    Raises:
        ValueError: If a name is unknown, or two are the same.
        FileNotFoundError: If a .txt file does not exist.
    """
    told: list[Told] = []
    for given in instructions:
        text = resolve_instruction(given)
        if (same := next((one for one in told if one.text == text), None)) is not None:
            raise ValueError(f"instruction {given!r} and {same.name!r} are the same text. Leave one of them out.")
        name = " ".join(given.split()) or "''"
        cut = name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 3]}..."
        # Two long texts may begin alike
        told.append(Told(cut if all(cut != one.name for one in told) else f"{cut} ({len(told) + 1})", text))
    return told


def draw_prompts(dataset: Dataset, tokenizer: Any, settings: PreflightSettings) -> Asking:
    """
    Draw prompts, and give each its teacher prompts as training does.

    More prompts of the same seed begin with those of fewer.

    Args:
        dataset: The rows with `prompt`, as [`~trl_crisp.data.load_prompts`] returns them.
        tokenizer: The model's tokenizer.
        settings: What to ask.

    Raises:
        ValueError: If a prompt is invalid (the message has its row), or there are too few different ones that are short enough.
        FileNotFoundError: If an instruction's file does not exist.
    """
    told = resolve_all(settings.instructions)

    def tokenize(prompts: list[Prompt]) -> list[list[int]]:
        return [_render(tokenizer, prompt, settings.chat_template_kwargs, True) for prompt in prompts]

    pairs = [
        PromptPairs(
            one.text,
            (settings.instruction_replaces or "").strip() or None,
            settings.instruction_role,  # type: ignore[arg-type]
            tokenize,
            settings.max_prompt_length,
        )
        for one in told
    ]
    turn_tokens = pairs[0].count_turn_tokens(
        dataset[0]["prompt"], lambda prompt: _render(tokenizer, prompt, settings.chat_template_kwargs, False)
    )
    report = PromptReport()
    asked: list[Asked] = []
    dropped = own = distinct = 0
    for number, row in _distinct(dataset, settings.seed):
        distinct += 1
        [plain_ids] = pairs[0].tokenize_students([row["prompt"]], number)
        told_ids, all_fit = [], True
        for pair in pairs:
            columns, [fits] = pair.pair_rows([row], number, turn_tokens, report)
            told_ids += columns["teacher_prompt_ids"]
            all_fit = all_fit and fits
        if not all_fit:
            dropped += 1
            continue
        own += row.get("teacher_prompt") is not None
        asked.append(Asked(number, row, plain_ids, told_ids))
        if len(asked) == settings.prompts:
            break
    if len(asked) < settings.prompts:
        long = (
            f" that are short enough ({dropped} are longer than max_prompt_length={settings.max_prompt_length} tokens)"
        )
        raise ValueError(
            f"prompts={settings.prompts}: the rows have only {len(asked)} different prompts{long if dropped else ''}. Give fewer prompts, or "
            f"more rows{', or a larger max_prompt_length' if dropped else ''}."
        )
    if own == len(asked):
        told = [Told(OWN_PROMPTS, "")]
        _check_own(asked, settings)
        asked = [Asked(one.row, one.columns, one.plain_ids, one.told_ids[:1]) for one in asked]
    return Asking(told, asked, len(dataset), dropped, turn_tokens, own)


def _check_own(asked: Sequence[Asked], settings: PreflightSettings) -> None:
    if settings.instructions != PreflightSettings.instructions:
        raise ValueError(
            f"instruction {' '.join(settings.instructions)} has no effect: each row has a teacher prompt of its own, which training uses "
            "instead. Leave the instruction out to measure those, or remove the column."
        )


def _distinct(dataset: Dataset, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    seen = set()
    for number in order:
        row = dataset[number]
        key = json.dumps(row["prompt"], sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield number, row


def _render(tokenizer: Any, prompt: Prompt, flags: dict[str, Any] | None, add_generation_prompt: bool) -> list[int]:
    """Return the token ids of a prompt, as the trainer reads it."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, **(flags or {})
    )
    return list(rendered["input_ids"])
