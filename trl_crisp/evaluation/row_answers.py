"""The right answers that rows to train on may have: in which column, and how they are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_crisp.evaluation.answers import find_box
from trl_crisp.evaluation.golds import gold_of, kind_of_file
from trl_crisp.evaluation.grading import Kind
from trl_crisp.evaluation.notation import read_gold

# Where datasets have the right answer: most, TRL's math sets, and verl's (DAPO-Math-17k)
_COLUMNS = ("answer", "solution", "reward_model")
NO_COLUMN = f"the rows have no {', '.join(_COLUMNS[:2])} or reward_model.ground_truth"
# GSM8K's solutions end in this mark and the answer
_GSM8K_MARK = "####"
# Ours: a longer text without a box is a solution, not a final answer
_ANSWER_CHARACTERS = 200


@dataclass(frozen=True)
class Labels:
    """
    The right answers of the prompts.

    Attributes:
        column: Where they are; `None` if the rows have none.
        golds: One for each prompt, `None` if its row has none.
        kind: How final answers are compared, also without right answers.
        reason: Why there are none, or why this is the kind.
    """

    column: str | None
    golds: list[str | list[str] | None]
    kind: Kind
    reason: str

    @property
    def count(self) -> int:
        """How many prompts have a right answer."""
        return sum(gold is not None for gold in self.golds)


def find_golds(rows: Sequence[dict[str, Any]]) -> tuple[str | None, list[str | list[str] | None], str]:
    """
    Find the right answers of rows, in the first of these columns that has any: `answer`, `solution`, `reward_model.ground_truth`.

    Of a worked solution the answer is what follows `####` (GSM8K) or else is in the last box. Training reads no answers, so a column
    that holds something else is no error: the rows then have no right answers.

    Returns:
        The column; one answer for each row, `None` if it has none; and, without a column, why there is none.
    """
    reason = NO_COLUMN
    for column in _COLUMNS:
        values = [_cell(row, column) for row in rows]
        if all(value is None for value in values):
            continue
        name = "reward_model.ground_truth" if column == "reward_model" else column
        try:
            golds = [None if value is None else _final(gold_of(value)) for value in values]
        except ValueError as error:
            reason = f"column {name!r} has no final answers: {error}"
            continue
        known = [gold for gold in golds if gold]
        if any(len(one) > _ANSWER_CHARACTERS for gold in known for one in ([gold] if isinstance(gold, str) else gold)):
            reason = f"column {name!r} has solutions without a marked final answer"
            continue
        if known:
            return name, [gold or None for gold in golds], ""
    return None, [None] * len(rows), reason


def find_labels(rows: Sequence[dict[str, Any]], asked_kind: Kind | None, has_answer_of: bool = False) -> Labels:
    """
    Find the right answers of rows ([`find_golds`]), and how they are compared.

    Args:
        rows: The rows whose prompts are asked.
        asked_kind: Overrides the kind.
        has_answer_of: Whether the user's own function finds final answers, and compares them as texts. Then any right answer fits.

    Raises:
        ValueError: If `asked_kind` does not fit the answers; the message has the row.
    """
    column, golds, reason = find_golds(rows)
    if column is None:
        return Labels(None, golds, asked_kind or "math", reason)
    if has_answer_of:
        return Labels(column, golds, "text", "answer_of finds them, and two are the same if they are equal")
    known = [gold for gold in golds if gold]
    kind, why = kind_of_file(known, asked_kind, f"column {column!r}, among the rows with an answer")
    return Labels(column, golds, kind, why)


def _cell(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if column == "reward_model":
        value = value.get("ground_truth") if isinstance(value, dict) else None
    return None if value is None or value != value or (isinstance(value, str) and not value.strip()) else value


def _final(gold: str | list[str]) -> str | list[str]:
    if isinstance(gold, list):
        return [str(_final(one)) for one in gold]
    _, mark, after = gold.rpartition(_GSM8K_MARK)
    if mark:
        return read_gold(after.replace(",", "").strip())
    return read_gold(find_box(gold) or gold)
