r"""Plain notation of answers and golds, as math-verify reads it: `11 5/6`, `.5`, `1e-05`, `3√13`, `4210 base 5`, `12 dollars`.

Only the text is rewritten, nothing is computed. A unit is returned apart.
"""

import re
import unicodedata
from decimal import Decimal

from trl_crisp.evaluation.answers import find_answer, find_box

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_LEADING_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_MIXED = re.compile(rf"(?<![\w.,/^])({_NUMBER})[ \u00a0\u2009]{{1,2}}(\d{{1,6}})/(\d{{1,6}})(?![\w/]|[.,]\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?)[eE]([+-]?\d{1,3})(?![\w.]\w|\w)")
_ROOT = re.compile(
    r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))"
    r"|(?<![A-Za-z\\])sqrt\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z])(?![A-Za-z]))"
)
_PI = re.compile(r"(?<![A-Za-z\\])(?:pi|Pi|PI)(?![A-Za-z])")
_SUPERSCRIPT = re.compile("[⁻⁺]?[⁰¹²³⁴-⁹]+")
_SUBSCRIPT = re.compile("(?<=[0-9A-F])[₀-₉]+")
_SIGNS = {
    "°": r"^\circ ",
    "º": r"^\circ ",
    "∞": r"\infty ",
    "∪": r"\cup ",  # noqa: RUF001
    "∩": r"\cap ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "−": "-",  # noqa: RUF001
    "﹣": "-",
    "－": "-",  # noqa: RUF001
    "⁄": "/",  # noqa: RUF001
    "∕": "/",  # noqa: RUF001
}
# Between two numbers it is a range
_EN_DASH_AS_SIGN = re.compile(r"(?:(?<![\w)}\s])|(?<=[=,(\[]\s))–(?=\s?[\d.\\])")  # noqa: RUF001
_THIN_SPACES = re.compile(r"(?<![\w.])\d{1,3}(?:(?:\\,|[\u2009\u202f])\d{3})+(?![\d/])")
_BASES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_BASE = re.compile(
    r"(?<=[0-9A-F)])\s*(?:_\s*\{?|,?\s*\(?(?:\\text\{\s*)?(?:in\s+)?base(?:\s+|-))\s*(?:\\(?:text|mathrm|textrm)\{)?\s*\(?"
    rf"(\d+|{'|'.join(_BASES[2:])})(?![A-Za-z\d])[)}}]*",
    re.IGNORECASE,
)
# Ours: the units of school problems; other words after a number are ignored
_UNITS = {
    "mm": "mm|millimet(?:er|re)s?",
    "cm": "cm|centimet(?:er|re)s?",
    "m": "m|met(?:er|re)s?",
    "km": "km|kilomet(?:er|re)s?",
    "in": "in|inch|inches",
    "ft": "ft|foot|feet",
    "yd": "yds?|yards?",
    "mi": "mi|miles?",
    "mg": "mg|milligrams?",
    "g": "g|grams?",
    "kg": "kg|kilograms?|kilos?",
    "oz": "oz|ounces?",
    "s": "s|secs?|seconds?",
    "min": "mins?|minutes?",
    "h": "h|hrs?|hours?",
    "day": "days?",
    "week": "weeks?",
    "month": "months?",
    "year": "yrs?|years?",
    "ml": "ml|mL|millilit(?:er|re)s?",
    "l": "L|lit(?:er|re)s?",
    "gal": "gals?|gallons?",
    "dollar": "dollars?|bucks?|USD",
    "cent": "cents?|¢",
    "euro": "euros?|EUR|€",
    "degree": r"degs?|degrees?|\^\{?\\circ\}?",
    "radian": "rads?|radians?",
    "percent": r"\\?%|percent|per cent|pct",
    "mph": "mph|miles per hour|miles/hour",
    "km/h": "km/h|kmh|kph|kilomet(?:er|re)s per hour",
}
_UNIT = re.compile(
    r"(?P<before>[\d})$]|\\pi|[°])(?P<gap>(?:\s|~|\\[ ,;!])*)(?P<text>\\(?:text|mbox|mathrm|textrm|rm|textbf|mathbf)\s*\{\s*)?"
    r"(?P<prefix>(?:square|sq\.?|cubic|cu\.?)\s+)?(?:"
    + "|".join(f"(?P<u{i}>{words})" for i, words in enumerate(_UNITS.values()))
    + r")\.?\s*\}?\s*(?P<power>\^\{?[23]\}?|[²³])?\s*\}?\$?$"
)
_UNIT_NAMES = list(_UNITS)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_PREFIX_CURRENCY = re.compile(r"^\$?\s*(\\?\$|[€£¥₹])\s*(?=-?[\d.])")
_CLOCK = re.compile(
    r"(?<![\d:./])(?P<hour>[01]?\d|2[0-4])(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?(?![\d:])"
    r"(?:\s*(?P<half>[ap])\.?\s*m\b\.?)?",
    re.IGNORECASE,
)
_DATE = re.compile(r"(?<![\d/-])(\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4})(?![\d/-])")
_WRAPPERS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit|mathit)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;!: ]|~|\\quad")


def read_numbers(text: str) -> str:
    """Return a text with digits of other scripts, leading points, mixed numbers (as fractions) and 1e-05 written as in LaTeX."""
    if not text.isascii():
        text = "".join(_plain_character(character) for character in text)
        text = re.sub("\uf8ff(?=\\d)", " ", re.sub("(?<!\\d)\uf8ff", "", text))
    text = _LEADING_POINT.sub("0.", text)
    text = _MIXED.sub(_improper, text)
    return _SCIENTIFIC.sub(_without_exponent, text)


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if unicodedata.decomposition(character).startswith("<fraction>"):
        # This mark becomes a space after a digit, which makes a mixed number
        return "\uf8ff" + unicodedata.normalize("NFKC", character).replace("⁄", "/")  # noqa: RUF001
    # Only decimal digits: a superscript two is an exponent
    return str(unicodedata.decimal(character, character))


def _improper(found: re.Match[str]) -> str:
    whole, numerator, denominator = int(found[1].replace(",", "")), int(found[2]), int(found[3])
    if not 0 < numerator < denominator:
        return found[0]
    return f"{whole * denominator + numerator}/{denominator}"


def _without_exponent(found: re.Match[str]) -> str:
    return format(Decimal(found[0]), "f")


def read_answer(text: str) -> str:
    """Return an answer, a box or a gold in LaTeX: like [`read_numbers`], and with roots, pi, signs, exponents and bases too."""
    text = re.sub(r"(\s)\s{2,}", r"\1 ", text)
    text = _THIN_SPACES.sub(lambda found: re.sub(r"\\,|\s", "", found[0]), text)
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", read_numbers(text))
    # Python's power
    text = re.sub(r"(?<=[A-Za-z\d)])\*\*(\d+)(?![\w*])", r"^{\1}", text)
    text = _BASE.sub(_in_base, text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{next(filter(None, found.groups()), '')}}}", text)
    text = _PI.sub(r"\\pi ", text)
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0]).replace('−', '-')}}}", text)  # noqa: RUF001
    text = _SUBSCRIPT.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _EN_DASH_AS_SIGN.sub("-", text)
    return "".join(_SIGNS.get(character, character) for character in text)


def _in_base(found: re.Match[str]) -> str:
    base = found[1].lower()
    return f"_{{{_BASES.index(base) if base in _BASES else base}}}"


def read_gold(gold: str) -> str:
    """
    Return the answer that a gold holds. In a whole solution it is the last line (`#### 1,234`), the box or the answer line.

    A point at its end, and dollar signs and emphasis around it, are removed.
    """
    gold = gold.strip()
    if "####" in gold and (last := gold.rpartition("####")[2].strip()):
        gold = last.replace(",", "") if re.fullmatch(r"\$?-?[\d,]+(?:\.\d+)?\.?", last) else last
    elif r"\boxed{" in gold and (box := find_box(gold)):
        gold = box
    elif (answer := find_answer(gold)) is not None:
        gold = answer
    gold = gold.strip("*`" if gold.strip("*`") else "").strip()
    gold = re.sub(r"(?<=[\d})$\]])\.$|(?<=[^\W\d_]{3})\.$", "", gold)
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = gold.removeprefix(opening).removesuffix(closing)
        if len(gold) - len(inside) == len(opening + closing) and opening not in inside and inside.strip():
            return inside.strip()
    return gold


def split_unit(text: str) -> tuple[str, str | None]:
    """
    Return an answer without its unit, and the unit's name; `None` if it has no unit or an unknown one.

    Dollar signs, percentages and degrees stay, because math-verify reads them. A letter directly after a number (`12m`) stays too,
    because it may be a factor.
    """
    currency = _PREFIX_CURRENCY.match(text)
    unit = _CURRENCIES[currency[1][-1]] if currency else None
    if currency and not currency[1].endswith("$"):
        text = text[: currency.start(1)] + text[currency.end() :]
    found = _UNIT.search(text)
    if found is None:
        return text, unit
    place = next(i for i in range(len(_UNIT_NAMES)) if found[f"u{i}"] is not None)
    word = found[f"u{place}"]
    if len(word) == 1 and word.isalpha() and not (found["text"] or found["gap"]):
        return text, unit
    power = (found["power"] or "").strip("^{}").replace("²", "2").replace("³", "3")
    unit = _UNIT_NAMES[place] + (power or {"s": "2", "c": "3"}.get((found["prefix"] or "")[:1], ""))
    if unit in ("percent", "degree"):
        return text, unit
    kept = text[: found.end("before")]
    return kept + "$" * (currency is None and kept.count("$") % 2), unit


def read_literal(text: str, last: bool = False) -> tuple[str, ...] | None:
    """
    Return a time of day or a date in a normal form, or `None` if the text has none.

    Args:
        text: An answer that is a time or a date as a whole, or with `last` any response.
        last: Find the last time or date in the text.
    """
    plain = _WRAPPERS.sub(r"\1", text)
    plain = _SPACES.sub("", plain.replace("{:}", ":")).replace("$", " ").strip()
    found = [*_CLOCK.finditer(plain), *_DATE.finditer(plain)]
    found = [one for one in found if one.re is _DATE or one["minute"] or one["half"]]
    found = sorted(
        found if last else [one for one in found if one[0] == plain.rstrip(". ") or one[0] == plain],
        key=re.Match.start,
    )
    if not found:
        return None
    one = found[-1]
    if one.re is _DATE:
        return ("date", *(part.lstrip("0") for part in re.split("[/-]", one[0])))
    hour, half = int(one["hour"]), (one["half"] or "").lower()
    if half and 1 <= hour <= 12:
        hour, half = hour % 12 + 12 * (half == "p"), "known"
    return ("time", str(hour), one["minute"] or "00", one["second"] or "00", half or ("known" if hour > 12 else ""))


def is_same_literal(gold: tuple[str, ...], other: tuple[str, ...] | None) -> bool:
    """Whether two times or dates are the same. A time without am or pm matches either half of the day."""
    if other is None or gold[0] != other[0] or gold[0] == "date" or gold[-1] == other[-1]:
        return gold == other
    return int(gold[1]) % 12 == int(other[1]) % 12 and gold[2:4] == other[2:4]


def bare(text: str) -> str:
    """Return a text without LaTeX's spaces, delimiters and fonts, to compare how two answers are written."""
    text = _WRAPPERS.sub(r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[()\[\]]|(?<!\\)\$|\\!", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", _SPACES.sub(" ", text))
    # A space between two numbers or two words stays
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text.strip())
