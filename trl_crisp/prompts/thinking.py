"""The number of thinking tokens in a completion; its other tokens are the answer. Training and evaluation share this rule."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class ThinkIds(NamedTuple):
    """The token ids of `<think>` and `</think>`."""

    open_id: int
    close_id: int


def find_think_ids(tokenizer: Any, chat_template: Any = None) -> ThinkIds | None:
    """
    Return the ids of `<think>` and `</think>`, or `None` if the model does not think.

    A model thinks if its chat template contains these tokens and its tokenizer has each of them as one token.

    Args:
        tokenizer: The model's tokenizer.
        chat_template: The template that renders the prompts; the tokenizer's own if `None`.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None) or ""
    ids = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    known = all(token_id is not None and token_id != tokenizer.unk_token_id for token_id in ids)
    return ThinkIds(*ids) if known and "think>" in str(template) else None


def count_thinking_tokens(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], counted: Sequence[int], think_ids: ThinkIds | None
) -> int:
    """
    Count the tokens of a completion that are thinking, including the tokens that open and close it.

    A completion with tool turns may think several times. If the first `<think>` or `</think>` of a completion is the closing one, the
    model has left out the opening one, and the tokens before it are thinking.

    Args:
        prompt_ids: The prompt's token ids. If its last `<think>` is not closed, the completion begins with thinking.
        completion_ids: The completion's token ids.
        counted: 1 for a token that counts, 0 for a token that a tool or the template wrote. A token that does not count can still open
            or close thinking.
        think_ids: See [`find_think_ids`].

    Returns:
        The number of thinking tokens. Thinking that is never closed reaches to the end. 0 if `think_ids` is `None`.
    """
    if think_ids is None:
        return 0
    last_of_prompt = next((token_id for token_id in reversed(prompt_ids) if token_id in think_ids), think_ids.close_id)
    first = next((token_id for token_id in completion_ids if token_id in think_ids), None)
    thinks = last_of_prompt == think_ids.open_id or first == think_ids.close_id
    count = 0
    for token_id, counts in zip(completion_ids, counted, strict=True):
        thinks = thinks or token_id == think_ids.open_id
        count += thinks and bool(counts)
        thinks = thinks and token_id != think_ids.close_id
    return count
