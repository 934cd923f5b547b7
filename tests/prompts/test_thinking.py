"""Thinking and answer tokens, counted against a reading of the text with a regular expression."""

import itertools
import re

import pytest

from tests.tiny_models import tiny_tokenizer
from trl_crisp.prompts.thinking import ThinkIds, count_thinking_tokens, find_think_ids

THINK_IDS = ThinkIds(open_id=7, close_id=8)
LETTERS = {"a": 1, "b": 2, "(": 7, ")": 8}


def ids_of(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


def count(text: str, starts_open: bool) -> int:
    return count_thinking_tokens(ids_of("ab(" if starts_open else "ab"), ids_of(text), [1] * len(text), THINK_IDS)


def test_tokens_of_a_tool_open_and_close_thinking_and_do_not_count():
    """The next turn's opener can be the template's."""
    assert count_thinking_tokens([], ids_of("(a)b(aa)b"), [1, 1, 1, 1, 0, 1, 1, 1, 1], THINK_IDS) == 6


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [("", 0), ("ab", 0), ("a(", 2), ("a(b", 2), ("a()", 0), ("a(b)a", 0), ("(a)a(", 2), ("(a)b(a)", 0), (")(", 2)],
)
def test_a_prompt_that_ends_inside_an_open_think_begins_thinking(prompt, thinking):
    assert count_thinking_tokens(ids_of(prompt), ids_of("ab"), [1, 1], THINK_IDS) == thinking


def test_a_model_that_does_not_think_has_no_thinking_tokens():
    assert count_thinking_tokens(ids_of("("), ids_of("(a)"), [1, 1, 1], None) == 0


def test_the_ids_are_found_if_template_and_tokenizer_have_them():
    thinking, plain = tiny_tokenizer("qwen3"), tiny_tokenizer("qwen3")
    ids = find_think_ids(thinking)
    assert thinking.convert_ids_to_tokens(list(ids)) == ["<think>", "</think>"]
    # The template that renders the prompts decides, not the tokenizer's own
    plain.chat_template = "{{ messages[0].content }}"
    assert find_think_ids(plain) is None
    assert find_think_ids(plain, thinking.chat_template) == ids
    assert find_think_ids(thinking, plain.chat_template) is None


def test_a_tokenizer_without_the_tokens_has_no_ids():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<think>{{ messages[0].content }}</think>"
    assert find_think_ids(tokenizer) is None


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
