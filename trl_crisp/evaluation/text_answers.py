"""Grading of facts and names: whether a text says one of the right answers as whole words, without regard to case and accents."""

import re
import unicodedata
from collections.abc import Sequence

# Letters that do not decompose into a base letter and an accent
_LETTERS = str.maketrans(
    {"ø": "o", "đ": "d", "ł": "l", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th", "ı": "i", "ʻ": "", "ʼ": "'"}  # noqa: RUF001
)
_FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_LATEX = re.compile(r"\\[A-Za-z]+")
# H_2O, CO$_2$
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z])\$?_\{?(\d+)\}?")
# Chinese and Japanese put no spaces between words
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# A number with its sign, point and thousands; a character of a script without spaces; a word; a sign that is a part of names (C++, C#) or of amounts
_TOKEN = re.compile(
    rf"(?<![^\W_])[-−]?\d+(?:[.,]\d+)*(?![^\W_])|[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+(?:[+#]+(?![^\W_]))?|[+#%$€£¥°&@]"  # noqa: RUF001
)
_END = re.compile(r"[.!?。！？]+[\"'”’)\]*_]*(?=\s|$)|(?<=[。！？])|\n")  # noqa: RUF001
# Ours: words whose point does not end a sentence
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|St|Mr|Mrs|Ms|Dr|Prof|Mt|Ft|Jr|Sr|Gen|Lt|Col|Capt|Sgt|Cpl|Maj|Adm|Rev|Hon|Sen|Rep|Gov|Pres|No|Nos|Fig|Vol|pp|vs|ca|approx"
    r"|e\.g|i\.e|etc|cf|al|Inc|Ltd|Co|Corp|Ave|Blvd|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|ST|MT|FT|MR|MRS|MS|DR)|\b[a-z]\.[a-z])\.$"
)
_LONGEST_END = 20
# The number of the first point of a list
_LIST_NUMBER = re.compile(r"[\W_]*\d{1,3}\.[\W_]*")


def words(text: str) -> list[str]:
    """Return a text's words and numbers, without case, accents, LaTeX's commands and punctuation."""
    text = _LATEX.sub(" ", _SUBSCRIPT.sub(r"\1", _FONT.sub(r"\1", text)))
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(character for character in decomposed if not _is_silent(character)).translate(_LETTERS)
    tokens = (token.replace("−", "-") for token in _TOKEN.findall(plain))  # noqa: RUF001
    return [re.sub(r",(?=\d{3}(?!\d))", "", token) if token[-1].isdigit() else token for token in tokens]


def _is_silent(character: str) -> bool:
    """Whether a character is an accent, a soft hyphen or has no width."""
    return bool(unicodedata.combining(character)) or unicodedata.category(character) == "Cf"


def says(text: str, golds: Sequence[str]) -> bool:
    """Whether a text has the words of one of the golds, in a row."""
    spoken = f" {' '.join(words(text))} "
    return any(wanted and f" {' '.join(wanted)} " in spoken for wanted in map(words, golds))


def after_thinking(response: str) -> str:
    """Return what a response says after its thinking; an empty text if the thinking never ends."""
    _, found, after = response.rpartition("</think>")
    return after if found else "" if "<think>" in response else response


def first_sentence(text: str) -> str:
    """
    Return the first sentence that has a word: up to its mark, or the end of its line.

    A line that ends in a colon continues on the next line. A point after an initial or an abbreviation (`J. K. Rowling`,
    `St. Petersburg`, `Washington D.C.`) or a list's number ends a sentence only if nothing follows on its line.
    """
    start = 0
    for end in _END.finditer(text):
        if _continues(text, start, end):
            continue
        said = text[start : end.end()].strip()
        if words(said):
            return said
        # Only marks, such as those of a heading
        start = end.end()
    return text[start:].strip()


def _continues(text: str, start: int, end: re.Match[str]) -> bool:
    # Only the end of what is said so far: a text may be one long row of abbreviations
    said = text[max(start, end.end() - _LONGEST_END) : end.end()].strip()
    if end[0] == "\n":
        return said.rstrip("*_ ").endswith((":", "："))  # noqa: RUF001
    if re.compile(r"[^\S\n]*\S").match(text, end.end()) is None:
        return False
    return bool(_ABBREVIATION.search(said)) or (
        end.end() - start < _LONGEST_END and bool(_LIST_NUMBER.fullmatch(said))
    )
