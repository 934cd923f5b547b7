r"""Finds pairs that math-verify calls equal and that are not: other bases, values within its tolerance, words read as factors."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from trl_crisp.evaluation.text_answers import says

_BASE = re.compile(r"_\{?(\d+)\}?\s*[$.]*$")
# A word: three letters, or two with a capital
_WORD = re.compile(r"[^\W\d_]{3,}|(?<![^\W\d_])(?:[A-Z][^\W\d_]|[^\W\d_][A-Z])(?![^\W\d_])")
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "max",
    "min",
    "mod",
    "gcd",
    "lcm",
    "inf",
    "det",
}
_FUNCTIONS |= {"arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "infinity", "and", "or", "cis"}
_DIGITS = 40
# Ours: exact values are computed to 40 digits, so a difference above this is not a rounding error
_EXACT = Decimal("1e-25")
# math-verify's own six places, relative to the value
_ROUNDED = Decimal("1e-6")


def find_words(gold: str) -> list[str]:
    r"""Return a gold's words, including those in `\text{...}`. `2xy`, `\frac{1}{2}` and `\sin x` have none."""
    gold = re.sub(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|operatorname)\s*\{", "{", gold)
    found = _WORD.findall(re.sub(r"\\[A-Za-z]+", " ", gold))
    return [word for word in found if word.lower() not in _FUNCTIONS]


def is_near_miss(gold: str, text: str, expected: Sequence[Any], found: Sequence[Any]) -> bool:
    """
    Whether a text is not the gold although math-verify says so.

    Args:
        gold: The right answer.
        text: The text in which math-verify found the answer.
        expected, found: What math-verify read in the gold and in the text: an expression, and the text that it was read from.
    """
    written = [next((item for item in side if isinstance(item, str)), "") for side in (expected, found)]
    bases = [_BASE.search(one) for one in written]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return True
    if not re.search(r"\d", gold) and find_words(gold) and not says(text, [gold]):
        return True
    values = [next((item for item in side if not isinstance(item, str)), None) for side in (expected, found)]
    return _differ(*values)


def _differ(expected: Any, found: Any) -> bool:
    """Whether two expressions that math-verify calls equal have different values; `False` if that cannot be decided."""
    from sympy import Basic, FiniteSet, MatrixBase, Tuple, UnevaluatedExpr, default_sort_key

    if isinstance(expected, MatrixBase) and isinstance(found, MatrixBase):
        return any(map(_differ, expected.flat(), found.flat()))
    if not isinstance(expected, Basic) or not isinstance(found, Basic) or expected == found:
        return False
    # math-verify reads 50% as 50 and as 0.5
    if any(one.has(UnevaluatedExpr) or one.free_symbols for one in (expected, found)):
        return False
    kinds = (FiniteSet, Tuple)
    if isinstance(expected, kinds) and isinstance(found, kinds):
        sides = [list(one.args) for one in (expected, found)]
        if isinstance(expected, FiniteSet) or isinstance(found, FiniteSet):
            sides = [sorted(side, key=lambda item: default_sort_key(item.evalf())) for side in sides]
        return len(sides[0]) == len(sides[1]) and any(map(_differ, *sides))
    values = [_value(one) for one in (expected, found)]
    if values[0] is None or values[1] is None:
        return False
    return not _agree(values[0], values[1])


def _value(expression: Any) -> tuple[Decimal, str] | None:
    """Return a real number's value, and whether it is `exact`, a `decimal` as written, or `rounded` by the computation."""
    from sympy import Float

    if not getattr(expression, "is_number", False):
        return None
    floats = expression.atoms(Float)
    whole = expression.doit().evalf(_DIGITS)
    if not (whole.is_Float or whole.is_Integer) or not whole.is_finite:
        return None
    if not floats:
        return Decimal(str(whole)), "exact"
    if expression.is_Mul or expression.is_Float:
        others = [factor for factor in expression.as_ordered_factors() if not factor.is_Float]
        if len(floats) == 1 and all(abs(factor) == 1 or (factor.is_Pow and factor.base == 10) for factor in others):
            # The shortest text of this number is the decimal as it was written
            return Decimal(repr(float(whole))), "decimal"
    return Decimal(str(whole)), "rounded"


def _agree(first: tuple[Decimal, str], second: tuple[Decimal, str]) -> bool:
    (a, how_a), (b, how_b) = first, second
    apart, size = abs(a - b), max(abs(a), abs(b))
    if "rounded" in (how_a, how_b):
        return apart <= 10 * _ROUNDED * size
    if how_a == how_b == "exact":
        return apart <= _EXACT * size
    # A decimal stands for the values that round or are cut to it: they differ by less than one in its last place
    places = [int(value.as_tuple().exponent) for value, how in (first, second) if how == "decimal"]
    if len(places) == 2 and places[0] == places[1]:
        return a == b
    return apart < Decimal(10) ** max(places)
