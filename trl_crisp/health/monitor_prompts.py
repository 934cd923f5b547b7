"""Which prompts are monitored: some of the training rows, which are left out of them, or a file of the user's; and their right answers."""

import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_crisp.config import MIN_MONITOR_PROMPTS
from trl_crisp.evaluation.answers import find_letter
from trl_crisp.evaluation.grading import Grader, Kind
from trl_crisp.evaluation.row_answers import NO_COLUMN, find_golds
from trl_crisp.evaluation.text_answers import words
from trl_crisp.prompts.checks import PromptKind, check_prompt
from trl_crisp.prompts.instructions import Prompt
from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.rows.loading import load_file
from trl_crisp.rows.prompts import to_prompts


@dataclass(frozen=True)
class MonitorPrompts:
    """
    The prompts that are monitored.

    Attributes:
        prompts: As the student has them.
        golds: The right answer to each prompt, as [`~trl_crisp.evaluation.grading.grade`] reads it; `None` if its row has none.
        why_no_golds: Why a column of right answers has none that can be used; `None` if one is used, or there is no such column.
        rows: The rows that are left to train on.
        monitored: The rows of the prompts, with all their columns.
    """

    prompts: list[Prompt]
    golds: list[str | list[str] | None]
    why_no_golds: str | None
    rows: Any
    monitored: Dataset


def take_prompts(args: Any, train_dataset: Any, monitor_dataset: Dataset | None = None) -> MonitorPrompts:
    """
    Return the prompts to monitor, and the training rows without them. A file's prompts cannot be compared with those of a stream.

    Args:
        args: The config; `monitor_prompts`, `monitor_file` and `seed` are read.
        train_dataset: The training rows.
        monitor_dataset: The rows of `monitor_file`, with a column `prompt`. If `None`, the file is loaded.

    Raises:
        ValueError: If `monitor_dataset` has no prompts, if the rows are a stream or too few, if those that are left do not fill a step, or if a prompt of the file is a training prompt (space around it and system messages
            do not count), or of another type than those.
        FileNotFoundError: If there is no such file.
    """
    if args.monitor_file is None:
        return _from_training_rows(args, train_dataset)
    if monitor_dataset is None:
        monitor_dataset = load_monitor_file(args.monitor_file)
    _check_columns(monitor_dataset)
    distinct = sorted(_first_rows(_keys(list(monitor_dataset["prompt"]))).values())
    wanted = len(distinct) if args.monitor_prompts is None else args.monitor_prompts
    if len(distinct) < max(wanted, MIN_MONITOR_PROMPTS):
        raise ValueError(
            f"monitor_file={args.monitor_file!r} has {len(distinct)} different prompts, and "
            + (f"monitor_prompts={wanted}" if wanted > len(distinct) else f"at least {MIN_MONITOR_PROMPTS} are needed")
            + ". Give more rows, better 128, or fewer monitor_prompts."
        )
    chosen = monitor_dataset.select(distinct[:wanted])
    if isinstance(train_dataset, Dataset):
        _check_held_out(args, list(chosen["prompt"]), list(train_dataset["prompt"]))
    golds: list[str | list[str] | None] = [None] * len(chosen)
    why = None
    if "base_agreement" in chosen.column_names:
        warnings.warn(
            f"monitor_file={args.monitor_file!r} has a column base_agreement, so its answers are a base's majority answers. They are not taken "
            "for right answers, and accuracy is not measured.",
            stacklevel=2,
        )
    else:
        golds, why = _golds_of(chosen)
    return MonitorPrompts(list(chosen["prompt"]), golds, why, train_dataset, chosen)


def _golds_of(chosen: Dataset) -> tuple[list[str | list[str] | None], str | None]:
    """Return the right answers of rows and, if there are none though a column should have some, why."""
    column, golds, reason = find_golds(list(chosen))
    return golds, reason if column is None and reason != NO_COLUMN else None


def _check_columns(monitor_dataset: Any) -> None:
    if not isinstance(monitor_dataset, Dataset):
        raise ValueError(
            f"monitor_dataset is a {type(monitor_dataset).__name__}, and has to be a datasets.Dataset. Make one of a list of rows by "
            "`Dataset.from_list(rows)`, and take one split of a DatasetDict."
        )
    if "prompt" not in (columns := monitor_dataset.column_names):
        raise ValueError(
            f"monitor_dataset has no column 'prompt'; it has {', '.join(columns) or 'none'}. Rename the column that holds the prompts, such as "
            "`monitor_dataset.rename_column('question', 'prompt')`."
        )
    kind: PromptKind | None = None
    for number, prompt in enumerate(monitor_dataset["prompt"]):
        kind = check_prompt(prompt, f"monitor_dataset: row {number}: column 'prompt'", kind)


def _check_held_out(args: Any, asked: list[Prompt], trained: list[Prompt]) -> None:
    kinds = ["texts" if isinstance(prompts[0], str) else "lists of messages" for prompts in (asked, trained)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"monitor_file={args.monitor_file!r}: its prompts are {kinds[0]}, and the training prompts are {kinds[1]}. The chat template applies "
            "to messages only, so the base would be asked otherwise than in training. Give the file's prompts in the form of the training rows."
        )
    text_of = _text_that_tells_apart(trained)
    rows = {text_of(prompt): number for number, prompt in enumerate(trained)}
    if shared := [(number, rows[text]) for number, prompt in enumerate(asked) if (text := text_of(prompt)) in rows]:
        raise ValueError(
            f"monitor_file={args.monitor_file!r}: {len(shared)} of its prompts are training prompts, such as the file's prompt {shared[0][0]} "
            f"(row {shared[0][1]} of the training rows). What is trained on cannot be held out: remove them from the file or from the rows, "
            "or set monitor_prompts alone, which leaves prompts out of the rows."
        )


def _text_that_tells_apart(prompts: list[Prompt]) -> Callable[[Prompt], str]:
    """Return the text of a prompt by which two are the same: what the user says, or all of it if the prompts differ elsewhere only."""
    wholes, said = (set(map(text_of, prompts)) for text_of in (_whole_text, _user_text))
    return _user_text if len(said) == len(wholes) else _whole_text


def _user_text(prompt: Prompt) -> str:
    messages = prompt if isinstance(prompt, str) else [one for one in prompt if one["role"] == "user"]
    return _whole_text(messages)


def _whole_text(prompt: Prompt) -> str:
    """Return a prompt as text, without the space around its messages."""
    if isinstance(prompt, str):
        return prompt.strip()
    return json.dumps([[one["role"], _stripped(one.get("content"))] for one in prompt])


def _stripped(content: Any) -> Any:
    if isinstance(content, list):
        return "".join(str(block.get("text") or "") for block in content).strip()
    return content.strip() if isinstance(content, str) else content


def load_monitor_file(path: str, script_args: CRISPScriptArguments | None = None) -> Dataset:
    """
    Load the rows of a monitor file, and give each its prompt as the training rows get it.

    Args:
        path: A .jsonl, .json, .parquet or .csv file.
        script_args: How the training rows become prompts; by default by their column `prompt`.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"monitor_file={path!r}: there is no such file (looked for {Path(path).expanduser().absolute()})."
        )
    loaded = load_file(Path(path).expanduser(), streaming=False, field_name="monitor_file")
    given = vars(script_args or CRISPScriptArguments())
    # Only the distance from the base needs teacher's prompts
    column = given["teacher_prompt_column"]
    column = column if column in loaded.column_names else None
    rows = to_prompts(loaded, CRISPScriptArguments(**{**given, "dataset_name": path, "teacher_prompt_column": column}))
    assert isinstance(rows, Dataset)
    return rows


def _from_training_rows(args: Any, train_dataset: Any) -> MonitorPrompts:
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            f"monitor_prompts={args.monitor_prompts} are taken from the training rows, and a stream has no rows to leave out. Load the "
            "rows without streaming, give the prompts as a monitor_file, or leave it unset."
        )
    keys = _keys(list(train_dataset["prompt"]))
    distinct = _first_rows(keys)
    if len(distinct) <= args.monitor_prompts:
        raise ValueError(
            f"monitor_prompts={args.monitor_prompts}: the training rows have {len(distinct)} different prompts, so none would be left to "
            "train on. Give more rows, or fewer monitor prompts."
        )
    rows = sorted(random.Random(args.seed).sample(sorted(distinct.values()), args.monitor_prompts))
    taken = {keys[row] for row in rows}
    chosen = train_dataset.select(rows)
    left = train_dataset.select([row for row, key in enumerate(keys) if key not in taken])
    if len(left) < args.rollouts_per_step:
        raise ValueError(
            f"monitor_prompts={args.monitor_prompts} leaves {len(left)} of the {len(train_dataset)} rows to train on, and a step needs "
            f"{args.rollouts_per_step}. Give more rows, fewer monitor prompts, a smaller batch, or the prompts as a monitor_file."
        )
    golds, why = _golds_of(chosen)
    return MonitorPrompts(list(chosen["prompt"]), golds, why, left, chosen)


def _keys(prompts: list[Prompt]) -> list[str]:
    return list(map(_text_that_tells_apart(prompts), prompts))


def _first_rows(keys: list[str]) -> dict[str, int]:
    """Return the number of the first row of each key."""
    return {key: row for row, key in reversed(list(enumerate(keys)))}


def find_unreadable(golds: Sequence[str | list[str]], kind: Kind) -> int | None:
    """Return the number of the first right answer that answers cannot be graded by, or `None` if all are fine."""
    if kind == "text":
        fits = [all(words(one) for one in ([gold] if isinstance(gold, str) else gold)) for gold in golds]
    elif kind == "choice":
        fits = [isinstance(gold, str) and find_letter(gold) is not None for gold in golds]
    else:
        with Grader() as grader:
            readable = grader.readable([gold if isinstance(gold, str) else "" for gold in golds])
        fits = [isinstance(gold, str) and is_read for gold, is_read in zip(golds, readable, strict=True)]
    return fits.index(False) if False in fits else None
