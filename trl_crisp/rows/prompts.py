"""From loaded rows to prompts, with one function per step: load, make prompts, de-duplicate, split.

Each resulting row has `prompt`, a string or a list of messages, as [`~trl_crisp.CRISPTrainer`] needs it, and keeps its other
columns, such as `teacher_prompt`.
"""

import hashlib
import itertools
import json
import logging
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trl_crisp.prompts.checks import PromptKind, check_prompt
from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.rows.loading import FILE_BUILDERS, REASONING_GYM_PREFIX, load_splits, unreadable_rows_named

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    DatasetLike: TypeAlias = Dataset | IterableDataset

logger = logging.getLogger(__name__)


def load_prompts(args: CRISPScriptArguments, evaluation: bool = False) -> tuple["DatasetLike", "DatasetLike | None"]:
    """
    Return the rows to train on and, if asked for, the rows to evaluate on.

    Args:
        args: Which rows, and how they become prompts.
        evaluation: Whether evaluation rows are needed (`eval_strategy` is not `"no"`).

    Raises:
        ValueError: If the arguments do not fit the rows or each other.
        FileNotFoundError, PermissionError, ConnectionError, ImportError: If the rows cannot be loaded.
    """
    name = args.dataset_name
    if not name:
        raise ValueError(
            "no dataset: set dataset_name to a dataset on the Hub (BytedTsinghua-SIA/DAPO-Math-17k), a local file "
            f"({', '.join(FILE_BUILDERS)}), or a task of reasoning-gym ({REASONING_GYM_PREFIX}gsm_symbolic)."
        )
    if args.dataset_streaming and (args.deduplicate_prompts or args.dataset_train_fraction is not None):
        raise ValueError(
            "dataset_streaming reads the rows one by one, and de-duplication and the split need all of them. Set "
            "deduplicate_prompts to false and leave dataset_train_fraction unset, or do not stream."
        )
    splits = load_splits(args)
    train = _pick_split(splits, args.dataset_train_split, "dataset_train_split", name)
    # to_prompts reads the first rows of a stream
    with unreadable_rows_named(Path(name).expanduser()):
        train = to_prompts(train, args)
    if args.deduplicate_prompts:
        train = deduplicate(train)
    if args.dataset_train_fraction is not None:
        train, held_out = split(train, args.dataset_train_fraction, args.dataset_split_seed)
        return train, held_out if evaluation else None
    if not evaluation:
        return train, None
    if args.dataset_test_split not in splits:
        raise ValueError(
            f"eval_strategy needs rows to evaluate on, and {name!r} has no split {args.dataset_test_split!r} (it has "
            f"{', '.join(splits)}). Set dataset_train_fraction, such as 0.8, to hold some rows out, name a split with "
            "dataset_test_split, or set eval_strategy to 'no'."
        )
    return train, to_prompts(splits[args.dataset_test_split], args)


def to_prompts(dataset: "DatasetLike", args: CRISPScriptArguments) -> "DatasetLike":
    """
    Give each row its `prompt`: fill in the template, or rename the column.

    All rows are checked here, before de-duplication and the split change their numbers. The rows of a stream are checked when
    they are read.

    Raises:
        ValueError: If a column does not exist, there are no rows, or a row has no valid prompt; the message names row and column.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"dataset_name={args.dataset_name!r} has no rows. Check the file, or the split.")
    columns = list(first)
    name = args.dataset_name
    fields = {}
    column = args.teacher_prompt_column or "teacher_prompt"
    if column in columns:
        dataset = _rename(dataset, columns, column, "teacher_prompt")
        fields["teacher_prompt"] = f"teacher_prompt_column={column!r}"
        dataset = _read_json_messages(dataset, "teacher_prompt", column, name)
        # The column has been renamed
        columns = list(next(iter(dataset)))
    elif args.teacher_prompt_column:
        raise ValueError(
            f"teacher_prompt_column={column!r}: {args.dataset_name!r} has no such column; it has {', '.join(columns)}."
        )
    if args.prompt_template is not None:
        check_template(args.prompt_template, columns)
        dataset = dataset.map(
            _fill_template, with_indices=True, fn_kwargs={"template": args.prompt_template, "dataset_name": name}
        )
        return _check_rows(dataset, fields, name)
    column = args.prompt_column
    if column not in columns:
        raise ValueError(
            f"prompt_column={column!r}: {args.dataset_name!r} has no such column; it has {', '.join(columns)}. Set "
            "prompt_column to the column with the prompts, or write a prompt_template."
        )
    dataset = _rename(dataset, columns, column, "prompt")
    fields["prompt"] = f"prompt_column={column!r}"
    dataset = _read_json_messages(dataset, "prompt", column, name)
    dataset = _check_rows(dataset, fields, name)
    if isinstance(next(iter(dataset))["prompt"], str):
        logger.warning(
            "The prompts are strings, which the model reads without its chat template. For a chat model, turn them into "
            "user messages: prompt_template '{%s}'.",
            column,
        )
    return dataset


def _check_rows(dataset: "DatasetLike", fields: dict[str, str], dataset_name: str | None) -> "DatasetLike":
    """
    Check the prompts in the columns, row by row. The rows of a stream are checked when they are read.

    Args:
        fields: The user's name for each column, for error messages.
    """
    from datasets import Dataset

    kinds: dict[str, PromptKind] = {}

    def check(row: dict[str, Any], number: int) -> bool:
        for column, field_name in fields.items():
            # A row without its own teacher prompt gets the instruction
            if column == "prompt" or row[column] is not None:
                where = f"dataset_name={dataset_name!r}, row {number}: {field_name}"
                kinds[column] = check_prompt(row[column], where, kinds.get(column))
                if kinds[column] == "text" and _json_messages(row[column]) is not None:
                    raise ValueError(
                        f"{where} holds messages as JSON ({row[column][:80]!r}), and the rows before it hold text. Correct or "
                        "remove such rows."
                    )
        return True

    if not isinstance(dataset, Dataset):
        return dataset.filter(check, with_indices=True)
    for number, row in enumerate(_iterate(dataset, list(fields))):
        check(row, number)
    return dataset


def deduplicate(dataset: "Dataset") -> "Dataset":
    """Keep only the first row of each prompt; the order of the rows stays."""
    seen = set()
    kept = []
    for index, prompt in enumerate(row["prompt"] for row in _iterate(dataset, ["prompt"])):
        # 16 bytes instead of the text, because the raw DAPO-Math-17k has 1.8 million rows
        digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(index)
    logger.info("De-duplication by prompt: %d of %d rows kept.", len(kept), len(dataset))
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def split(dataset: "Dataset", train_fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """
    Split the rows at random into those to train on and those held out.

    Raises:
        ValueError: If one side would have no rows.
    """
    num_train = round(train_fraction * len(dataset))
    if not 0 < num_train < len(dataset):
        raise ValueError(
            f"dataset_train_fraction={train_fraction} of {len(dataset)} rows (after de-duplication) leaves one side "
            "of the split empty. Give more rows, or leave dataset_train_fraction unset."
        )
    logger.info("Split with seed %d: %d rows to train on, %d held out.", seed, num_train, len(dataset) - num_train)
    parts = dataset.train_test_split(train_size=num_train, test_size=len(dataset) - num_train, seed=seed)
    return parts["train"], parts["test"]


def _pick_split(splits: dict[str, "DatasetLike"], wanted: str, field_name: str, name: str) -> "DatasetLike":
    if wanted not in splits:
        raise ValueError(f"{field_name}={wanted!r}: {name!r} has no such split; it has {', '.join(splits)}.")
    return splits[wanted]


def _rename(dataset: "DatasetLike", columns: list[str], column: str, name: str) -> "DatasetLike":
    if column == name:
        return dataset
    return (dataset.remove_columns(name) if name in columns else dataset).rename_column(column, name)


def _json_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return the messages that a string contains as JSON, or `None` if the value is not such a string."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        messages = json.loads(value)
    except json.JSONDecodeError:
        return None
    fit = messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    return messages if fit else None


def _read_json_messages(dataset: "DatasetLike", name: str, column: str, dataset_name: str | None) -> "DatasetLike":
    first = next((row[name] for row in itertools.islice(dataset, 1000) if row[name] is not None), None)
    if _json_messages(first) is None:
        return dataset

    def read(row: dict[str, Any], number: int) -> dict[str, Any]:
        messages = _json_messages(row[name])
        if messages is None and not (row[name] is None and name == "teacher_prompt"):
            raise ValueError(
                f"dataset_name={dataset_name!r}: column {column!r} has messages as JSON in its first row, and in row {number} "
                f"{str(row[name])[:80]!r}. Correct or remove such rows."
            )
        return {name: messages}

    return dataset.map(read, with_indices=True)


def check_template(template: str, columns: list[str]) -> None:
    """Raise `ValueError` if a prompt_template is malformed, has no placeholder, or has a placeholder that is not a column."""
    doubled = "For a literal brace write it twice: {{ or }}."
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt_template={template!r} is not a valid template: {error}. {doubled}") from error
    if not names:
        raise ValueError(
            f"prompt_template={template!r} has no {{column}} placeholder, so all prompts would be the same. The "
            f"columns are {', '.join(columns)}."
        )
    for name in names:
        # In a placeholder with an index, such as {extra_info[problem]}, the part before the bracket is the column
        column = name.split("[")[0]
        if column not in columns:
            raise ValueError(
                f"prompt_template has the placeholder {{{name}}}, which is not a column; the columns are "
                f"{', '.join(columns)}. {doubled}"
            )


def _fill_template(row: dict[str, Any], number: int, template: str, dataset_name: str | None) -> dict[str, Any]:
    where = f"dataset_name={dataset_name!r}, row {number}: prompt_template:"
    said = False
    for _, name, _, _ in string.Formatter().parse(template):
        if name is None:
            continue
        value = row[name.split("[")[0]]
        if value is None:
            raise ValueError(f"{where} the row's column {name!r} is null. Remove such rows.")
        if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
            raise ValueError(
                f"{where} the column {name!r} holds messages, and a template would insert their Python representation. Set "
                "prompt_column to this column, without a template."
            )
        said = said or bool(str(value).strip())
    if not said:
        raise ValueError(
            f"{where} all columns of its placeholders are empty, so the row asks for nothing. Remove such rows."
        )
    return {"prompt": [{"role": "user", "content": template.format(**row)}]}


def _iterate(dataset: "Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in dataset.select_columns(columns).iter(1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
