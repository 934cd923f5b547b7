"""Which keys of `chat_template_kwargs` a user may set: flags of the template, but not arguments of its application."""

import argparse
import inspect
import json
from typing import Any


def check_chat_template_kwargs(flags: Any, field_name: str = "chat_template_kwargs") -> None:
    """
    Check that all keys of `chat_template_kwargs` are flags of the chat template.

    Args:
        flags: A mapping, or `None`.
        field_name: The user's name for it, for error messages.

    Raises:
        ValueError: If `flags` is not a mapping, or has a key that the trainer or the tokenizer sets. Such a key could change the
            prompts' end, cut them, or replace them.
    """
    if flags is None:
        return
    if not isinstance(flags, dict):
        raise ValueError(
            f"{field_name}={flags!r} has to be a mapping, such as {{'enable_thinking': False}}; it is a {type(flags).__name__}."
        )
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    # `documents` is allowed, because some templates take documents as content. Templates call the conversation `messages`
    reserved = ({*parameters, "messages"}) - {"self", "kwargs", "documents"}
    if taken := sorted(reserved & flags.keys()):
        raise ValueError(
            f"{field_name} has {', '.join(taken)}, which is not a flag of a chat template: it sets how the template is applied, and "
            "only the trainer sets that. Remove it, and keep the template's own flags, such as enable_thinking."
        )


def json_object(text: str) -> dict[str, Any]:
    """Read the flags from a command line, where they are JSON; for argparse's `type`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} has to be a JSON object, such as {{"enable_thinking": false}}')
    return value
