"""The conciseness instructions, and how the teacher's prompt is built from the student's.

As in TRL, a prompt is a string (standard format) or a list of messages (conversational format).
"""

import copy
import re
from pathlib import Path
from typing import Any, Literal

Prompt = str | list[dict[str, Any]]

# The first sentence of the prompt that DAPO-Math-17k gives the student. In the teacher's prompt the instruction replaces it
# (paper, Figure 2).
DAPO_OPENING_SENTENCE = "Solve the following math problem step by step."

# v1 and v2 are the paper's, word for word (Sec. 3, Appendix "Prompts"; in v1 the paper prints a colon after "Be direct",
# the authors' code a dash). The paper prints v3, v4 and v5 only in abridged form, so their wording here is our own. We added
# "general" for prompts that are not math problems.
INSTRUCTIONS: dict[str, str] = {
    "v1": (
        "Solve the following math problem concisely and correctly. Be direct: avoid unnecessary elaboration, redundant "
        "steps, or restating the problem. Focus only on the key reasoning steps needed to reach the answer."
    ),
    "v2": (
        "Solve the following math problem concisely and correctly. Prioritize a correct final answer above brevity. For "
        "straightforward problems, be direct: avoid unnecessary elaboration, redundant steps, or restating the problem. "
        "For difficult or multi-step problems, do NOT over-compress: keep every reasoning step needed for correctness, "
        "including case analysis, edge cases, and a brief check of the final answer. Never omit a step that the answer "
        "depends on."
    ),
    "v3": (
        "Solve the following math problem and write only what is needed. Omit restatements of the problem, narration of "
        "what you are about to do, and obvious arithmetic. Keep every logically necessary step: case splits, the key "
        "idea, and a one-line check of the answer."
    ),
    "v4": (
        "Solve the following math problem for an expert reader who wants only the essential reasoning. Give the key steps "
        "and the decisive computation; skip standard facts and narration. Include any case analysis and checks that the "
        "answer requires."
    ),
    "v5": (
        "Solve the following math problem as a minimal numbered list. Each step is one short line, without prose and "
        "without restating the problem. Keep every required case, and end with a one-line verification."
    ),
    "general": (
        "Respond concisely and correctly. Be direct: avoid unnecessary elaboration, redundant steps, or restating the "
        "request. Keep everything that the correctness of the response depends on."
    ),
}

# Explicit targets for ablations (authors' code). The paper finds that qualitative instructions work better.
_PERCENT_TEMPLATE = (
    "Solve the following math problem correctly using {percent}% fewer tokens than you normally would. Be more concise -- "
    "cut unnecessary elaboration, redundant steps, and verbose explanations while preserving correctness."
)
_WORDS_TEMPLATE = (
    "Solve the following math problem correctly in at most {words} words. Be concise -- state only the essential "
    "reasoning steps and skip any unnecessary elaboration."
)


# Signs of a math problem: a digit, LaTeX, or a word of mathematics
_MATH = re.compile(
    r"\d|\\[a-zA-Z(\[]|\$|\b(?:equation|integer|prove|polynomial|triangle|probability|sum|solve)\b", re.IGNORECASE
)


def speaks_of_math(instruction: str) -> bool:
    """Return whether an instruction speaks of a math problem."""
    return "math problem" in instruction


def looks_like_math(prompt: Prompt) -> bool:
    """Return whether a prompt may be a math problem: its last message has a digit, LaTeX, or a word of mathematics."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return _MATH.search(text) is not None


def resolve_instruction(instruction: str) -> str:
    """
    Return the text that `instruction` stands for.

    Args:
        instruction: A name from the catalogue (a key of [`INSTRUCTIONS`], `"percent:50"`, `"words:200"`), the path of a
            `.txt` file, or the text itself (any text with a space). `""` stands for no instruction.

    Returns:
        The instruction's text, without surrounding whitespace.

    Raises:
        ValueError: If a single word is not a name in the catalogue, a target is out of range, or the file is empty.
        FileNotFoundError: If the `.txt` file does not exist.
    """
    text = instruction.strip()
    if text in INSTRUCTIONS:
        return INSTRUCTIONS[text]
    if target := re.fullmatch(r"(percent|words):(.*)", text):
        kind, value = target.groups()
        if not value.isdecimal() or int(value) < 1 or (kind == "percent" and int(value) > 99):
            limit = "a whole number from 1 to 99" if kind == "percent" else "a whole number of at least 1"
            raise ValueError(f"instruction={instruction!r}: {kind!r} takes {limit}, as in '{kind}:50'.")
        template = _PERCENT_TEMPLATE if kind == "percent" else _WORDS_TEMPLATE
        return template.format(**{kind: int(value)})
    if text.endswith(".txt") and "\n" not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"instruction={instruction!r}: there is no such file (looked in {path.resolve().parent}). Give an existing "
                ".txt file, the text itself, or a name from the catalogue."
            )
        # utf-8-sig removes the byte order mark that some editors write; the model would read it
        text = path.read_text(encoding="utf-8-sig").strip()
        if not text:
            raise ValueError(f"instruction={instruction!r}: the file is empty. Use instruction='' for no instruction.")
        return text
    if text and not re.search(r"\s", text):
        raise ValueError(
            f"instruction={instruction!r} is not a name in the catalogue. The names are {', '.join(INSTRUCTIONS)}, percent:N "
            "and words:N. To give the text itself, write at least two words; to give a file, let its name end in .txt."
        )
    return text


def build_teacher_prompt(
    prompt: Prompt,
    instruction: str,
    replaces: str | None,
    role: Literal["user", "system"] = "user",
) -> tuple[Prompt, bool]:
    """
    Put the instruction's text into a student's prompt.

    The user's text becomes the instruction, a blank line and the text. If the text starts with `replaces`, that part is removed
    first, so that a DAPO row becomes the teacher's prompt of the paper's Figure 2. With `role="system"` the instruction is
    appended to the system message (which is added if there is none), and `replaces` is still removed from the user's text.

    Args:
        prompt: The student's prompt, a string or a list of messages. Not modified.
        instruction: The instruction's text, as [`resolve_instruction`] returns it. `""` leaves the prompt as it is.
        replaces: The student's own instruction, to remove from the user's text. `None` removes nothing.
        role: Where the instruction goes: into the first user message, so that it comes before any tool turn, or into the system
            message.

    Returns:
        The teacher's prompt, of the same type as `prompt`, and whether `replaces` was found and removed.

    Raises:
        ValueError: If there is no message that can take the instruction.
    """
    if not instruction:
        return copy.deepcopy(prompt), False
    if isinstance(prompt, str):
        if role == "system":
            raise ValueError(
                "instruction_role='system' needs prompts that are lists of messages, and this prompt is a string. Use "
                "instruction_role='user', or give the prompts as messages."
            )
        return _insert(prompt, instruction, replaces)

    messages = copy.deepcopy(prompt)
    user = next((message for message in messages if message["role"] == "user"), None)
    if user is None:
        raise ValueError(
            "the prompt has no message of role 'user' that the instruction could go into; its roles are "
            f"{[message['role'] for message in messages]}. Add a user message, or give a `teacher_prompt` column."
        )
    user_instruction = instruction if role == "user" else ""
    if isinstance(user["content"], str):
        user["content"], replaced = _insert(user["content"], user_instruction, replaces)
    else:
        block = next((block for block in user["content"] if block.get("type") == "text"), None)
        if block is None:
            block = {"type": "text", "text": ""}
            user["content"].insert(0, block)
        block["text"], replaced = _insert(block["text"], user_instruction, replaces)
    if role == "system":
        _append_to_system(messages, instruction)
    return messages, replaced


def _insert(text: str, instruction: str, replaces: str | None) -> tuple[str, bool]:
    replaced = bool(replaces) and text.lstrip().startswith(replaces or "")
    if replaced:
        text = text.lstrip().removeprefix(replaces or "").lstrip()
    return "\n\n".join(part for part in (instruction, text) if part), replaced


def _append_to_system(messages: list[dict[str, Any]], instruction: str) -> None:
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": instruction})
    elif isinstance(messages[0]["content"], str):
        messages[0]["content"] = "\n\n".join(part for part in (messages[0]["content"], instruction) if part)
    else:
        messages[0]["content"].append({"type": "text", "text": instruction})
