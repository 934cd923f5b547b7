"""Checks that a prompt is a non-empty text or a valid list of messages."""

from typing import Any, Literal

PromptKind = Literal["text", "messages"]

_FORM = "a prompt is a string or a list of messages with 'role' and 'content'"
_WAY_OUT = "Correct or remove such rows."
_KIND_NAMES = {"text": "a string", "messages": "a list of messages"}


def check_prompt(prompt: Any, where: str, kind: PromptKind | None = None) -> PromptKind:
    """
    Check a prompt's form and that it is not empty.

    Args:
        prompt: A row's value.
        where: The row and the column, for the error message.
        kind: The kind of the prompts before it. If `None`, any kind is accepted.

    Returns:
        The kind of this prompt.

    Raises:
        ValueError: If the prompt is null, empty or of another kind, or a message has no role or content. The message has `where`.
    """
    if prompt is None:
        raise ValueError(f"{where} holds nothing (null), and {_FORM}. {_WAY_OUT}")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} holds an empty prompt ({prompt[:80]!r}), which asks for nothing. {_WAY_OUT}")
        found: PromptKind = "text"
    elif isinstance(prompt, list):
        _check_messages(prompt, where)
        found = "messages"
    else:
        raise ValueError(f"{where} holds a {type(prompt).__name__} ({str(prompt)[:80]!r}), and {_FORM}. {_WAY_OUT}")
    if kind is not None and found != kind:
        raise ValueError(
            f"{where} holds {_KIND_NAMES[found]} ({str(prompt)[:80]!r}), and the rows before it {_KIND_NAMES[kind]}: a chat "
            f"template applies to messages only, so all prompts must be of one type. {_WAY_OUT}"
        )
    return found


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise ValueError(f"{where} holds an empty prompt, a list without messages. {_WAY_OUT}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"{where} holds a list with a {type(message).__name__} ({str(message)[:80]!r}), and {_FORM}. {_WAY_OUT}"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role.strip():
            raise ValueError(
                f"{where}: message {i} has no 'role'; its keys are {', '.join(map(str, message)) or 'none'}, and {_FORM}. "
                f"{_WAY_OUT}"
            )
        # A message with tool calls needs no other content
        if content is None and role != "user" and message.get("tool_calls"):
            continue
        if content is None:
            has = "'content' null" if "content" in message else "no 'content'"
            raise ValueError(
                f"{where}: message {i}, of role {role!r}, has {has}; only an assistant's message with 'tool_calls' may lack "
                f"it. {_WAY_OUT}"
            )
        if not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(block, dict) for block in content)
        ):
            raise ValueError(
                f"{where}: message {i}, of role {role!r}, has a 'content' that is neither a string nor a list of blocks "
                f"({str(content)[:80]!r}). {_WAY_OUT}"
            )
    users = [message["content"] for message in messages if message["role"] == "user"]
    if users and _says_nothing(users[-1]):
        raise ValueError(f"{where} holds an empty prompt: its last user message is empty. {_WAY_OUT}")


def _says_nothing(content: str | list[dict[str, Any]]) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(block.get("type") != "text" or str(block.get("text") or "").strip() for block in content)
