"""Measures of a rollout's or an answer's text: repetition, words of doubt. Plain Python, cheap enough for every step."""

import re
import zlib

# The rule for collapse in on-policy distillation: the last 10,000 characters compress more than 10x
COMPRESSED_TAIL_CHARACTERS = 10_000
COMPRESSION_RATIO_LIMIT = 10.0
# Ours, because a text below about 1,000 characters cannot compress 10x. Four copies are more than the parallel sentences of a
# worked solution, and 60 characters are more than a ruler or "1, 1, 1" in a list.
LOOP_COPIES = 4
LOOP_CHARACTERS = 60
# In self-distillation, fewer of these words went along with lower accuracy (epistemic suppression)
EPISTEMIC_WORDS = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
_EPISTEMIC = re.compile(rf"\b(?:{'|'.join(EPISTEMIC_WORDS)})\b", re.IGNORECASE)


def epistemic_words(text: str) -> int:
    """Return how many words of doubt and checking a text has (wait, perhaps, maybe ...)."""
    return len(_EPISTEMIC.findall(text))


def compresses(text: str) -> bool:
    """Whether an answer's last 10,000 characters compress more than 10x with zlib: the rule for collapse of long answers."""
    data = text.rstrip()[-COMPRESSED_TAIL_CHARACTERS:].encode()
    return len(data) > COMPRESSION_RATIO_LIMIT * len(zlib.compress(data))


def repeats_itself(text: str) -> bool:
    """Whether an answer ends in repetition, by either of two rules.

    1. Its last 10,000 characters compress more than 10x with zlib: the rule for long answers.
    2. It ends in a loop: the same characters at least four times in a row, over at least 60 characters. The
       last copy may be cut, and white space at the end does not count. Short answers cannot meet the first rule.

    Only the first rule finds a loop that ends before the answer does, or a loop whose copies differ in a number.
    """
    tail = text.rstrip()[-COMPRESSED_TAIL_CHARACTERS:]
    if not tail:
        return False
    return compresses(text) or _ends_in_loop(tail)


def _ends_in_loop(text: str) -> bool:
    # A loop of any period is so long that these characters at its end also stand one period before
    shared = LOOP_CHARACTERS - LOOP_CHARACTERS // LOOP_COPIES
    end = text[-shared:]
    start = len(text) - shared
    while (start := text.rfind(end, 0, start + shared - 1)) >= 0:
        period = len(text) - shared - start
        length = max(LOOP_COPIES * period, LOOP_CHARACTERS)
        if length > len(text):
            return False
        if text[len(text) - length : -period] == text[len(text) - length + period :]:
            return True
    return False
