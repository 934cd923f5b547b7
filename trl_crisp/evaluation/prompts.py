"""From problems to the token ids of their prompts, and whether prompt and answer fit into the model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_crisp.evaluation.problems import Problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from trl_crisp.prompts.instructions import Prompt


def prompt_token_ids(
    problems: Sequence[Problem],
    instruction: str,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
    system: str | None = None,
) -> list[list[int]]:
    """
    Return the token ids of each problem's prompt, with the instruction at the place where training puts it.

    Raises:
        ValueError: If the model's chat template refuses the system message, or a whole prompt has no place for it.
    """
    import jinja2

    from trl_crisp.prompts.instructions import DAPO_OPENING_SENTENCE, Prompt, build_teacher_prompt

    prompts = []
    for problem in problems:
        asked: Prompt = problem.prompt if problem.is_whole_prompt else [{"role": "user", "content": problem.prompt}]
        if system is not None:
            asked = _with_system(asked, system, problem)
        messages, _ = build_teacher_prompt(asked, instruction, DAPO_OPENING_SENTENCE)
        if isinstance(messages, str):
            # As the trainer reads a prompt that is a text: without the chat template
            prompts.append(list(tokenizer(text=messages)["input_ids"]))
            continue
        try:
            rendered: Any = tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )
        except jinja2.TemplateError as error:
            if system is None:
                raise
            raise ValueError(
                f"system={system!r}: the model's chat template refuses it ({error}). Leave it out, or put it into the prompt_template."
            ) from error
        prompts.append(list(rendered["input_ids"]))
    return prompts


def _with_system(prompt: "Prompt", system: str, problem: Problem) -> "Prompt":
    if isinstance(prompt, str) or prompt[0]["role"] == "system":
        has = "is a text without messages" if isinstance(prompt, str) else "has a system message already"
        raise ValueError(
            f"system={system!r}: the prompt of problem {problem.id!r} {has}, and it is used as it is. Leave it out."
        )
    return [{"role": "system", "content": system}, *prompt]


def check_positions(
    config: "PretrainedConfig",
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    option: str = "--max-new-tokens (during training --eval_benchmark_max_new_tokens)",
) -> None:
    """
    Check that the model has enough positions for each prompt and its answer.

    A model with a stretched rotary embedding has more positions than its config's `max_position_embeddings`, and is not checked.

    Args:
        config: The model's config.
        problems: The error names the problem with the longest prompt.
        prompts: The token ids of each problem's prompt.
        max_new_tokens: An answer is cut at this many tokens.
        option: The user's name for the cap, for the error message.

    Raises:
        ValueError: If the longest prompt and its answer need more positions than the model has.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type", "default") != "default":
        return
    row, longest = max(enumerate(prompts), key=lambda pair: len(pair[1]))
    prompt_tokens = len(longest)
    if prompt_tokens + max_new_tokens <= positions:
        return
    problem = f"problem {problems[row].id!r} (row {row})"
    if prompt_tokens >= positions:
        raise ValueError(
            f"{problem} has a prompt of {prompt_tokens} tokens, and the model was made for {positions} positions: there is no room for "
            "an answer. Shorten or remove the row."
        )
    raise ValueError(
        f"max_new_tokens={max_new_tokens} after a prompt of {prompt_tokens} tokens, that of {problem}, needs "
        f"{prompt_tokens + max_new_tokens} positions, and the model was made for {positions}: beyond them its answers mean "
        f"nothing. Give {option} {positions - prompt_tokens} or less."
    )
