"""What is counted in the answers to the plain prompt and to the prompt with an instruction, and the paired changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_crisp.evaluation.answers import find_box
from trl_crisp.evaluation.grading import Grader, Kind
from trl_crisp.evaluation.metrics import (
    Interval,
    paired_bootstrap_difference,
    paired_bootstrap_reduction,
    share,
)
from trl_crisp.evaluation.row_answers import Labels
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.health.monitor import MIN_SHARE_WITH_REFERENCE
from trl_crisp.health.reference import (
    Reference,
    agrees,
    compare_agreement,
    count_votes,
    final_texts,
    find_final_answers,
    find_reference,
)
from trl_crisp.prompts.thinking import ThinkIds

Samples = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Thinking:
    """
    What `<think>` does in the prompts and in the answers to them. Shares are of all answers.

    Attributes:
        prompts_open: The share of prompts whose last `<think>` is open, so that the answer begins with thinking.
        prompts_close: The share of prompts that contain thinking, and it is closed (an empty block, for example).
        opened: The share of answers with thinking: the prompt opens it, or the answer does.
        closed: The share of answers that close it.
        mean_tokens: The mean tokens inside it, with those that open and close it.
    """

    prompts_open: float
    prompts_close: float
    opened: float
    closed: float
    mean_tokens: float


@dataclass(frozen=True)
class Counted:
    """
    What is counted in the answers to one kind of prompt. Shares are in [0, 1], of all answers.

    Attributes:
        mean_tokens: The mean length.
        truncated: The share that was cut at the cap.
        ended_by_eos: The share that the model ended.
        final_answer: The share with a final answer that can be read: an answer line, or else a box.
        boxed: The share with a closed box.
        agreement: The share that gives the plain prompt's majority answer. Of the plain prompt itself: the leave-one-out level.
            Over the prompts with a reference; `None` if fewer than half have one.
        accuracy: The share that is right, over the prompts with a right answer; `None` if fewer than two have one.
        thinking: `None` if the model does not think.
    """

    mean_tokens: float
    truncated: float
    ended_by_eos: float
    final_answer: float
    boxed: float
    agreement: float | None
    accuracy: float | None
    thinking: Thinking | None


@dataclass(frozen=True)
class Effect:
    """
    What an instruction changes, with paired 95% bootstrap intervals over prompts.

    Attributes:
        reduction: 1 - mean tokens under the instruction / mean tokens of the plain prompt.
        agreement_change: Of the share that gives the plain prompt's majority answer, from the plain prompt's leave-one-out level.
        accuracy_change: Of the share that is right.
    """

    reduction: Interval
    agreement_change: Interval | None
    accuracy_change: Interval | None


@dataclass(frozen=True)
class PromptScores:
    """
    The answers to one prompt of one kind, each in the order of sampling.

    Attributes:
        tokens: Their lengths.
        agrees: Whether each gives the reference's answer; `None` for the plain prompt, and without a reference.
        correct: Whether each is right; `None` without a right answer.
    """

    tokens: list[int]
    agrees: list[bool] | None
    correct: list[bool] | None


@dataclass(frozen=True)
class Measured:
    """
    All that was measured.

    Attributes:
        references: The plain prompt's majority answer to each prompt, or `None`.
        has_agreement: Whether at least half of the prompts have one, and at least two.
        plain, told: What is counted, of the plain prompt and under each instruction.
        effects: Of each instruction.
        plain_scores, told_scores: By prompt, and by instruction and prompt.
    """

    references: list[Reference | None]
    has_agreement: bool
    plain: Counted
    told: list[Counted]
    effects: list[Effect]
    plain_scores: list[PromptScores]
    told_scores: list[list[PromptScores]]


def measure(
    plain: Samples,
    told: Sequence[Samples],
    plain_ids: Sequence[Sequence[int]],
    told_ids: Sequence[Sequence[Sequence[int]]],
    labels: Labels,
    think_ids: ThinkIds | None,
    answer_of: Callable[[str], str | None] | None = None,
    on_graded: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """
    Count, grade and compare.

    Args:
        plain: The answers to the plain prompts, [prompts][samples].
        told: Those under each instruction, [instructions][prompts][samples].
        plain_ids, told_ids: The token ids of the prompts, [prompts] and [instructions][prompts].
        labels: The right answers, and how final answers are compared.
        think_ids: See [`~trl_crisp.prompts.thinking.find_think_ids`].
        answer_of: Returns the final answer of a text, or `None`; two are equal if these strings are. It replaces the labels' kind.
        on_graded: Receives how many kinds of prompts are graded, of how many.
    """
    kinds = [plain, *told]
    texts = [[[sample.text for sample in samples] for samples in kind] for kind in kinds]
    on_graded(0, len(kinds))
    # The user's own function gets the texts whole
    final = (
        texts
        if answer_of is not None
        else [final_texts(of, _all_thinking(k)) for of, k in zip(texts, kinds, strict=True)]
    )
    votes = count_votes(final[0], labels.kind, answer_of)
    references = [find_reference(one) for one in votes]
    known = [i for i, reference in enumerate(references) if reference is not None]
    has_agreement = len(known) >= max(2, MIN_SHARE_WITH_REFERENCE * len(references))
    majorities = [None if reference is None else reference.answer for reference in references]
    finals = [[one.answers for one in votes]]
    correct: list[list[list[bool] | None]] = []
    agreed: list[list[list[bool] | None]] = []
    with Grader() as grader:
        compare = _Comparison(grader, labels.kind, answer_of)
        for number, of_kind in enumerate(texts):
            correct.append(compare.gives(of_kind, labels.golds, by_final_answer=False))
            if number > 0:
                finals.append(compare.final_answers(final[number]))
                agreed.append(compare.gives(final[number], majorities, by_final_answer=True))
            on_graded(number + 1, len(kinds))
    levels: list[float | None] = [
        float(np.mean([one.base_agreement for one in references if one is not None])) if has_agreement else None
    ]
    levels += [float(np.mean([_some(row[i]) for i in known])) if has_agreement else None for row in agreed]
    counted = [
        _count(kind, finals[number], levels[number], correct[number], ([plain_ids, *told_ids])[number], think_ids)
        for number, kind in enumerate(kinds)
    ]
    effects = [
        Effect(
            paired_bootstrap_reduction(_lengths(plain), _lengths(kind)),
            compare_agreement([_some(references[i]) for i in known], [_some(agreed[number][i]) for i in known])
            if has_agreement
            else None,
            _accuracy_change(correct[0], correct[number + 1]),
        )
        for number, kind in enumerate(told)
    ]
    scores = [
        [
            PromptScores(
                [len(sample.token_ids) for sample in samples],
                None if number == 0 else agreed[number - 1][i],
                correct[number][i],
            )
            for i, samples in enumerate(kind)
        ]
        for number, kind in enumerate(kinds)
    ]
    return Measured(references, has_agreement, counted[0], counted[1:], effects, scores[0], scores[1:])


def _some(value: Any) -> Any:
    assert value is not None
    return value


def _all_thinking(kind: Samples) -> list[list[bool]]:
    return [[0 < len(sample.token_ids) == sample.thinking_tokens for sample in samples] for samples in kind]


def _lengths(kind: Samples) -> list[list[int]]:
    return [[len(sample.token_ids) for sample in samples] for samples in kind]


@dataclass(frozen=True)
class _Comparison:
    """How final answers are found and compared."""

    grader: Grader
    kind: Kind
    answer_of: Callable[[str], str | None] | None

    def final_answers(self, texts: Sequence[Sequence[str]]) -> list[list[str | None]]:
        if self.answer_of is not None:
            return [[self.answer_of(text) for text in row] for row in texts]
        return find_final_answers(texts, self.kind, self.grader)

    def gives(
        self, texts: Sequence[Sequence[str]], golds: Sequence[str | list[str] | None], by_final_answer: bool
    ) -> list[list[bool] | None]:
        """
        Return whether each text gives the gold, [prompts][samples]; `None` for a prompt without a gold.

        `by_final_answer` compares as [`~trl_crisp.health.reference.agrees`] does, otherwise as an evaluation grades.
        """
        pairs = [(text, gold) for row, gold in zip(texts, golds, strict=True) if gold is not None for text in row]
        if self.answer_of is not None:
            found = [self.answer_of(text) in ([gold] if isinstance(gold, str) else gold) for text, gold in pairs]
        else:
            grades = self.grader.grade_all(pairs, self.kind)
            found = [
                agrees(grade, str(gold), self.kind) if by_final_answer else grade.correct
                for (_, gold), grade in zip(pairs, grades, strict=True)
            ]
        each = iter(found)
        return [None if gold is None else [next(each) for _ in row] for row, gold in zip(texts, golds, strict=True)]


def _accuracy_change(before: Sequence[list[bool] | None], after: Sequence[list[bool] | None]) -> Interval | None:
    known = [i for i, row in enumerate(before) if row is not None]
    if len(known) < 2:
        return None
    return paired_bootstrap_difference([_some(before[i]) for i in known], [_some(after[i]) for i in known])


def _count(
    kind: Samples,
    finals: Sequence[Sequence[str | None]],
    agreement: float | None,
    correct: Sequence[list[bool] | None],
    prompts: Sequence[Sequence[int]],
    think_ids: ThinkIds | None,
) -> Counted:
    samples = [sample for row in kind for sample in row]
    right = [row for row in correct if row is not None]
    return Counted(
        mean_tokens=float(np.mean([len(sample.token_ids) for sample in samples])),
        truncated=share([not sample.ended_by_eos for sample in samples]),
        ended_by_eos=share([sample.ended_by_eos for sample in samples]),
        final_answer=share([answer is not None for row in finals for answer in row]),
        boxed=share([find_box(sample.text) is not None for sample in samples]),
        agreement=agreement,
        accuracy=float(np.mean(right)) if len(right) >= 2 else None,
        thinking=None if think_ids is None else _thinking(kind, prompts, think_ids),
    )


def _thinking(kind: Samples, prompts: Sequence[Sequence[int]], think_ids: ThinkIds) -> Thinking:
    # The last <think> or </think> of each prompt
    ends = [next((one for one in reversed(ids) if one in think_ids), None) for ids in prompts]
    samples = [sample for row in kind for sample in row]
    return Thinking(
        prompts_open=share([end == think_ids.open_id for end in ends]),
        prompts_close=share([end == think_ids.close_id for end in ends]),
        opened=share([sample.thinking_tokens > 0 for sample in samples]),
        closed=share([think_ids.close_id in sample.token_ids for sample in samples]),
        mean_tokens=float(np.mean([sample.thinking_tokens for sample in samples])),
    )
