"""Rows for training: load -> prompts -> de-duplicate -> split. One function an arrow.

A row ends up with `prompt`, a string or a list of messages, which is what [`~trl_crisp.CRISPTrainer`] takes; its other
columns stay (`teacher_prompt` among them).
"""

import contextlib
import difflib
import hashlib
import importlib.util
import itertools
import json
import logging
import re
import string
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from trl import ScriptArguments

from trl_crisp.prompts.checks import PromptKind, check_prompt
from trl_crisp.rows.unreadable import find_unreadable_row, is_utf8

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    DatasetLike: TypeAlias = Dataset | IterableDataset

logger = logging.getLogger(__name__)

REASONING_GYM_PREFIX = "reasoning-gym:"
# File extension -> the builder of `datasets` that reads it
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Extensions of data files that nothing here reads: with one of these a name is a file's, not a Hub id's
_OTHER_FILE_EXTENSIONS = {".arrow", ".gz", ".pkl", ".tsv", ".txt", ".xlsx", ".yaml", ".yml", ".zip", ".zst"}
_HTTP_PACKAGES = {"httpx", "httpx2", "requests", "urllib3", "aiohttp"}


@dataclass
class CRISPScriptArguments(ScriptArguments):
    """
    Arguments of the training script that say which rows to train on: TRL's, and those below.

    Parameters of TRL's whose meaning is wider here:
        dataset_name (`str`):
            A dataset on the Hub, a local .jsonl, .json, .parquet or .csv file, or `reasoning-gym:TASK`.
        dataset_test_split (`str`, defaults to `"test"`):
            The rows of evaluation during training (`eval_strategy`). Not used with `dataset_train_fraction`.

    Parameters that CRISP adds:
        prompt_column (`str`, defaults to `"prompt"`, TRL's name):
            The column with the prompts: strings, which the model reads as they are, or lists of messages, which go
            through its chat template. Strings that hold such a list as JSON are read as messages.
        teacher_prompt_column (`str`, *optional*):
            The column with the teacher's prompts, of the same type, which take the place of the instruction. The authors' prompt
            set has the student's as `sft_prompt` and the teacher's as `sd_prompt` (code: prepare_length_prune_data.py).
            A column named `teacher_prompt` is one without it.
        prompt_template (`str`, *optional*):
            Text with `{column}` placeholders that is filled in from each row and becomes a user message; braces that
            are meant literally are doubled. Takes the place of `prompt_column`.
        deduplicate_prompts (`bool`, defaults to `True`, as the paper's training set is):
            Keep the first row of each prompt.
        dataset_train_fraction (`float`, *optional*):
            Share of the rows to train on; the rest is held out for evaluation. The authors' code has 0.8. Unset, all
            rows are trained on.
        dataset_split_seed (`int`, defaults to `42`, as in the authors' code):
            Of that split.
        dataset_size (`int`, defaults to `1000`; ours, 31 steps of the paper's batch), dataset_seed (`int`, defaults to
        `42`; ours, the split's):
            Number of rows and seed of a reasoning-gym task, which makes its rows itself.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset on the Hub, a .jsonl, .json, .parquet or .csv file, or reasoning-gym:TASK."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "The column that holds the prompts: lists of messages, or strings, which the model reads without its chat "
            "template (prompt_template makes messages of them)."
        },
    )
    teacher_prompt_column: str | None = field(
        default=None,
        metadata={"help": "The column that holds the teacher's prompts, which take the place of the instruction."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Text with {column} placeholders, filled in from each row, that becomes a user message."},
    )
    deduplicate_prompts: bool = field(default=True, metadata={"help": "Keep the first row of each prompt."})
    dataset_train_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to train on; the rest is held out. All rows if unset."},
    )
    dataset_split_seed: int = field(default=42, metadata={"help": "Seed of the split by dataset_train_fraction."})
    dataset_size: int = field(default=1000, metadata={"help": "Number of rows that a reasoning-gym task makes."})
    dataset_seed: int = field(default=42, metadata={"help": "Seed of a reasoning-gym task."})

    def __post_init__(self) -> None:
        fraction = self.dataset_train_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(
                f"dataset_train_fraction={fraction} must be between 0 and 1, both excluded. Leave it unset to train "
                "on all rows."
            )
        if self.dataset_size < 1:
            raise ValueError(f"dataset_size={self.dataset_size} must be at least 1.")
        if self.prompt_template is not None and self.prompt_column != "prompt":
            warnings.warn(
                f"prompt_column={self.prompt_column!r} has no effect with a prompt_template, which names its columns.",
                stacklevel=3,
            )


def load_prompts(args: CRISPScriptArguments, evaluation: bool = False) -> tuple["DatasetLike", "DatasetLike | None"]:
    """
    Return the rows to train on and, where asked for, the rows to evaluate on.

    Args:
        args: Which rows, and how they become prompts.
        evaluation: Whether evaluation rows are needed (`eval_strategy` is not `"no"`).

    Raises:
        ValueError: For arguments that do not fit the rows there are, or each other.
        FileNotFoundError, PermissionError, ConnectionError, ImportError: Where the rows cannot be had.
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
    # Of a stream the first rows are read here
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
            f"{', '.join(splits)}). Set dataset_train_fraction, such as 0.8, to hold some out, name a split with "
            "dataset_test_split, or set eval_strategy to 'no'."
        )
    return train, to_prompts(splits[args.dataset_test_split], args)


def load_splits(args: CRISPScriptArguments) -> dict[str, "DatasetLike"]:
    """
    Return a dataset's splits by name. Local files and reasoning-gym tasks have one, named as `dataset_train_split`.

    Raises:
        ValueError: For a task, extension or content that cannot be read.
        FileNotFoundError, PermissionError, ConnectionError, ImportError: Where the rows cannot be had.
    """
    name = args.dataset_name
    assert name is not None
    if name.startswith(REASONING_GYM_PREFIX):
        rows = _load_reasoning_gym(name.removeprefix(REASONING_GYM_PREFIX), args.dataset_size, args.dataset_seed)
        return {args.dataset_train_split: rows.to_iterable_dataset() if args.dataset_streaming else rows}
    path = Path(name).expanduser()
    if path.is_file():
        return {args.dataset_train_split: load_file(path, args.dataset_streaming)}
    if not path.is_dir() and _looks_like_path(name):
        raise FileNotFoundError(
            f"dataset_name={name!r}: there is no such file (looked for {path.absolute()}). Check the path; a dataset "
            "on the Hub is named OWNER/NAME."
        )
    return _load_hub(str(path) if path.is_dir() else name, args.dataset_config, args.dataset_streaming)


def to_prompts(dataset: "DatasetLike", args: CRISPScriptArguments) -> "DatasetLike":
    """
    Give each row its `prompt`: the template filled in, or the column renamed.

    All rows are checked here, before de-duplication and the split give them other numbers; those of a stream as they are read.

    Raises:
        ValueError: For a column that there is not, no rows, or a row that holds no prompt, named by its number and column.
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
        # The column has another name now
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
            f"prompt_column={column!r}: {args.dataset_name!r} has no such column; it has {', '.join(columns)}. Name "
            "the one with the prompts as prompt_column, or write a prompt_template."
        )
    dataset = _rename(dataset, columns, column, "prompt")
    fields["prompt"] = f"prompt_column={column!r}"
    dataset = _read_json_messages(dataset, "prompt", column, name)
    dataset = _check_rows(dataset, fields, name)
    if isinstance(next(iter(dataset))["prompt"], str):
        logger.warning(
            "The prompts are strings, which the model reads without its chat template. For a chat model make them "
            "user messages: prompt_template '{%s}'.",
            column,
        )
    return dataset


def _check_rows(dataset: "DatasetLike", fields: dict[str, str], dataset_name: str | None) -> "DatasetLike":
    """
    Check the columns' prompts row by row, those of a stream as they are read.

    Args:
        fields: What the user calls each column, for the messages.
    """
    from datasets import Dataset

    kinds: dict[str, PromptKind] = {}

    def check(row: dict[str, Any], number: int) -> bool:
        for column, field_name in fields.items():
            # A row without a teacher's prompt of its own has the instruction
            if column == "prompt" or row[column] is not None:
                where = f"dataset_name={dataset_name!r}, row {number}: {field_name}"
                kinds[column] = check_prompt(row[column], where, kinds.get(column))
                if kinds[column] == "text" and _json_messages(row[column]) is not None:
                    raise ValueError(
                        f"{where} holds messages as JSON ({row[column][:80]!r}), and the rows before it text. Mend or remove "
                        "such rows."
                    )
        return True

    if not isinstance(dataset, Dataset):
        return dataset.filter(check, with_indices=True)
    for number, row in enumerate(_iterate(dataset, list(fields))):
        check(row, number)
    return dataset


def deduplicate(dataset: "Dataset") -> "Dataset":
    """Keep the first row of each prompt, in the order of the rows."""
    seen = set()
    kept = []
    for index, prompt in enumerate(row["prompt"] for row in _iterate(dataset, ["prompt"])):
        # 16 bytes instead of the text: the raw DAPO-Math-17k has 1.8 million rows
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
        ValueError: Where one side would have no row.
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


def is_hub_id(dataset_name: str | None) -> bool:
    """Tell whether a dataset's name is one on the Hub, and not a file or a reasoning-gym task."""
    if not dataset_name or dataset_name.startswith(REASONING_GYM_PREFIX):
        return False
    return not _looks_like_path(dataset_name) and not Path(dataset_name).exists()


def raise_for_hub(error: Exception, kind: str, name: str, field_name: str) -> NoReturn:
    """
    Raise what a failed download means for the user, or `error` itself where nothing better is known.

    Args:
        error: As `datasets`, `transformers` or `huggingface_hub` raised it.
        kind: "dataset" or "model".
        name: Its id.
        field_name: The argument that gave the id.

    Raises:
        PermissionError: The repository is gated and access was not granted.
        FileNotFoundError: There is no such repository or revision, or it is private.
        ConnectionError: The Hub was not reached and the cache does not have it.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_exception_chain(error))
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    local = "file" if kind == "dataset" else "directory that holds the model"
    subject = f"{field_name}={name!r}"

    def any_is(*types: type[BaseException]) -> bool:
        return any(isinstance(e, types) for e in chain)

    if any_is(GatedRepoError) or any(re.search(r"\bgated\b", str(e)) for e in chain):
        raise PermissionError(
            f"{subject}: the {kind} is gated. Ask for access at {page}, log in with `hf auth login` (or set "
            f"HF_TOKEN), and start again; or give a local {local}."
        ) from error
    if any_is(RevisionNotFoundError):
        raise FileNotFoundError(f"{subject}: the {kind} has no such revision. See the revisions at {page}.") from error
    if any_is(RepositoryNotFoundError, DatasetNotFoundError):
        raise FileNotFoundError(
            f"{subject}: the Hub has no such {kind}, or it is private. Check the id; for a private {kind} log in with "
            f"`hf auth login` (or set HF_TOKEN); or give a local {local}."
        ) from error
    if any_is(ConnectionError, LocalEntryNotFoundError) or any(
        type(e).__module__.split(".")[0] in _HTTP_PACKAGES and getattr(e, "response", None) is None for e in chain
    ):
        import huggingface_hub.constants

        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub was not reached (no network?)"
        way_out = "Unset it" if offline else "Connect to the network (behind a proxy set HTTPS_PROXY)"
        raise ConnectionError(
            f"{subject}: {reason} and the local cache does not have the {kind}. {way_out}, or give a local {local}. "
            "Without a network: download it elsewhere with `hf download "
            f"{'--repo-type dataset ' * (kind == 'dataset')}{name}` and copy it here."
        ) from error
    raise error


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _looks_like_path(name: str) -> bool:
    extension = Path(name).suffix.lower()
    return (
        extension in FILE_BUILDERS
        or extension in _OTHER_FILE_EXTENSIONS
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
    )


def _load_reasoning_gym(task: str, size: int, seed: int) -> "Dataset":
    from datasets import Dataset

    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(
            f"dataset_name={REASONING_GYM_PREFIX + task!r} needs the package reasoning-gym. Install it with `pip "
            "install reasoning-gym`."
        )
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.5)
        hint = f"Close names: {', '.join(close)}." if close else f"The tasks are {', '.join(sorted(DATASETS))}."
        raise ValueError(f"dataset_name={REASONING_GYM_PREFIX + task!r}: reasoning-gym has no task {task!r}. {hint}")
    rows = reasoning_gym.create_dataset(task, size=size, seed=seed)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "question": row["question"],
                "answer": str(row["answer"]),
            }
            for row in rows
        ]
    )


def load_file(path: Path, streaming: bool, field_name: str = "dataset_name") -> "DatasetLike":
    """
    Read the rows of a local file.

    Args:
        path: Of a file that is there.
        streaming: Row by row.
        field_name: What the user calls it, for the messages.

    Raises:
        ValueError: For a file that cannot be read, or without a row.
    """
    from datasets import load_dataset

    builder = FILE_BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(
            f"{field_name}={str(path)!r}: files ending in {path.suffix or 'nothing'!r} are not read. Convert it to "
            f"one of {', '.join(FILE_BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{field_name}={str(path)!r} is an empty file. It needs at least one row.")
    # The reader takes any bytes, and the row fails once it is used
    if path.suffix.lower() != ".parquet" and not is_utf8(path):
        raise _unreadable(path, field_name, "it is not UTF-8")
    with unreadable_rows_named(path, field_name):
        return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)


@contextlib.contextmanager
def unreadable_rows_named(path: Path, field_name: str = "dataset_name") -> Iterator[None]:
    """
    Let what reads a local file inside this context raise an error that names file, row and column.

    A stream reads its rows late, so a training on one belongs in it too.

    Args:
        path: Of the file; a path that is none leaves all errors as they are.
        field_name: What the user calls it.

    Raises:
        ValueError: For rows that cannot be read, and for a file without a row.
    """
    import datasets.packaged_modules

    readers = Path(datasets.packaged_modules.__file__).parent
    try:
        yield
    except Exception as error:
        # A file with a header, or `[]`, and no row
        if "corresponds to no data" in str(error):
            raise ValueError(f"{field_name}={str(path)!r} has no rows. It needs at least one row.") from error
        frames = (frame for each in _exception_chain(error) for frame, _ in traceback.walk_tb(each.__traceback__))
        if not path.is_file() or not any(readers in Path(frame.f_code.co_filename).parents for frame in frames):
            raise
        raise _unreadable(path, field_name, error.__cause__ or error) from error


def _unreadable(path: Path, field_name: str, reason: object) -> ValueError:
    found = find_unreadable_row(path) if path.suffix.lower() != ".parquet" else None
    return ValueError(
        f"{field_name}={str(path)!r} cannot be read as {path.suffix}: {found or reason}. Check the file's content."
    )


def _load_hub(name: str, config: str | None, streaming: bool) -> dict[str, "DatasetLike"]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(name, name=config, streaming=streaming))
    except ValueError as error:
        # A configuration that is missing or unknown: the message lists those there are
        raise ValueError(
            f"dataset_name={name!r}, dataset_config={config!r}: {error} Set dataset_config to choose a configuration."
        ) from error
    except Exception as error:
        raise_for_hub(error, "dataset", name, "dataset_name")


def _pick_split(splits: dict[str, "DatasetLike"], wanted: str, field_name: str, name: str) -> "DatasetLike":
    if wanted not in splits:
        raise ValueError(f"{field_name}={wanted!r}: {name!r} has no such split; it has {', '.join(splits)}.")
    return splits[wanted]


def _rename(dataset: "DatasetLike", columns: list[str], column: str, name: str) -> "DatasetLike":
    if column == name:
        return dataset
    return (dataset.remove_columns(name) if name in columns else dataset).rename_column(column, name)


def _json_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return the messages that a string holds as JSON, or `None` where it is a prompt of its own."""
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
                f"{str(row[name])[:80]!r}. Mend or remove such rows."
            )
        return {name: messages}

    return dataset.map(read, with_indices=True)


def check_template(template: str, columns: list[str]) -> None:
    """Raise `ValueError` for a prompt_template that is none, has no placeholder, or one that is no column."""
    doubled = "Braces that are meant literally are doubled: {{ and }}."
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt_template={template!r} is no template: {error}. {doubled}") from error
    if not names:
        raise ValueError(
            f"prompt_template={template!r} has no {{column}} placeholder, so all prompts would be the same. The "
            f"columns are {', '.join(columns)}."
        )
    for name in names:
        # What stands before an index, as in {extra_info[problem]}, is the column
        column = name.split("[")[0]
        if column not in columns:
            raise ValueError(
                f"prompt_template has the placeholder {{{name}}}, which is no column; the columns are "
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
            raise ValueError(f"{where} the row has nothing in its column {name!r}. Remove such rows.")
        if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
            raise ValueError(
                f"{where} the column {name!r} holds messages, which would go into the text as Python writes them. Give the "
                "column as prompt_column, without a template."
            )
        said = said or bool(str(value).strip())
    if not said:
        raise ValueError(
            f"{where} all columns that it names are empty, so the row asks for nothing. Remove such rows."
        )
    return {"prompt": [{"role": "user", "content": template.format(**row)}]}


def _iterate(dataset: "Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in dataset.select_columns(columns).iter(1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
