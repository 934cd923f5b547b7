"""The right answers of a user's file: their text, and the kind by which they are graded."""

import datetime
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from trl_crisp.evaluation.grading import Grader, Kind
from trl_crisp.evaluation.near_misses import find_words
from trl_crisp.evaluation.notation import read_gold, read_literal, split_unit
from trl_crisp.evaluation.text_answers import words

_LETTER = re.compile(r"[\W_]*(?:\\text\{)?[\W_]*[A-Ja-j][\W_]*")
# 12 apples, \$5 per hour
_AMOUNT = re.compile(r"(?:\\?\$)?-?[\d,]*\.?\d+(?:/\d+)?(?:\s+[A-Za-z]+){1,3}")
_LATEX_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\s*\{[^{}]*\}")


def gold_of(value: Any) -> str | list[str]:
    """
    Return a file's right answer as text, or several texts if each of them is right.

    A number is written without an exponent (1e-05 is 0.00001) and without `.0` at its end. A list with one answer is that answer.

    Raises:
        ValueError: If the value is not an answer: an object, a list in a list, a number that is not finite.
    """
    if isinstance(value, list | tuple):
        golds = list(dict.fromkeys(gold_of(item) for item in value if not isinstance(item, list | tuple)))  # type: ignore[arg-type]
        if any(isinstance(item, list | tuple) for item in value) or "" in golds:
            raise ValueError(
                f"its answer is {value!r}: a list has to hold texts or numbers, each of them a right answer."
            )
        return golds[0] if len(golds) == 1 else golds  # type: ignore[return-value]
    if value is None or isinstance(value, str):
        return (value or "").strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    if isinstance(value, datetime.datetime):
        # The reader of JSON turns the text "2020-01-31" into this type
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise ValueError(f"its answer is {value!r}: give a text, a number, or a list of right answers.")


def kind_of_file(golds: Sequence[str | list[str]], asked: Kind | None, where: str) -> tuple[Kind, str]:
    """
    Return the kind by which all answers of a file are graded, and why.

    `"choice"` if all golds are single letters A to J; `"math"` if all can be read as math and none is a word, a time or a date;
    else `"text"`.

    Args:
        golds: The right answer of each row, or several if each of them is right.
        asked: A kind that overrides the rule.
        where: The file's name for error messages.

    Raises:
        ValueError: If a gold is not of the kind. The message names the first such row.
    """
    read = [[read_gold(gold) for gold in ([row] if isinstance(row, str) else row)] for row in golds]
    flat = [(number, gold) for number, row in enumerate(read) for gold in row]
    several = next((number for number, row in enumerate(read) if len(row) > 1), None)
    no_letter = next(((number, gold) for number, gold in flat if not _LETTER.fullmatch(gold)), None)
    if asked is None and no_letter is None and several is None:
        return "choice", "all answers are letters A to J"
    word = next(((number, gold) for number, gold in flat if _is_text(gold)), None)
    if asked is None and word is not None:
        kind, why = "text", f"the answer of row {word[0]} is {word[1]!r}"
    elif asked in (None, "math"):
        with Grader() as grader:
            readable = grader.readable([gold for _, gold in flat])
        unread = next((one for one, is_read in zip(flat, readable, strict=True) if not is_read), None)
        kind, why = "math", "all answers are math"
        if asked is None and unread is not None:
            kind, why = "text", f"the answer of row {unread[0]}, {unread[1]!r}, cannot be read as math"
        elif unread is not None:
            raise ValueError(
                f"{where}, row {unread[0]}: the answer {unread[1]!r} cannot be read as math. Correct it, or grade the file as text "
                "(--grader text)."
            )
    else:
        assert asked is not None
        kind, why = asked, ""
    why = "asked for" if asked else why
    if kind == "choice" and no_letter is not None:
        raise ValueError(
            f"{where}, row {no_letter[0]}: the answer {no_letter[1]!r} is not a letter A to J. Give the letter, or another --grader."
        )
    if kind != "text" and several is not None:
        raise ValueError(
            f"{where}, row {several}: its answer is a list, {golds[several]!r}, and only texts can have several right answers. Write it "
            "as one text ('1, 2') if the question asks for all of them, or set --grader text if each is right."
        )
    if kind == "text" and (empty := [number for number, gold in flat if not words(gold)]):
        raise ValueError(
            f"{where}, row {empty[0]}: the answer {golds[empty[0]]!r} has no word and no number to look for."
        )
    return kind, why  # type: ignore[return-value]


def _is_text(gold: str) -> bool:
    literal = read_literal(gold)
    if literal is not None:
        return literal[0] == "date"
    # Math benchmarks have words in this form, \text{even}
    plain = _LATEX_WORDS.sub("", gold)
    if _AMOUNT.fullmatch(plain.strip()):
        return False
    return bool(find_words(split_unit(plain)[0])) or bool(
        re.search(r"[^\x00-\u024f\u0370-\u03ff\u2000-\u2bff]", plain)
    )
