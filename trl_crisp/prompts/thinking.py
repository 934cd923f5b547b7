"""How many of a completion's tokens are thinking, how many answer."""

from collections.abc import Sequence


def count_thinking_tokens(
    completion_ids: Sequence[int], counted: Sequence[int], open_id: int, close_id: int, starts_open: bool
) -> int:
    """
    Count the tokens of a completion that are thinking, the tokens that open and close it among them.

    A completion with tool turns may think several times. Where the first of its tokens is the closing one, the model has
    left the opening one out, and what stands before was thinking.

    Args:
        completion_ids: The completion's token ids.
        counted: 1 for a token that counts, 0 for one that a tool or the template wrote; it may open or close thinking too.
        open_id: Token id of `<think>`.
        close_id: Token id of `</think>`.
        starts_open: Whether the prompt ends inside an open `<think>`.

    Returns:
        Tokens of thinking: to the end where it was opened and never closed, 0 where there was none.
    """
    first = next((token_id for token_id in completion_ids if token_id in (open_id, close_id)), None)
    thinks = starts_open or first == close_id
    count = 0
    for token_id, counts in zip(completion_ids, counted, strict=True):
        thinks = thinks or token_id == open_id
        count += thinks and bool(counts)
        thinks = thinks and token_id != close_id
    return count
