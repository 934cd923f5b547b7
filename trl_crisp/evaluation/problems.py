"""Benchmarks in one form: each problem has a prompt, the right answer, how it is graded, and a difficulty if there is one."""

import difflib
import hashlib
import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.golds import gold_of, kind_of_file
from trl_crisp.evaluation.grading import Kind
from trl_crisp.evaluation.notation import read_gold
from trl_crisp.prompts.checks import check_prompt
from trl_crisp.prompts.instructions import Prompt
from trl_crisp.rows.hub import raise_for_hub
from trl_crisp.rows.loading import FILE_BUILDERS, load_file
from trl_crisp.rows.prompts import check_template

# DAPO's wording; the paper trains and evaluates with it (Figure 2)
MATH_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own line "
    'after "Answer:".'
)
# Ours: the paper grades letters but does not print the prompt. The form is that of the one above.
CHOICE_TEMPLATE = (
    "Answer the following multiple choice question. The last line of your response should be of the form Answer: $Letter "
    "(without quotes) where $Letter is the letter of the right choice.\n\n{problem}\n\n{choices}\n\nRemember to put your answer on "
    'its own line after "Answer:".'
)
# For a user's file: its questions include their choices, and facts are asked without more words
OWN_TEMPLATES: dict[Kind, str] = {
    "math": MATH_TEMPLATE,
    "choice": CHOICE_TEMPLATE.replace("\n\n{choices}", ""),
    "text": "{problem}",
}
# Ours: the seed of the order of GPQA's choices, which the dataset has in four columns
CHOICE_SEED = 42


@dataclass(frozen=True)
class Problem:
    """
    One problem.

    Attributes:
        id: Its name in the results.
        prompt: The user's message. From a file's column `prompt`, which is used as it is: a text that continues, or a list of messages.
        answer: The right answer, for [`~trl_crisp.evaluation.grading.grade`]; for a text also a list, each of them right.
        kind: How it is graded.
        level: Its difficulty or subject, if the benchmark has one.
        is_whole_prompt: Whether the prompt is used as it is, as a row to train on is.
    """

    id: str
    prompt: Prompt
    answer: str | list[str]
    kind: Kind = "math"
    level: str | None = None
    is_whole_prompt: bool = False


@dataclass(frozen=True)
class Benchmark:
    """
    Problems and where they came from.

    Attributes:
        name: As the settings name it.
        source: A Hub id, or a file's name.
        revision: The commit of the dataset on the Hub, or `sha256:...` of the file.
        problems: In the order of the source.
        kind_reason: Why they are graded as their kind.
    """

    name: str
    source: str
    revision: str
    problems: list[Problem]
    kind_reason: str = "the benchmark's"

    @property
    def kind(self) -> Kind:
        """How all of them are graded."""
        return self.problems[0].kind


@dataclass(frozen=True)
class _OnTheHub:
    dataset: str
    split: str
    convert: Callable[["_Row", int], Problem]
    config: str | None = None


def load_benchmark(
    name: str,
    limit: int | None = None,
    file: str | Path | None = None,
    kind: Kind | None = None,
    prompt_template: str | None = None,
) -> Benchmark:
    """
    Load a benchmark by its name, or the problems of a file.

    Args:
        name: One of [`BENCHMARKS`], or the path of a .jsonl, .json, .parquet or .csv file with `question` (or `problem`) and
            `answer`, and optionally `id` and `level`. Instead of a question a row may have `prompt`, a text or a list of messages as in
            training, which is used as it is.
        limit: Load only this many problems, from the first; all if `None`.
        file: A local copy of the named benchmark's rows, with its own columns.
        kind: How all problems are graded. By default a named benchmark has its own kind, and a file's kind follows from its answers
            ([`~trl_crisp.evaluation.golds.kind_of_file`]).
        prompt_template: Text with `{column}` placeholders that is filled in from each row and becomes the user's message. By default
            a named benchmark has its own; a file gets the paper's for math, a similar one for letters, and the question alone for texts.

    Raises:
        ValueError: If the name is unknown, the limit is below 1, a row lacks a column, an answer is not of the kind, or the template
            does not fit the rows.
        FileNotFoundError, PermissionError, ConnectionError: If the rows cannot be loaded. The message says how to give a local copy.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give the number of problems, at least 1, or leave it out for all.")
    known = BENCHMARKS.get(name)
    path = Path(file if file is not None else name)
    if known is None and path.suffix.lower() not in FILE_BUILDERS:
        raise ValueError(
            f"benchmark {name!r} is unknown.{_did_you_mean(name)} Choose one of {', '.join(BENCHMARKS)}, or give a file that ends in one of "
            f"{', '.join(FILE_BUILDERS)} with the columns question and answer."
        )
    if known is None and file is not None:
        raise ValueError(
            f"benchmark {name!r} is a file of your own, and so is {str(file)!r}: --file holds a copy of the rows of a named benchmark. Give one of the "
            "two."
        )
    if known is None or file is not None:
        rows, source, revision = _rows_of_file(path)
    else:
        rows, source, revision = _rows_of_hub(known)
    convert = known.convert if known is not None else _own_problem
    problems = []
    for number, row in enumerate(rows[:limit]):
        try:
            problems.append(convert(_Row(row), number))
        except _BadCell as error:
            raise ValueError(f"{source}, row {number}: {error}. Correct or remove the row.") from error
        except KeyError as error:
            raise ValueError(
                f"{source}, row {number}: there is no column {error}; it has {', '.join(row)}. "
                + (
                    "Give a copy of the benchmark's own rows."
                    if known is not None
                    else "It needs question (or problem, or prompt) and answer."
                )
            ) from error
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    _check(problems, source)
    reason = Benchmark.kind_reason
    if known is None or kind is not None:
        graded_as, reason = kind_of_file([problem.answer for problem in problems], kind, source)
        problems = [replace(problem, kind=graded_as) for problem in problems]
    if known is None:
        template = OWN_TEMPLATES[graded_as]
        problems = [
            problem if problem.is_whole_prompt else replace(problem, prompt=template.format(problem=problem.prompt))
            for problem in problems
        ]
    if prompt_template is not None:
        problems = _with_template(problems, rows[:limit], prompt_template, name, source)
    return Benchmark(name, source, revision, problems, reason)


def _with_template(
    problems: list[Problem], rows: list[dict[str, Any]], template: str, name: str, source: str
) -> list[Problem]:
    if any(problem.is_whole_prompt for problem in problems):
        raise ValueError(
            f"prompt_template: the column 'prompt' of {source} holds whole prompts, which are used as they are. Leave the template out, or "
            "call the column 'question'."
        )
    if name in BENCHMARKS and str(problems[0].prompt).startswith(CHOICE_TEMPLATE.partition("{")[0]):
        raise ValueError(
            f"prompt_template: the prompt of {name} lists the choices under letters, and no column of a row does. Leave it out, or "
            "give a file with questions and letters of your own."
        )
    check_template(template, list(rows[0]))
    for number, row in enumerate(rows):
        for _, column, _, _ in string.Formatter().parse(template):
            if column is not None and row[column.split("[")[0]] is None:
                raise ValueError(f"{source}, row {number}: prompt_template: it has nothing in its column {column!r}.")
    return [replace(problem, prompt=template.format(**row)) for problem, row in zip(problems, rows, strict=True)]


def _did_you_mean(name: str) -> str:
    # Others write MATH-500 and aime_2024
    plain = {re.sub("[^a-z0-9]", "", known): known for known in BENCHMARKS}
    close = difflib.get_close_matches(re.sub("[^a-z0-9]", "", name.lower()), plain, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(plain[known] for known in close)}?" if close else ""


class _BadCell(Exception):
    """A column of a row cannot be used; the message says which and why."""


class _Row(dict[str, Any]):
    """A row in which an empty cell is an error that names its column."""

    def __getitem__(self, column: str) -> Any:
        value = super().__getitem__(column)
        if value is None or (isinstance(value, str) and not value.strip()) or value != value:
            what = "answer to grade by" if column.lower() == "answer" else "text"
            raise _BadCell(f"it has no {what}: its column {column!r} holds {value!r}")
        return value

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise _BadCell(f"its column {column!r} holds a {type(value).__name__} and not a text: {str(value)[:80]!r}")
        return str(value)

    def integer(self, column: str) -> int:
        value = self[column]
        try:
            number = int(value)
        except (TypeError, ValueError) as error:
            raise _BadCell(f"its column {column!r} holds {value!r} and not an integer") from error
        if isinstance(value, float) and number != value:
            raise _BadCell(f"its column {column!r} holds {value!r} and not an integer")
        return number


def _check(problems: list[Problem], source: str) -> None:
    if not problems:
        raise ValueError(f"{source} has no problems.")
    first: dict[str, int] = {}
    for number, problem in enumerate(problems):
        if problem.id in first:
            raise ValueError(
                f"{source}: rows {first[problem.id]} and {number} have the same id {problem.id!r}, so their answers could not be "
                "told apart. Give each row an id of its own, or none."
            )
        first[problem.id] = number
        if not problem.answer:
            raise ValueError(f"{source}, row {number}: it has no answer to grade by. Add it, or remove the row.")


def _rows_of_file(path: Path) -> tuple[list[dict[str, Any]], str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"benchmark file {str(path)!r}: there is no such file (looked for {path.absolute()}).")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return list(load_file(path, streaming=False, field_name="benchmark file")), path.name, f"sha256:{digest}"


def _rows_of_hub(known: _OnTheHub) -> tuple[list[dict[str, Any]], str, str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        try:
            revision = HfApi().dataset_info(known.dataset).sha
        except (OfflineModeIsEnabled, ConnectionError, HTTPError):
            # The cache of `datasets` may hold the rows
            revision = None
        rows = load_dataset(known.dataset, name=known.config, split=known.split, revision=revision)
    except Exception as error:
        try:
            raise_for_hub(error, "dataset", known.dataset, "benchmark")
        except (PermissionError, FileNotFoundError, ConnectionError) as said:
            raise type(said)(
                f"{said} A local copy of its rows (jsonl, json, parquet or csv) goes in with --file (during training --eval_benchmark_file)."
            ) from error
    return list(rows), known.dataset, revision or _cached_revision(rows)


def _cached_revision(rows: Any) -> str:
    # The addresses of the download contain the commit
    checksums = getattr(rows.info, "download_checksums", None) or {}
    commits = {found.group(1) for address in checksums if (found := re.search(r"@([0-9a-f]{40})/", str(address)))}
    if len(commits) == 1:
        return commits.pop()
    digest = hashlib.sha256("".join(json.dumps(row, sort_keys=True, default=str) for row in rows).encode())
    return f"cached, sha256 of the rows:{digest.hexdigest()}"


def _text(value: Any) -> str:
    # AIME's answers are numbers in some copies, and texts with leading zeros in others
    return value.strip() if isinstance(value, str) else "" if value is None else str(value)


def _math(row: _Row, number: int, *, level: str | None = None) -> Problem:
    return Problem(
        id=_text(row.get("unique_id", row.get("id"))) or str(number),
        prompt=MATH_TEMPLATE.format(problem=row.text("problem")),
        answer=_text(row["answer"]),
        level=None if level is None else _text(row.get(level)) or None,
    )


def _math500(row: _Row, number: int) -> Problem:
    return _math(row, number, level="level")


def _aime(row: _Row, number: int) -> Problem:
    row = _Row({key.lower(): value for key, value in row.items()})
    return _math(_Row({**row, "answer": str(row.integer("answer"))}), number)


def _gsm8k(row: _Row, number: int) -> Problem:
    # The last line of the solution is the answer: #### 1,234
    answer = row.text("answer").rpartition("####")[2].replace(",", "").strip()
    return Problem(id=str(number), prompt=MATH_TEMPLATE.format(problem=row.text("question")), answer=answer)


def _choice(question: str, choices: list[str], right: int, id: str, level: str | None) -> Problem:
    letters = string.ascii_uppercase
    listed = "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(letters, choices, strict=False))
    prompt = CHOICE_TEMPLATE.format(problem=question.strip(), choices=listed)
    return Problem(id=id, prompt=prompt, answer=letters[right], kind="choice", level=level)


def _gpqa(row: _Row, number: int) -> Problem:
    choices = [row.text("Correct Answer"), *(row.text(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = random.Random(f"{CHOICE_SEED} {number}").sample(range(4), 4)
    shuffled = [choices[i] for i in order]
    return _choice(row.text("Question"), shuffled, order.index(0), str(number), row.get("High-level domain"))


def _mmlu(row: _Row, number: int) -> Problem:
    choices, right = row["choices"], row.integer("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise _BadCell(f"its column 'choices' holds {choices!r} and not a list of texts")
    if not 0 <= right < len(choices):
        raise _BadCell(f"its column 'answer' holds {right}, and there are {len(choices)} choices, from 0")
    return _choice(row.text("question"), choices, right, str(number), row.get("subject"))


def _own_problem(row: _Row, number: int) -> Problem:
    # Every row has the columns of all rows; a column that the row lacks is None
    column, other = ("question", "problem") if "question" in row or "problem" not in row else ("problem", "question")
    if not row.get(column) and row.get(other):
        raise _BadCell(
            f"its column {column!r} holds {row.get(column)!r}, and its column {other!r} a text. Call the column {column!r} in every row"
        )
    is_whole_prompt = "prompt" in row and not row.get(column)
    if is_whole_prompt:
        check_prompt(row["prompt"], "its column 'prompt'")
    level = row.get("level")
    return Problem(
        id=_text(row.get("id")) or str(number),
        prompt=row["prompt"] if is_whole_prompt else row.text(column),
        answer=_own_answer(row["answer"]),
        level=None if level is None else _text(level),
        is_whole_prompt=is_whole_prompt,
    )


def _own_answer(value: Any) -> str | list[str]:
    gold = gold_of(value)
    return read_gold(gold) if isinstance(gold, str) else [read_gold(one) for one in gold]


BENCHMARKS: dict[str, _OnTheHub] = {
    "math500": _OnTheHub("HuggingFaceH4/MATH-500", "test", _math500),
    "aime24": _OnTheHub("HuggingFaceH4/aime_2024", "train", _aime),
    "aime25": _OnTheHub("math-ai/aime25", "test", _aime),
    "gsm8k": _OnTheHub("openai/gsm8k", "test", _gsm8k, config="main"),
    "gpqa-diamond": _OnTheHub("Idavidrein/gpqa", "train", _gpqa, config="gpqa_diamond"),
    "mmlu": _OnTheHub("cais/mmlu", "test", _mmlu, config="all"),
}
