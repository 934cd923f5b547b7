r"""Finds the answer in a response: the last `Answer: ...` line, the last `\boxed{...}`, the letter of a choice."""

import re
import unicodedata

# Exactly the paper's rule
_EXACT_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_TAG = r"</?(?:b|strong|i|em|u|mark|p|span|div|br|center|h[1-6])\b[^<>\n]{0,80}>"
# The same, also with Markdown's, LaTeX's or HTML's emphasis of the word or the colon, and with the answer in a block below
_LINE = re.compile(
    rf"(?im)(?:Answer(?:[\s*_`}}]|{_TAG}){{0,20}}[:：﹕︓︰∶꞉]|"  # noqa: RUF001
    # A heading needs no colon
    rf"^(?:>[ \t]*){{0,3}}(?:\#{{1,6}}[ \t]+|[*_]{{1,3}}|{_TAG}){{1,3}}(?:(?:the|final|correct)[ \t]+){{0,2}}answer"
    rf"(?:[ \t*_>]|{_TAG}){{0,20}}\n)"
    rf"(?>(?:[*_`}}]{{1,4}}(?![*_`])|[ \t]+}}|{_TAG})?\s*)(?:```\w*\n\s*|(?<=\n)(?:>\s*)+|(?<=\n)[-•]\s+)?([^\n]+)"
)
_BRACE = re.compile(r"\\boxed\{|[{}]")
_BLOCKS = (("$$", "$$"), (r"\[", r"\]"))
# Ours: enough for a matrix or an equation in a block below the line; a longer text is not an answer
_BLOCK_CHARACTERS = 2000
# Not "!": 5! is a factorial
_STRIPPED = ".,;:?\"' \t"
_EMPHASIS_AND_QUOTES = "*_`“”‘’"  # noqa: RUF001
# Zero-width and other invisible characters
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_EXACT_LETTER = re.compile(r"^[^A-Za-z0-9]*(?:\\(?:text|mathrm|textbf|mathbf)\{)?[^A-Za-z0-9]*([A-Za-z])(?![A-Za-z])")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:option|choice|answer|letter)(?:\s+is)?\s*+:?)?"
    r"(?:\\[A-Za-z]+\{|[^A-Za-z0-9\\]|\\[^A-Za-z])*"
    # Not the article or the pronoun ("A rectangle", "I think"), but "A is right"
    r"(?![AI]\s+(?!(?:is|because|since|as)\b)(?-i:[a-z]))([A-Za-z])(?![A-Za-z0-9'’])"  # noqa: RUF001
    # Two letters are not a choice: "A or B"
    r"(?!\W*(?:and|or|,|/|&|\+)\W*[A-Za-z](?![A-Za-z]))",
    re.IGNORECASE,
)


def find_answer(response: str, exact: bool = False) -> str | None:
    """
    Return the text of the last `Answer: ...` line, or `None` if there is none or it is empty.

    Args:
        response: What the model wrote.
        exact: Use exactly the authors' rule. Otherwise emphasis of the word, of the colon or of the answer (`**Answer**: **42**`,
            `\\textbf{Answer:} 42`), a full-width colon, a heading without a colon (`### Answer`), and an answer in a block under the line
            (`$$ ... $$`) are read too.
    """
    if exact:
        lines = _EXACT_LINE.findall(response)
        return (lines[-1].strip().rstrip(_STRIPPED) or None) if lines else None
    response = response.translate(_INVISIBLE)
    matches = list(_LINE.finditer(response))
    if not matches:
        return None
    line, end = matches[-1][1], matches[-1].end()
    return _trim(_with_its_block(line, response[end : end + _BLOCK_CHARACTERS]))


def _with_its_block(line: str, below: str) -> str:
    """Return a line, with the lines below it that belong to a block that the line opens and does not close."""
    line = line.strip()
    for opening, closing in _BLOCKS:
        if line.startswith(opening) and closing not in line[2:]:
            inside, found, _ = below.partition(closing)
            return f"{line[2:]} {inside}".replace("\n", " ") if found else line[2:]
    while line.count(r"\begin{") > line.count(r"\end{") and below:
        row, _, below = below.lstrip("\n").partition("\n")
        line = f"{line} {row}"
    return line


def _trim(answer: str) -> str | None:
    """Return an answer without emphasis and quotation marks around it, and without closing marks that were opened before the line."""
    answer = re.sub(rf"(?i){_TAG}", "", answer)
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", answer):
        depth += 1 if brace[0] == "{" else -1
        if depth < 0:
            answer = answer[: brace.start()]
            break
    # Also the rest of LaTeX's spaces, such as `\\,`
    stripped = answer.rstrip(_STRIPPED + _EMPHASIS_AND_QUOTES).rstrip("\\" + _STRIPPED)
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if opening not in stripped:
            stripped = stripped.removesuffix(closing)
    if stripped.count("$") % 2:
        stripped = stripped.removesuffix("$")
    start = len(stripped) - len(stripped.lstrip(_STRIPPED + _EMPHASIS_AND_QUOTES))
    # .5 is a number, ...5 is not
    if re.search(r"(?<!\.)\.$", stripped[:start]) and stripped[start : start + 1].isdigit():
        start -= 1
    return stripped[start:].rstrip(_STRIPPED + _EMPHASIS_AND_QUOTES) or None


def find_box(response: str) -> str | None:
    r"""Return what is inside the last literal `\boxed{...}`, or `None` if no box is closed."""
    # One pass with a stack: a response may hold thousands of boxes that never close
    opened: list[int | None] = []
    last: tuple[int, int] | None = None
    for found in _BRACE.finditer(response):
        if found.group() == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = (start, found.start())
        else:
            opened.append(found.end() if len(found.group()) > 1 else None)
    return None if last is None else response[last[0] : last[1]]


def find_letter(answer: str, exact: bool = False) -> str | None:
    """
    Return the letter of a choice that an answer begins with, as a capital, or `None` if it begins with a word or names two letters.

    Args:
        answer: An answer line or the content of a box: `B`, `(B)`, `B. 42`, `**B**`, `Option B`.
        exact: The authors' letter match.
    """
    # Full-width and circled letters are letters too
    found = _EXACT_LETTER.match(answer) if exact else _LETTER.match(unicodedata.normalize("NFKC", answer))
    return found[1].upper() if found else None
