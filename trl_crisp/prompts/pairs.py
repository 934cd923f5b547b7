"""From a dataset's rows to pairs of student's and teacher's prompts, checked before the first step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from tqdm.auto import tqdm

from trl_crisp.prompts.checks import PromptKind, check_prompt
from trl_crisp.prompts.instructions import Prompt, build_teacher_prompt

_CHECK_BATCH_ROWS = 256


@dataclass
class PromptReport:
    """What the check of a dataset's rows found."""

    rows: int = 0
    dropped: int = 0
    replaced: int = 0
    given: int = 0
    longest_tokens: int = 0
    # Of the first row, and so of all
    kind: PromptKind | None = None

    def describe(self, max_prompt_tokens: int | None) -> str:
        """Return the findings in two sentences."""
        if not self.rows:
            return "the prompts of the stream are checked as they are read."
        beside = self.rows - self.replaced - self.given
        own = f" In {self.given} of them the teacher has a prompt of its own." if self.given else ""
        placed = (
            f" In {self.replaced} of them the teacher's instruction stands in the place of the student's own, in {beside} beside the "
            "prompt."
        )
        return (
            f"{self.rows - self.dropped} of {self.rows} rows kept; {self.dropped} dropped for a prompt of more than "
            f"{max_prompt_tokens} tokens (the longest has {self.longest_tokens}).{own}"
            + (placed if beside or self.replaced else "")
        )


class PromptPairs:
    """
    Builds both prompts of a row, and checks that they differ in the instruction alone.

    Args:
        instruction: The instruction's text; `""` for the same prompt on both sides.
        replaces: The student's own instruction, see [`~trl_crisp.prompts.instructions.build_teacher_prompt`].
        role: Where the instruction goes.
        tokenize: Turns a list of prompts into a list of token id lists, with the generation prompt; the trainer's, so
            that chat-template flags and tools are the same on both sides.
        max_prompt_tokens: Rows with a longer prompt on either side are dropped. `None` keeps all.
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

    def teacher_prompt(self, row: dict[str, Any]) -> tuple[Prompt, bool]:
        """
        Return a row's teacher prompt, and whether the student's own instruction was taken out of it.

        A `teacher_prompt` in the row wins over the instruction.

        Raises:
            ValueError: Where the `teacher_prompt` is not of the prompt's type, or there is no place for the instruction.
        """
        given = row.get("teacher_prompt")
        if given is None:
            return build_teacher_prompt(row["prompt"], self.instruction, self.replaces, self.role)
        if isinstance(given, str) != isinstance(row["prompt"], str):
            raise ValueError(
                f"`teacher_prompt` is a {type(given).__name__} and `prompt` a {type(row['prompt']).__name__}; both have to "
                "be strings, or both lists of messages, so that the same chat template applies."
            )
        return given, False

    def tokenize_teacher(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Return the token ids of the rows' teacher prompts, never truncated."""
        return self.tokenize([self.teacher_prompt(row)[0] for row in rows])

    def select(
        self, dataset: Dataset | IterableDataset, generation_prompt_tokens: int, name: str = "train"
    ) -> tuple[Dataset | IterableDataset, PromptReport]:
        """
        Check the rows and drop those with a prompt that is too long.

        Args:
            dataset: Rows with `prompt` and optionally `teacher_prompt`. A stream is checked as it is read.
            generation_prompt_tokens: How many tokens at the end of each prompt open the model's turn; they have to be
                the same on both sides.
            name: What to call the dataset in messages.

        Returns:
            The rows to train on, and what was found (for a stream it fills while that is read).

        Raises:
            ValueError: For a row whose prompts break the rules, named by its number; where no row is left.
        """
        report = PromptReport()
        if isinstance(dataset, IterableDataset):
            # Counted from 0 like the rows of a Dataset; a stream's own index is that of its shard
            return dataset.filter(
                lambda row: self._check([row], report.rows, generation_prompt_tokens, report)[0]
            ), report

        kept = []
        with tqdm(total=len(dataset), desc=f"Checking {name} prompts", unit="row", disable=len(dataset) < 2000) as bar:
            for start, rows in _batches(dataset):
                fits = self._check(rows, start, generation_prompt_tokens, report)
                kept += [start + i for i, fit in enumerate(fits) if fit]
                bar.update(len(rows))
        if not kept:
            raise ValueError(
                f"the {name} dataset has no row left: all {report.rows} have a prompt longer than max_prompt_length="
                f"{self.max_prompt_tokens} tokens (the longest has {report.longest_tokens}, measured on both sides). Set "
                "max_prompt_length higher, or to None to keep all."
                if report.rows
                else f"the {name} dataset is empty. Check its split and filters."
            )
        return (dataset.select(kept) if report.dropped else dataset), report

    def _check(
        self, rows: list[dict[str, Any]], first_row: int, generation_prompt_tokens: int, report: PromptReport
    ) -> list[bool]:
        pairs = []
        for i, row in enumerate(rows):
            report.kind = check_row(row, first_row + i, report.kind)
            try:
                pairs.append(self.teacher_prompt(row))
            except ValueError as error:
                raise ValueError(f"row {first_row + i}: {error}") from error
        students_ids = self.tokenize([row["prompt"] for row in rows])
        teachers_ids = self._tokenize_teachers([prompt for prompt, _ in pairs], first_row)
        fits = []
        for i, (student_ids, teacher_ids) in enumerate(zip(students_ids, teachers_ids, strict=True)):
            if (self.instruction or rows[i].get("teacher_prompt") is not None) and student_ids == teacher_ids:
                raise ValueError(
                    f"row {first_row + i}: the teacher's prompt equals the student's, so there is nothing to learn from "
                    "it. Check that `teacher_prompt` differs from `prompt`, and that the chat template renders the "
                    "message the instruction goes into (instruction_role). For the same prompt on both sides set "
                    "instruction='' and drop the column."
                )
            if (n := generation_prompt_tokens) and student_ids[-n:] != teacher_ids[-n:]:
                raise ValueError(
                    f"row {first_row + i}: student's and teacher's prompts end in different tokens ({student_ids[-n:]} and "
                    f"{teacher_ids[-n:]}), so the completion would not begin at the same point. Let both end in the same "
                    "message, with the same chat_template_kwargs (such as enable_thinking)."
                )
            if not student_ids or not teacher_ids:
                side = "teacher_prompt" if student_ids else "prompt"
                raise ValueError(
                    f"row {first_row + i}: column {side!r} gives no token at all, so there is nothing to answer. Remove such rows."
                )
            longest = max(len(student_ids), len(teacher_ids))
            report.longest_tokens = max(report.longest_tokens, longest)
            fits.append(self.max_prompt_tokens is None or longest <= self.max_prompt_tokens)
        report.rows += len(rows)
        report.dropped += fits.count(False)
        report.replaced += sum(replaced for _, replaced in pairs)
        report.given += sum(row.get("teacher_prompt") is not None for row in rows)
        return fits

    def _tokenize_teachers(self, prompts: list[Prompt], first_row: int) -> list[list[int]]:
        try:
            return self.tokenize(prompts)
        except TemplateError:
            for i, prompt in enumerate(prompts):
                try:
                    self.tokenize([prompt])
                except TemplateError as error:
                    # The template took the student's prompt, so what it refuses is what the teacher's has beside it
                    raise ValueError(
                        f"row {first_row + i}: the chat template takes the student's prompt and refuses the teacher's: "
                        f"{error}. A template without a system role needs instruction_role='user'; a `teacher_prompt` "
                        "needs roles that the template knows."
                    ) from error
            raise


def check_columns(dataset: Dataset | IterableDataset, name: str = "train") -> None:
    """
    Check a dataset's columns before anything heavy is loaded.

    Raises:
        ValueError: Without a `prompt` column, and for images, which the teacher's prompt cannot carry.
    """
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
        row: With `prompt`, and optionally `teacher_prompt`.
        number: Of the row, counted from 0.
        kind: What the prompts before it are; any if `None`.

    Returns:
        What this row's prompt is.

    Raises:
        ValueError: For prompts that cannot be asked; the row and the column are named.
    """
    kind = check_prompt(row.get("prompt"), f"row {number}: column 'prompt'", kind)
    if row.get("teacher_prompt") is not None:
        check_prompt(row["teacher_prompt"], f"row {number}: column 'teacher_prompt'")
    return kind


def _batches(dataset: Dataset) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for start in range(0, len(dataset), _CHECK_BATCH_ROWS):
        columns = dataset[start : start + _CHECK_BATCH_ROWS]
        size = len(columns["prompt"])
        yield start, [{key: columns[key][i] for key in columns} for i in range(size)]
