"""The base's own answers as a reference: which final answer most of its samples give, and how often it agrees with itself.

Accuracy needs labels. Agreement with the base's majority answers does not, and it falls when accuracy falls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trl_crisp.evaluation.answers import find_answer, find_box, find_letter
from trl_crisp.evaluation.grading import Grade, Grader, Kind
from trl_crisp.evaluation.metrics import Interval, paired_bootstrap_difference
from trl_crisp.evaluation.notation import read_gold
from trl_crisp.evaluation.text_answers import after_thinking, words

# Ours: with one sample nothing can agree
MIN_SAMPLES = 2


@dataclass(frozen=True)
class Votes:
    """
    The samples of one prompt and which of them give the same final answer.

    Attributes:
        answers: The final answer of each sample, [samples]; `None` if none was found.
        agrees: [samples, samples]; `agrees[j][i]` says whether sample j gives the answer of sample i. A column is false if sample i has
            no answer.
    """

    answers: list[str | None]
    agrees: list[list[bool]]


@dataclass(frozen=True)
class Reference:
    """
    The base's majority answer to one prompt.

    Attributes:
        answer: The majority's final answer.
        votes: How many samples give it.
        base_agreement: The base's own level, in [0, 1]: the share of its samples that agree with the majority of its other samples.
    """

    answer: str
    votes: int
    base_agreement: float


def count_votes(
    texts: Sequence[Sequence[str]], kind: Kind, answer_of: Callable[[str], str | None] | None = None
) -> list[Votes]:
    """
    Find out which samples of each prompt give the same final answer.

    Args:
        texts: The sampled answers of each prompt, [prompts, samples].
        kind: How final answers are compared, as in [`~trl_crisp.evaluation.grading.grade`]. For `"text"` only an answer line is a final
            answer, because no two samples have the same first sentence.
        answer_of: Returns the final answer of a text, or `None`; two are equal if these strings are. It replaces `kind`.

    Raises:
        ValueError: If a prompt has fewer than two samples.
    """
    if few := [number for number, samples in enumerate(texts) if len(samples) < MIN_SAMPLES]:
        raise ValueError(
            f"prompt {few[0]} has {len(texts[few[0]])} sample(s): a majority needs at least {MIN_SAMPLES}, better 5 (monitor_samples)."
        )
    if answer_of is not None:
        found = [[answer_of(text) for text in samples] for samples in texts]
        return [
            Votes(answers, [[one is not None and one == other for one in answers] for other in answers])
            for answers in found
        ]
    with Grader() as grader:
        answers = find_final_answers(texts, kind, grader)
        # Each distinct answer is a gold once, for all samples of its prompt
        jobs = [
            (number, gold, j)
            for number, row in enumerate(answers)
            for gold in dict.fromkeys(answer for answer in row if answer is not None)
            for j in range(len(row))
        ]
        grades = grader.grade_all([(texts[number][j], gold) for number, gold, j in jobs], kind)
    right = {job for job, grade in zip(jobs, grades, strict=True) if agrees(grade, job[1], kind)}
    return [
        Votes(row, [[answer is not None and (number, answer, j) in right for answer in row] for j in range(len(row))])
        for number, row in enumerate(answers)
    ]


def checked(answer_of: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """
    Return a user's function that finds the final answer of a text, with a check of what it returns. A blank answer is none.

    Answers are kept as JSON, which has no tuples, so those of other types would not be equal after a resume.

    Raises:
        TypeError: When it is called, if it returns something else than a text or `None`.
    """

    def find(text: str) -> str | None:
        answer = answer_of(text)
        if not isinstance(answer, str | None):
            raise TypeError(
                f"answer_of returned {answer!r}, of type {type(answer).__name__}. Return the final answer as a str, such as str(answer), or None if the "
                "text has none."
            )
        # Empty answers of cut texts are no majority
        return answer if answer is not None and answer.strip() else None

    return find


def agrees(grade: Grade, answer: str, kind: Kind) -> bool:
    """
    Whether a graded sample gives the reference's answer.

    A text's first sentence is no final answer, so only its answer line counts, and it has to be the answer and no more: a line that names
    several, or denies one, has the answer's words too.
    """
    if kind == "text":
        return grade.answer is not None and words(grade.answer) == words(answer)
    return grade.correct


def final_texts(texts: Sequence[Sequence[str]], is_all_thinking: Sequence[Sequence[bool]]) -> list[list[str]]:
    """
    Return what each text says after its thinking, [prompts, samples]; an empty text if its thinking never ends.

    Args:
        texts: [prompts, samples].
        is_all_thinking: [prompts, samples]. By the token ids, because a prompt may have opened the thinking that is not closed.
    """
    return [
        ["" if thinks else after_thinking(text) for text, thinks in zip(row, flags, strict=True)]
        for row, flags in zip(texts, is_all_thinking, strict=True)
    ]


def find_final_answers(texts: Sequence[Sequence[str]], kind: Kind, grader: Grader) -> list[list[str | None]]:
    """Return the final answer of each text, [prompts, samples]; `None` if none was found, or if it cannot be read as its kind."""
    answers = [[_final_answer(text, kind) for text in samples] for samples in texts]
    if kind != "math":
        return answers
    flat = sorted({answer for row in answers for answer in row if answer is not None})
    readable = {answer for answer, is_read in zip(flat, grader.readable(flat), strict=True) if is_read}
    return [[answer if answer in readable else None for answer in row] for row in answers]


def _final_answer(text: str, kind: Kind) -> str | None:
    text = after_thinking(text)
    line = find_answer(text)
    if kind == "text":
        # As the grader reads it, which may find a box without a word in a line with words
        return line if line is not None and words(read_gold(line)) else None
    found = line if line is not None else find_box(text)
    if found is None or kind == "math":
        return found
    letter = find_letter(found)
    return letter if letter is not None and letter <= "J" else None


def find_reference(votes: Votes) -> Reference | None:
    """
    Return the majority answer of a prompt's samples: the answer that most of them give, the first one if several do.

    Returns:
        `None` if no sample has an answer, or if several have one and no two agree.
    """
    counts = np.asarray(votes.agrees, dtype=int).sum(axis=0)
    answered = [i for i, answer in enumerate(votes.answers) if answer is not None]
    if not answered or (counts.max() == 1 and len(answered) > 1) or counts.max() == 0:
        return None
    first = int(counts.argmax())
    answer = votes.answers[first]
    assert answer is not None
    return Reference(answer, int(counts[first]), _leave_one_out(votes))


def _leave_one_out(votes: Votes) -> float:
    """Return the share of samples that agree with the majority of the others; if several answers lead there, their mean."""
    matrix = np.asarray(votes.agrees, dtype=float)
    levels = []
    for j in range(len(matrix)):
        others = [i for i in range(len(matrix)) if i != j and votes.answers[i] is not None]
        # The votes of the others for the answers of the others
        counts = [matrix[[k for k in range(len(matrix)) if k != j], i].sum() for i in others]
        leading = [i for i, count in zip(others, counts, strict=True) if count == max(counts)]
        levels.append(matrix[j, leading].mean() if leading else 0.0)
    return float(np.mean(levels))


def compare_agreement(references: Sequence[Reference], agreed: Sequence[Sequence[bool]]) -> Interval:
    """
    Return the change of agreement from the base's own level, with a paired 95% bootstrap interval over prompts.

    The base's level is measured against one sample fewer than the student's, so with few samples it is a little too low.

    Args:
        references: One for each prompt.
        agreed: Whether each of the student's samples gives the reference's answer, [prompts, samples].

    Raises:
        ValueError: If the numbers of prompts differ, or there are fewer than two.
    """
    base = [reference.base_agreement for reference in references]
    return paired_bootstrap_difference(base, [float(np.mean(row)) for row in agreed])
