"""How many of a completion's tokens are thinking, how many answer."""

from collections.abc import Sequence


def count_thinking_tokens(completion_ids: Sequence[int], open_id: int, close_id: int, starts_open: bool) -> int:
    """
    Count the tokens of a completion up to and including the one that closes its thinking.

    Args:
        completion_ids: The completion's token ids.
        open_id: Token id of `<think>`.
        close_id: Token id of `</think>`.
        starts_open: Whether the prompt ends inside an open `<think>`.

    Returns:
        Tokens of thinking: all of them where it was opened and never closed, 0 where there was none.
    """
    if close_id in completion_ids:
        return list(completion_ids).index(close_id) + 1
    return len(completion_ids) if starts_open or open_id in completion_ids else 0
