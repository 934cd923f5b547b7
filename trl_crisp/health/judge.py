"""Which measure says whether the answers hold: accuracy where there are labels, else agreement."""

from typing import Literal

Judge = Literal["accuracy", "agreement"]

# Ours: labels count if at least this share of the prompts has them, as many as need a reference for agreement
MIN_SHARE_WITH_LABEL = 0.5


def has_labels(prompts: int, labelled: int) -> bool:
    """Whether enough prompts have a right answer for labels to count: half of them, and two."""
    return labelled >= max(2, MIN_SHARE_WITH_LABEL * prompts)


def choose_judge(
    prompts: int, labelled: int, accuracy: float | None, agreement: float | None, margin: float
) -> Judge | None:
    """
    Return what says whether answers hold.

    Labels win over agreement if enough prompts have them ([`has_labels`]). A level that is not above the margin cannot fall by more than
    it, so it does not judge.

    Args:
        prompts, labelled: How many prompts are asked, and how many have a right answer.
        accuracy, agreement: The base's own levels, as shares; `None` if they are not measured.
        margin: How far a measure may fall, as a share of all answers.
    """
    if has_labels(prompts, labelled) and accuracy is not None and accuracy > margin:
        return "accuracy"
    return "agreement" if agreement is not None and agreement > margin else None
