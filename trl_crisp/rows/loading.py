"""Rows from the Hub, a local file, or a task of reasoning-gym."""

import contextlib
import difflib
import importlib.util
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from trl_crisp.rows.hub import exception_chain, raise_for_hub
from trl_crisp.rows.unreadable import find_unreadable_row, is_utf8

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from trl_crisp.rows.arguments import CRISPScriptArguments

    DatasetLike: TypeAlias = Dataset | IterableDataset

REASONING_GYM_PREFIX = "reasoning-gym:"
# File extension -> the builder of `datasets` that reads it
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Extensions of data files that cannot be read here. A name with one of these is a file's name, not a Hub id
_OTHER_FILE_EXTENSIONS = {".arrow", ".gz", ".pkl", ".tsv", ".txt", ".xlsx", ".yaml", ".yml", ".zip", ".zst"}


def load_splits(args: "CRISPScriptArguments") -> dict[str, "DatasetLike"]:
    """
    Return a dataset's splits by name. A local file or a reasoning-gym task has one split, named as in `dataset_train_split`.

    Raises:
        ValueError: If the task is unknown, or the file's extension or content cannot be read.
        FileNotFoundError, PermissionError, ConnectionError, ImportError: If the rows cannot be loaded.
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


def is_hub_id(dataset_name: str | None) -> bool:
    """Return whether a dataset's name is a Hub id, not a file or a reasoning-gym task."""
    if not dataset_name or dataset_name.startswith(REASONING_GYM_PREFIX):
        return False
    return not _looks_like_path(dataset_name) and not Path(dataset_name).exists()


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
        path: The path of an existing file.
        streaming: Read row by row.
        field_name: The user's name for the path, for error messages.

    Raises:
        ValueError: If the file cannot be read or has no rows.
    """
    from datasets import load_dataset

    builder = FILE_BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(
            f"{field_name}={str(path)!r}: files ending in {path.suffix or 'nothing'!r} cannot be read. Convert it to "
            f"one of {', '.join(FILE_BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{field_name}={str(path)!r} is an empty file. It needs at least one row.")
    # Checked here, because the reader accepts any bytes, and the row would fail only when it is used
    if path.suffix.lower() != ".parquet" and not is_utf8(path):
        raise _unreadable(path, field_name, "it is not UTF-8")
    with unreadable_rows_named(path, field_name):
        return load_dataset(builder, data_files=str(path), split="train", streaming=streaming)


@contextlib.contextmanager
def unreadable_rows_named(path: Path, field_name: str = "dataset_name") -> Iterator[None]:
    """
    Turn errors of reading a local file inside this context into errors that name the file, the row and the column.

    A stream reads its rows during training, so training on a stream belongs inside this context too.

    Args:
        path: The path of the file. If it is not a file, errors are not changed.
        field_name: The user's name for the path.

    Raises:
        ValueError: If a row cannot be read, or the file has no rows.
    """
    import datasets.packaged_modules

    readers = Path(datasets.packaged_modules.__file__).parent
    try:
        yield
    except Exception as error:
        # The file has only a header, or `[]`
        if "corresponds to no data" in str(error):
            raise ValueError(f"{field_name}={str(path)!r} has no rows. It needs at least one row.") from error
        frames = (frame for each in exception_chain(error) for frame, _ in traceback.walk_tb(each.__traceback__))
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
        # The configuration is missing or unknown. The library's message lists the existing ones
        raise ValueError(
            f"dataset_name={name!r}, dataset_config={config!r}: {error} Set dataset_config to choose a configuration."
        ) from error
    except Exception as error:
        raise_for_hub(error, "dataset", name, "dataset_name")
