"""Checks before vLLM starts that the longest prompt and the longest rollout fit into the model's context."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

# What vLLM takes if the model's config names no length
VLLM_DEFAULT_TOKENS = 2048
# Kinds of rotary embeddings whose `max_position_embeddings` is the length that the scaling reaches
_SCALED_ALREADY = {
    "default",
    "su",
    "longrope",
    "llama3",
    "yarn",
    "deepseek_yarn",
    "deepseek_llama_scaling",
    "proportional",
}


def check_engine_limits(
    model: Any,
    model_init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    max_model_tokens: int | None,
    max_prompt_tokens: int | None,
    max_completion_tokens: int,
) -> None:
    """
    Check that vLLM can hold the longest prompt and its rollout. The config has checked vLLM's own limit, `vllm_max_model_length`.

    Args:
        model: The student, or its id or path.
        model_init_kwargs: With which the student is loaded.
        trust_remote_code: As in transformers, unless `model_init_kwargs` says it.
        max_model_tokens: The colocated engine's limit; `None` if it takes the model's own, or if a server has one.
        max_prompt_tokens: The longest prompt that is kept; `None` keeps all, and then one token is counted.
        max_completion_tokens: The cap of the rollouts.

    Raises:
        ValueError: If they do not fit; the message names the numbers. vLLM would fail at its start, or cut the rollouts short.
    """
    if isinstance(model, str):
        kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
        read = {
            name: kwargs[name] for name in ("trust_remote_code", "revision", "cache_dir", "token") if kwargs.get(name)
        }
        config = AutoConfig.from_pretrained(model, **read)
    else:
        config = model.config
    context_tokens = context_limit_tokens(config)
    if max_model_tokens is not None:
        if context_tokens is not None and max_model_tokens > context_tokens:
            raise ValueError(
                f"vllm_max_model_length={max_model_tokens} is more than the model's context of {context_tokens} tokens. Set it to at most "
                f"{context_tokens}."
            )
        return
    known = (
        "the model's context"
        if context_tokens is not None
        else "what vLLM assumes without a length in the model's config,"
    )
    limit_tokens = VLLM_DEFAULT_TOKENS if context_tokens is None else context_tokens
    prompt_tokens = max_prompt_tokens or 1
    if prompt_tokens + max_completion_tokens > limit_tokens:
        room_tokens = limit_tokens - prompt_tokens
        lower = f"max_completion_length to at most {room_tokens}" if room_tokens > 0 else "max_prompt_length"
        raise ValueError(
            f"max_prompt_length={max_prompt_tokens} and max_completion_length={max_completion_tokens} are together more than {known} of "
            f"{limit_tokens} tokens, so vLLM would cut rollouts short. Lower {lower}"
            + ("." if context_tokens is not None else ", or set vllm_max_model_length.")
        )


def context_limit_tokens(config: PretrainedConfig) -> int | None:
    """Return the tokens of a model's context, as vLLM 0.31 derives them from its config; `None` if the config names none."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if limit is None or not rope:
        return limit
    # One dict, or one for each kind of layer
    for one in [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]:
        if one.get("rope_type") == "longrope":
            return getattr(text, "original_max_position_embeddings", None) or limit
        if one.get("rope_type") not in _SCALED_ALREADY and "gemma3" not in config.model_type:
            limit = int(limit * (one.get("factor") or 1.0))
    return limit
