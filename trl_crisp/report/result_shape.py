"""Whether a results.json is as `trl-crisp eval` writes it: what the page reads is there, and of the right type."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_Check = Callable[[Any, str], str | None]
_AGAIN = "Run the same `trl-crisp eval` command again: it keeps the finished answers."


def check_shape(results: dict[str, Any], path: Path) -> None:
    """
    Check what [`~trl_crisp.evaluation.results.load_results`] returned.

    Raises:
        ValueError: If something is missing or of another type. The message names the file, the place in it and the value.
    """
    fault = _RESULTS(results, "")
    if fault is None and not (results["problems"] and results["summary"]):
        fault = "it has no answers, so there is nothing to show"
    if fault is None:
        fault = _find_inconsistency(results)
    if fault is not None:
        raise ValueError(f"{path} is not as `trl-crisp eval` writes it: {fault}. {_AGAIN}")


def _find_inconsistency(results: dict[str, Any]) -> str | None:
    budgets, samples, seen = results["summary"].keys(), results["samples"], set()
    for problem in results["problems"]:
        name = f"problem {problem['id']!r}"
        if problem["id"] in seen:
            return f"{name} is there twice"
        seen.add(problem["id"])
        if len(problem["samples"]) != samples:
            return f"{name} has {len(problem['samples']) or 'no'} answers, and each has to have {samples}"
        for sample in problem["samples"]:
            if missing := budgets - sample["grades"].keys():
                return f"an answer to {name} was not graded at {min(missing)} tokens"
    return None


def _leaf(what: str, fits: Callable[[Any], bool]) -> _Check:
    def check(value: Any, place: str) -> str | None:
        return None if fits(value) else f"{place} is {_shortened(value)}, not {what}"

    return check


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _fields(fields: dict[str, _Check], optional: dict[str, _Check] | None = None) -> _Check:
    """Return a check of a mapping that has some keys, and others perhaps."""
    checks = {**fields, **(optional or {})}

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place} is {_shortened(value)}, not a mapping"
        if missing := [key for key in fields if key not in value]:
            return f"{place or 'it'} lacks {', '.join(missing)}"
        dot = "." if place else ""
        faults = (one(value[key], f"{place}{dot}{key}") for key, one in checks.items() if key in value)
        return next((fault for fault in faults if fault is not None), None)

    return check


def _each(item: _Check, by_number: bool = False) -> _Check:
    """Return a check of the values of a mapping, of which the keys may have to be numbers, such as budgets."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place} is {_shortened(value)}, not a mapping"
        if by_number and (other := [key for key in value if not (key.isascii() and key.isdecimal())]):
            return f"{place} has the key {_shortened(other[0])}, not a number"
        faults = (item(one, f"{place}.{key}") for key, one in value.items())
        return next((fault for fault in faults if fault is not None), None)

    return check


def _list(item: _Check) -> _Check:
    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, list):
            return f"{place} is {_shortened(value)}, not a list"
        faults = (item(one, f"{place}[{number}]") for number, one in enumerate(value))
        return next((fault for fault in faults if fault is not None), None)

    return check


def _or_null(check: _Check) -> _Check:
    return lambda value, place: None if value is None else check(value, place)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


_TEXT = _leaf("a text", lambda value: isinstance(value, str))
_COUNT = _leaf("a count", _is_count)
_NUMBER = _leaf("a finite number", _is_number)
_FLAG = _leaf("true or false", lambda value: isinstance(value, bool))
_ANSWER = _leaf("a text or a list of texts", lambda value: isinstance(value, str) or _is_texts(value))
_PROMPT = _leaf("a text or a list of messages", lambda value: isinstance(value, str) or _is_messages(value))
_POSITIVE = _leaf("a positive count", lambda value: _is_count(value) and value > 0)

# The measures that a page shows
_SUMMARY = _fields(
    {
        **dict.fromkeys(("accuracy", "answer_accuracy", "boxed_accuracy"), _NUMBER),
        "pass_at": _each(_NUMBER, by_number=True),
        **dict.fromkeys(
            (
                "mean_tokens",
                "median_tokens",
                "p90_tokens",
                "mean_thinking_tokens",
                "mean_answer_tokens",
                "truncated",
                "repeats",
                "unparseable",
                "epistemic_words_per_1000_tokens",
            ),
            _NUMBER,
        ),
    },
    {"anywhere_accuracy": _NUMBER},
)
_GRADE = _fields(
    {
        **dict.fromkeys(("answer_correct", "boxed_correct", "correct", "compresses", "repeats"), _FLAG),
        "status": _TEXT,
        "epistemic_words": _COUNT,
    },
    {"anywhere_correct": _or_null(_FLAG)},
)
_SAMPLE = _fields(
    {
        "tokens": _COUNT,
        "thinking_tokens": _COUNT,
        "ended_by_eos": _FLAG,
        "grades": _each(_GRADE, by_number=True),
    }
)
_PROBLEM = _fields(
    {"id": _TEXT, "level": _or_null(_TEXT), "answer": _ANSWER, "samples": _list(_SAMPLE)},
    {"prompt": _or_null(_PROMPT)},
)
_RESULTS = _fields(
    {
        "protocol": _fields({"model": _TEXT, "benchmark": _TEXT}, {"instruction": _or_null(_TEXT)}),
        "first_prompt": _TEXT,
        "samples": _POSITIVE,
        "summary": _each(_fields({"all": _SUMMARY}), by_number=True),
        "problems": _list(_PROBLEM),
    },
    {"comparison": _each(_fields({"reduction": _or_null(_fields({"estimate": _NUMBER}))}), by_number=True)},
)
