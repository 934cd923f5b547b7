"""Thinking and answer tokens, counted against a reading of the text with a regular expression."""

import itertools
import re

import pytest

from trl_crisp.prompts.thinking import count_thinking_tokens

OPEN, CLOSE = 7, 8
LETTERS = {"a": 1, "b": 2, "(": OPEN, ")": CLOSE}


def count(text: str, starts_open: bool) -> int:
    ids = [LETTERS[letter] for letter in text]
    return count_thinking_tokens(ids, [1] * len(ids), OPEN, CLOSE, starts_open)


def test_tokens_of_a_tool_open_and_close_thinking_and_do_not_count():
    """The next turn's opener can be the template's."""
    ids = [LETTERS[letter] for letter in "(a)b(aa)b"]
    assert count_thinking_tokens(ids, [1, 1, 1, 1, 0, 1, 1, 1, 1], OPEN, CLOSE, False) == 6


@pytest.mark.parametrize(
    ("text", "starts_open", "thinking"),
    [
        ("(aa)bb", False, 4),  # the model opens
        ("aa)bb", True, 3),  # the prompt opened
        ("bbb", False, 0),  # no thinking, or the prompt closed it (Qwen3 with enable_thinking=False)
        ("aaa", True, 3),  # truncated while thinking
        ("(aa", False, 3),
        ("(aa)", False, 4),
        (")bb", True, 1),
        ("aa)bb", False, 3),  # the model left the opening token out
        ("b(aa)bb", False, 4),  # not what stands before it
        ("(a)b(aa)bb", False, 7),  # two turns with a tool's between them
        ("a)b(aa)bb", True, 6),
        ("(a)b(aa", False, 6),
        ("(a)b)b", False, 3),  # a second closing token closes nothing
        ("", True, 0),
        ("", False, 0),
    ],
)
def test_thinking_tokens_of_texts_counted_by_hand(text, starts_open, thinking):
    assert count(text, starts_open) == thinking


@pytest.mark.parametrize("starts_open", [True, False])
def test_the_count_agrees_with_a_regular_expression_on_every_short_text(starts_open):
    for letters in itertools.chain.from_iterable(itertools.product("a()", repeat=n) for n in range(7)):
        text = "".join(letters)
        opened = text if not starts_open and not re.match(r"[^()]*\)", text) else f"<{text}"
        blocks = re.findall(r"[<(][^)]*\)?", opened)
        assert count(text, starts_open) == sum(len(block) for block in blocks) - opened.count("<"), text
