"""Adds the teacher's prompt to each row of a dataset, and checks both prompts before the first step."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import generate_random_fingerprint
from jinja2 import TemplateError

from trl_crisp.prompts.checks import PromptKind, check_prompt
from trl_crisp.prompts.instructions import Prompt, build_teacher_prompt

_CHECK_BATCH_ROWS = 256
# A temporary column of a stream, from the map to the filter: whether the row's prompts are short enough
_FITS = "_crisp_fits"
# A template that adds a list of blocks to a text raises Python's own
_TEMPLATE_ERRORS = (TemplateError, TypeError)
_STUDENT_REFUSED = (
    "column 'prompt': the chat template refuses the prompt: {error}. Many templates take no system message, or 'content' as a "
    "string only. Correct or remove such rows."
)
# The template accepted the student's prompt before, so the cause is what only the teacher's prompt contains
_TEACHER_REFUSED = (
    "the chat template takes the student's prompt and refuses the teacher's: {error}. A template without a system role needs "
    "instruction_role='user'; a `teacher_prompt` needs roles that the template knows."
)


@dataclass
class PromptReport:
    """Findings of the check of a dataset's rows."""

    rows: int = 0
    dropped: int = 0
    replaced: int = 0
    given: int = 0
    longest_tokens: int = 0
    # The kind of the first row's prompt; all rows must have it
    kind: PromptKind | None = None

    def describe(self, max_prompt_tokens: int | None) -> str:
        """Return the findings in two sentences."""
        if not self.rows:
            return "the prompts of the stream are checked when they are read."
        beside = self.rows - self.replaced - self.given
        own = f" {self.given} of them have their own teacher prompt." if self.given else ""
        placed = f" In {self.replaced} of them the teacher's instruction replaces the student's own, in {beside} it is added to the prompt."
        return (
            f"{self.rows - self.dropped} of {self.rows} rows kept; {self.dropped} dropped for a prompt of more than "
            f"{max_prompt_tokens} tokens (the longest has {self.longest_tokens}).{own}"
            + (placed if beside or self.replaced else "")
        )


class PromptPairs:
    """
    Builds the teacher's prompt of each row, and checks that both prompts differ and open the model's turn in the same way.

    Args:
        instruction: The instruction's text; `""` gives both models the same prompt.
        replaces: The student's own instruction, see [`~trl_crisp.prompts.instructions.build_teacher_prompt`].
        role: Where the instruction goes.
        tokenize: Turns a list of prompts into a list of token id lists, with the generation prompt. This is the trainer's
            function, so that both prompts get the same chat-template flags and tools.
        max_prompt_tokens: Rows with a longer student or teacher prompt are dropped. `None` keeps all rows.
    """

    def __init__(
        self,
        instruction: str,
        replaces: str | None,
        role: Literal["user", "system"],
        tokenize: Callable[[list[Prompt]], list[list[int]]],
        max_prompt_tokens: int | None,
    ) -> None:
        self.instruction = instruction
        self.replaces = replaces
        self.role = role
        self.tokenize = tokenize
        self.max_prompt_tokens = max_prompt_tokens
        # For a dataset on disk, the rows with both prompts are written here; the directory is removed with this object
        self._files = tempfile.TemporaryDirectory(prefix="trl-crisp-")

    def teacher_prompt(self, row: dict[str, Any]) -> tuple[Prompt, bool]:
        """
        Return a row's teacher prompt, and whether the student's own instruction was removed from it.

        If the row has a `teacher_prompt`, it is used instead of the instruction.

        Raises:
            ValueError: If the `teacher_prompt` is not of the prompt's type, or no message can take the instruction.
        """
        given = row.get("teacher_prompt")
        if given is None:
            return build_teacher_prompt(row["prompt"], self.instruction, self.replaces, self.role)
        if isinstance(given, str) != isinstance(row["prompt"], str):
            raise ValueError(
                f"`teacher_prompt` is a {type(given).__name__} and `prompt` a {type(row['prompt']).__name__}; both must be "
                "strings, or both lists of messages, so that the same chat template applies."
            )
        return given, False

    def select(
        self, dataset: Dataset | IterableDataset, generation_prompt_tokens: int, name: str = "train"
    ) -> tuple[Dataset | IterableDataset, PromptReport]:
        """
        Give each row its teacher prompt, check both prompts, and drop the rows with a prompt that is too long.

        Args:
            dataset: Rows with `prompt` and optionally `teacher_prompt`. A stream is read later, row by row.
            generation_prompt_tokens: How many tokens at the end of each prompt open the model's turn. They must be the same in
                both prompts.
            name: The dataset's name in messages.

        Returns:
            The rows to train on, with `teacher_prompt` and its token ids as `teacher_prompt_ids`; and the report. The report of a
            stream is complete when the stream has been read.

        Raises:
            ValueError: If a row's prompts are invalid (the message gives its number), or if no row is left.
        """
        report = PromptReport()
        if isinstance(dataset, IterableDataset):
            # The report counts the rows from 0, as in a Dataset, because a stream's own index counts within a shard
            return self._select_stream(dataset, generation_prompt_tokens, report), report

        kept: list[int] = []

        def pair(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            rows = [{key: values[i] for key, values in columns.items()} for i in range(len(numbers))]
            added, fits = self.pair_rows(rows, numbers[0], generation_prompt_tokens, report)
            kept.extend(number for number, fit in zip(numbers, fits, strict=True) if fit)
            return added

        if dataset.format["type"] == "custom":
            # The transform is applied once, here. If it ran again on access, a prompt could differ from the one that its teacher
            # prompt was built from
            dataset = Dataset.from_list(list(dataset))
        paired = dataset.map(
            pair,
            batched=True,
            batch_size=_CHECK_BATCH_ROWS,
            with_indices=True,
            features=_with_pair(dataset.features),
            # The cache is not used, because the prompts also depend on the tokenizer and its template
            load_from_cache_file=False,
            new_fingerprint=generate_random_fingerprint(),
            keep_in_memory=not dataset.cache_files,
            cache_file_name=str(Path(self._files.name, f"{name}.arrow")) if dataset.cache_files else None,
            desc=f"Pairing {name} prompts",
        )
        if not kept:
            raise ValueError(
                f"the {name} dataset has no row left: all {report.rows} have a prompt longer than max_prompt_length="
                f"{self.max_prompt_tokens} tokens (the longest has {report.longest_tokens}, measured on both sides). Set "
                "max_prompt_length higher, or to None to keep all."
                if report.rows
                else f"the {name} dataset is empty. Check its split and filters."
            )
        return (paired.select(kept) if report.dropped else paired), report

    def _select_stream(
        self, dataset: IterableDataset, generation_prompt_tokens: int, report: PromptReport
    ) -> IterableDataset:
        def pair(row: dict[str, Any]) -> dict[str, Any]:
            added, [fit] = self.pair_rows([row], report.rows, generation_prompt_tokens, report)
            return {**{column: values[0] for column, values in added.items()}, _FITS: fit}

        features = None if dataset.features is None else _with_pair(dataset.features)
        if features is not None:
            features[_FITS] = Value("bool")
        paired = dataset.map(pair, features=features)
        return paired.filter(lambda fits: fits, input_columns=_FITS).remove_columns(_FITS)

    def pair_rows(
        self, rows: list[dict[str, Any]], first_row: int, generation_prompt_tokens: int, report: PromptReport
    ) -> tuple[dict[str, list[Any]], list[bool]]:
        """
        Give consecutive rows their teacher prompts, and check both prompts, as [`select`] does.

        Args:
            rows: The rows, with `prompt` and optionally `teacher_prompt`.
            first_row: The number of the first of them.
            generation_prompt_tokens: See [`select`].
            report: It counts the rows.

        Returns:
            The columns `teacher_prompt` and `teacher_prompt_ids`, and whether both prompts of each row are short enough.

        Raises:
            ValueError: If a row's prompts are invalid; the message has its number.
        """
        pairs = []
        for i, row in enumerate(rows):
            report.kind = check_row(row, first_row + i, report.kind)
            try:
                pairs.append(self.teacher_prompt(row))
            except ValueError as error:
                raise ValueError(f"row {first_row + i}: {error}") from error
        students_ids = self.tokenize_students([row["prompt"] for row in rows], first_row)
        teachers_ids = self._tokenize_named([prompt for prompt, _ in pairs], first_row, _TEACHER_REFUSED)
        fits = []
        for i, (student_ids, teacher_ids) in enumerate(zip(students_ids, teachers_ids, strict=True)):
            is_told = bool(self.instruction) or rows[i].get("teacher_prompt") is not None
            _check_pair(student_ids, teacher_ids, is_told, generation_prompt_tokens, first_row + i)
            longest = max(len(student_ids), len(teacher_ids))
            report.longest_tokens = max(report.longest_tokens, longest)
            fits.append(self.max_prompt_tokens is None or longest <= self.max_prompt_tokens)
        report.rows += len(rows)
        report.dropped += fits.count(False)
        report.replaced += sum(replaced for _, replaced in pairs)
        report.given += sum(row.get("teacher_prompt") is not None for row in rows)
        return {"teacher_prompt": [prompt for prompt, _ in pairs], "teacher_prompt_ids": teachers_ids}, fits

    def tokenize_students(self, prompts: list[Prompt], first_row: int) -> list[list[int]]:
        """
        Return the token ids of students' prompts.

        Args:
            prompts: The prompts of consecutive rows.
            first_row: The number of the first of them.

        Raises:
            ValueError: For a prompt that the chat template refuses, named by its row.
        """
        return self._tokenize_named(prompts, first_row, _STUDENT_REFUSED)

    def count_turn_tokens(self, prompt: Prompt, tokenize_without_turn: Callable[[Prompt], list[int]]) -> int:
        """
        Return how many tokens at the end of each prompt open the model's turn.

        Args:
            prompt: The first row's. A string has none.
            tokenize_without_turn: As `tokenize`, for one prompt, without the generation prompt.
        """
        if isinstance(prompt, str):
            return 0
        [with_turn] = self.tokenize_students([prompt], 0)
        without = tokenize_without_turn(prompt)
        return len(with_turn) - len(without) if with_turn[: len(without)] == without else 0

    def _tokenize_named(self, prompts: list[Prompt], first_row: int, refusal: str) -> list[list[int]]:
        try:
            return self.tokenize(prompts)
        except _TEMPLATE_ERRORS:
            for i, prompt in enumerate(prompts):
                try:
                    self.tokenize([prompt])
                except _TEMPLATE_ERRORS as error:
                    raise ValueError(f"row {first_row + i}: {refusal.format(error=error)}") from error
            raise


def check_columns(dataset: Dataset | IterableDataset, name: str = "train") -> None:
    """
    Check a dataset's columns before the model is loaded.

    Raises:
        ValueError: If it is no dataset, there is no `prompt` column, or there is a column of images, which the teacher's prompt cannot
            contain.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"the {name} dataset is a {type(dataset).__name__}, and has to be a datasets.Dataset or IterableDataset. Make one of "
            "a list of rows by `Dataset.from_list(rows)`, and take one split of a DatasetDict."
        )
    columns = dataset.column_names
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"the {name} dataset has no column 'prompt'; it has {', '.join(columns) or 'none'}. Rename the column that "
            "holds the prompts, such as `dataset.rename_column('question', 'prompt')`."
        )
    if images := [column for column in ("image", "images") if column in columns]:
        raise ValueError(
            f"the {name} dataset has the column {images[0]!r}: vision inputs are not supported, because the teacher's "
            "prompt would need its own image tokens and nobody has tried that. Remove the column to train on text."
        )


def check_row(row: dict[str, Any], number: int, kind: PromptKind | None = None) -> PromptKind:
    """
    Check the form of a row's prompts; see [`~trl_crisp.prompts.checks.check_prompt`].

    Args:
        row: A row with `prompt`, and optionally `teacher_prompt`.
        number: The row's number, counted from 0.
        kind: The kind of the prompts before it. If `None`, any kind is accepted.

    Returns:
        The kind of this row's prompt.

    Raises:
        ValueError: If a prompt is invalid; the message names the row and the column.
    """
    kind = check_prompt(row.get("prompt"), f"row {number}: column 'prompt'", kind)
    if row.get("teacher_prompt") is not None:
        check_prompt(row["teacher_prompt"], f"row {number}: column 'teacher_prompt'")
    return kind


def _check_pair(
    student_ids: list[int], teacher_ids: list[int], is_told: bool, generation_prompt_tokens: int, number: int
) -> None:
    if is_told and student_ids == teacher_ids:
        raise ValueError(
            f"row {number}: the teacher's prompt equals the student's, so there is nothing to learn from it. Check that "
            "`teacher_prompt` differs from `prompt`, and that the chat template renders the message with the instruction "
            "(instruction_role). To give both models the same prompt, set instruction='' and drop the column."
        )
    if (n := generation_prompt_tokens) and student_ids[-n:] != teacher_ids[-n:]:
        raise ValueError(
            f"row {number}: student's and teacher's prompts end in different tokens ({student_ids[-n:]} and {teacher_ids[-n:]}), "
            "so the completion would not begin at the same point. Both prompts must end in the same message, with the same "
            "chat_template_kwargs (such as enable_thinking)."
        )
    if not student_ids or not teacher_ids:
        side = "teacher_prompt" if student_ids else "prompt"
        raise ValueError(
            f"row {number}: the prompt in column {side!r} has no tokens, so there is nothing to answer. Remove such rows."
        )


def _with_pair(features: Features) -> Features:
    teacher_prompt = features.get("teacher_prompt", features["prompt"])
    return Features({**features, "teacher_prompt": teacher_prompt, "teacher_prompt_ids": List(Value("int64"))})
