"""Which keys of `chat_template_kwargs` are flags of a chat template, and which steer how it is applied."""

import inspect
from typing import Any


def check_chat_template_kwargs(flags: Any, field_name: str = "chat_template_kwargs") -> None:
    """
    Check that what goes into a chat template beside the messages are flags of the template.

    Args:
        flags: A mapping, or `None`.
        field_name: What the user calls it, for the messages.

    Raises:
        ValueError: For what is no mapping, and for keys that we or the tokenizer set: with them the prompts would end otherwise,
            be cut, or not be the rows'.
    """
    if flags is None:
        return
    if not isinstance(flags, dict):
        raise ValueError(
            f"{field_name}={flags!r} has to be a mapping, such as {{'enable_thinking': False}}; it is a {type(flags).__name__}."
        )
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    # Documents are content that some templates take; `messages` is what templates call the conversation
    reserved = ({*parameters, "messages"}) - {"self", "kwargs", "documents"}
    if taken := sorted(reserved & flags.keys()):
        raise ValueError(
            f"{field_name} has {', '.join(taken)}, which is no flag of a chat template: it says how the template is applied, which is "
            "not for the user to set. Remove it, and keep the template's own flags, such as enable_thinking."
        )
