"""The answers of the lab's task in a compact code, in which agreement and accuracy can be counted again."""

from collections.abc import Sequence

# The codes of one prompt's answers: the right one, each wrong answer of the base (a letter, in the order of their appearance), a wrong
# answer that the base never gives, and no answer
RIGHT, OTHER, NONE = "T", ".", "-"
WRONG = "abcdefghijklmnopqrstuvwxyz"


def answer_of(text: str) -> str | None:
    """Return the final answer of a solution, or `None`."""
    _, found, tail = text.rpartition("so answer ")
    return tail.strip() or None if found else None


class AnswerCode:
    """
    The code of the answers to some prompts.

    Args:
        right: The right answer of each prompt, as the model writes it.
        base_texts: The base's solutions, [prompts, samples].
    """

    def __init__(self, right: Sequence[str], base_texts: Sequence[Sequence[str]]) -> None:
        self.right = list(right)
        self.wrong: list[dict[str, str]] = []
        for sum_, texts in zip(right, base_texts, strict=True):
            answers = dict.fromkeys(answer for text in texts if (answer := answer_of(text)) not in (None, sum_))
            self.wrong.append(dict(zip(answers, WRONG, strict=False)))

    def encode(self, prompt: int, text: str) -> str:
        """Return the code of a solution to a prompt, one character."""
        answer = answer_of(text)
        if answer is None:
            return NONE
        return RIGHT if answer == self.right[prompt] else self.wrong[prompt].get(answer, OTHER)
