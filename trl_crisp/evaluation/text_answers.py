"""Grading of facts and names: whether a text says one of the right answers as whole words, without regard to case and accents."""

import re
import unicodedata
from collections.abc import Sequence

# Letters that do not decompose into a base letter and an accent
_LETTERS = str.maketrans({"ø": "o", "đ": "d", "ł": "l", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th", "ı": "i"})  # noqa: RUF001
_LATEX = re.compile(r"\\[A-Za-z]+")
# A number with its sign, point and thousands; a word; a sign that is a part of names (C++, C#) or of amounts
_TOKEN = re.compile(r"(?<![^\W_])[-−]?\d+(?:[.,]\d+)*(?![^\W_])|[^\W_]+(?:[+#]+(?![^\W_]))?|[+#%$€£¥°&@]")  # noqa: RUF001
_END = re.compile(r"[.!?。！？]+[\"'”’)\]*_]*(?=\s|$)|(?<=[。！？])|\n")  # noqa: RUF001
# Ours: words whose point does not end a sentence
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|St|Mr|Mrs|Ms|Dr|Prof|Mt|Ft|Jr|Sr|Gen|Lt|Col|No|Nos|vs|ca|approx|e\.g|i\.e|etc|cf|al|Inc|Ltd|Co)|\b[a-z]\.[a-z])\.$"
)


def words(text: str) -> list[str]:
    """Return a text's words and numbers, without case, accents, LaTeX's commands and punctuation."""
    text = _LATEX.sub(" ", text)
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(character for character in decomposed if not unicodedata.combining(character)).translate(_LETTERS)
    tokens = (token.replace("−", "-") for token in _TOKEN.findall(plain))  # noqa: RUF001
    return [re.sub(r",(?=\d{3}(?!\d))", "", token) if token[-1].isdigit() else token for token in tokens]


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
    `St. Petersburg`, `Washington D.C.`) ends a sentence only if nothing follows on its line.
    """
    start = 0
    for end in _END.finditer(text):
        sentence = text[start : end.end()]
        said = sentence.strip()
        if not words(said):
            # Only marks, such as those of a heading
            start = end.end()
        elif not _continues(said, end[0], text[end.end() :]):
            return said
    return text[start:].strip()


def _continues(said: str, end: str, rest: str) -> bool:
    if end == "\n":
        return said.rstrip("*_ ").endswith((":", "："))  # noqa: RUF001
    return bool(_ABBREVIATION.search(said) and re.match(r"[^\S\n]*\S", rest))
