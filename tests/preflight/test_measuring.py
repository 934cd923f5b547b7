"""Each number of a preflight by explicit loops over handmade answers."""

from collections import Counter

import numpy as np
import pytest

from trl_crisp.evaluation.row_answers import Labels
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.preflight.measuring import measure
from trl_crisp.prompts.thinking import ThinkIds

THINK = ThinkIds(open_id=7, close_id=8)
# [kinds][prompts]: the final answers of four samples; a dash is an answer without one. The plain prompt comes first
ANSWERS = [
    ["AAAB", "CCDD", "EEEE", "----", "FGHI", "KKK-"],
    ["AABB", "CDDD", "EEEE", "Z---", "FFFF", "K---"],
    ["AAAA", "CCCC", "XXXX", "YYYY", "FGHI", "KKKK"],
]
# [kinds][prompts]: the lengths of the samples
TOKENS = [
    [[10, 20, 30, 40], [12, 12, 12, 12], [50, 60, 70, 80], [9, 9, 9, 90], [5, 6, 7, 8], [33, 3, 3, 3]],
    [[5, 10, 15, 20], [12, 6, 12, 6], [25, 30, 35, 40], [9, 9, 9, 9], [5, 6, 7, 8], [3, 3, 3, 3]],
    [[20, 20, 30, 40], [12, 12, 24, 12], [50, 99, 70, 80], [9, 9, 9, 90], [5, 6, 7, 8], [33, 3, 3, 9]],
]
GOLDS = ["A", "D", None, "Y", "F", "K"]
PLAIN_IDS = [[1, 2], [1, 7], [7, 8], [1], [7, 8, 7], [1]]


def answer_of(text: str) -> str | None:
    answer = text.split(" ")[-1]
    return None if answer == "-" else answer


def samples_of(kind: int) -> list[list[Sample]]:
    found = []
    for prompt, answers in enumerate(ANSWERS[kind]):
        row = []
        for number, answer in enumerate(answers):
            tokens = TOKENS[kind][prompt][number]
            # Every third answer thinks, every sixth of them to the end; every fifth is cut; every fourth has a box
            place = prompt * 4 + number + kind
            ids = [1] * tokens
            thinking = 0
            if place % 3 == 0:
                thinking = min(3, tokens)
                if place % 6:
                    ids[thinking - 1] = THINK.close_id
            text = (r"\boxed{1} " if place % 4 == 0 else "so ") + answer
            row.append(Sample(str(prompt), number, text, ids, thinking, place % 5 != 0, ""))
        found.append(row)
    return found


@pytest.fixture(scope="module")
def measured():
    labels = Labels("answer", list(GOLDS), "math", "")
    told_ids = [[[9, *ids] for ids in PLAIN_IDS], [[7, *ids, 8] for ids in PLAIN_IDS]]
    kinds = [samples_of(kind) for kind in range(3)]
    return measure(kinds[0], kinds[1:], PLAIN_IDS, told_ids, labels, THINK, answer_of)


def majority(answers: str) -> str | None:
    """The most frequent answer, the first one of equals; None if nobody agrees with anybody."""
    counts = Counter(answers.replace("-", ""))
    if not counts or (max(counts.values()) == 1 and len(counts) > 1):
        return None
    return next(answer for answer in answers if counts[answer] == max(counts.values()))


def own_level(answers: str) -> float:
    """The share of samples that agree with the majority of the others, equals sharing it."""
    total = 0.0
    for j, own in enumerate(answers):
        others = Counter((answers[:j] + answers[j + 1 :]).replace("-", ""))
        leading = [answer for answer, count in others.items() if count == max(others.values())]
        total += sum(answer == own for answer in leading) / len(leading) if leading else 0.0
    return total / len(answers)


def bootstrap(before, after, statistic):
    """The percentile interval over prompts, by a loop over resamples."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(10_000):
        drawn = rng.integers(len(before), size=len(before))
        values.append(statistic([before[i] for i in drawn], [after[i] for i in drawn]))
    return np.quantile(values, [0.025, 0.975])


def check(interval, before, after, statistic):
    assert interval.estimate == pytest.approx(statistic(before, after))
    # 10,000 resamples place the ends within some tenths of a point
    assert [interval.low, interval.high] == pytest.approx(bootstrap(before, after, statistic), abs=0.01)
    assert interval.confidence == 0.95


def mean(values) -> float:
    return sum(values) / len(values)


def test_references_and_their_levels(measured):
    assert [reference and reference.answer for reference in measured.references] == [majority(a) for a in ANSWERS[0]]
    assert [majority(a) for a in ANSWERS[0]] == ["A", "C", "E", None, None, "K"]
    assert measured.has_agreement
    known = [answers for answers in ANSWERS[0] if majority(answers)]
    assert measured.plain.agreement == pytest.approx(mean([own_level(answers) for answers in known]))


@pytest.mark.parametrize("kind", [1, 2])
def test_agreement_is_with_the_plain_majority_and_its_change_is_from_the_plain_level(measured, kind):
    plain, told = [], []
    for before, after in zip(ANSWERS[0], ANSWERS[kind], strict=True):
        if majority(before) is not None:
            plain.append(own_level(before))
            told.append(sum(answer == majority(before) for answer in after) / 4)
    assert measured.told[kind - 1].agreement == pytest.approx(mean(told))
    check(measured.effects[kind - 1].agreement_change, plain, told, lambda b, a: mean(a) - mean(b))


@pytest.mark.parametrize("kind", [1, 2])
def test_tokens_and_their_reduction(measured, kind):
    before, after = ([mean(row) for row in TOKENS[k]] for k in (0, kind))
    assert measured.plain.mean_tokens == pytest.approx(mean(before))
    assert measured.told[kind - 1].mean_tokens == pytest.approx(mean(after))
    check(measured.effects[kind - 1].reduction, before, after, lambda b, a: 1 - sum(a) / sum(b))


@pytest.mark.parametrize("kind", [1, 2])
def test_accuracy_is_over_the_prompts_with_a_right_answer(measured, kind):
    before, after = (
        [
            sum(answer == gold for answer in answers) / 4
            for answers, gold in zip(ANSWERS[k], GOLDS, strict=True)
            if gold is not None
        ]
        for k in (0, kind)
    )
    assert measured.plain.accuracy == pytest.approx(mean(before))
    assert measured.told[kind - 1].accuracy == pytest.approx(mean(after))
    check(measured.effects[kind - 1].accuracy_change, before, after, lambda b, a: mean(a) - mean(b))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_shares_of_answers(measured, kind):
    counted = [measured.plain, *measured.told][kind]
    samples = [sample for row in samples_of(kind) for sample in row]
    assert counted.ended_by_eos == pytest.approx(mean([sample.ended_by_eos for sample in samples]))
    assert counted.truncated == pytest.approx(1 - counted.ended_by_eos)
    assert 0 < counted.truncated < 1
    assert counted.final_answer == pytest.approx(mean([answer != "-" for answer in "".join(ANSWERS[kind])]))
    assert counted.boxed == pytest.approx(mean(["boxed" in sample.text for sample in samples]))
    assert counted.thinking.opened == pytest.approx(mean([sample.thinking_tokens > 0 for sample in samples]))
    assert counted.thinking.closed == pytest.approx(mean([8 in sample.token_ids for sample in samples]))
    assert 0 < counted.thinking.closed < counted.thinking.opened
    assert counted.thinking.mean_tokens == pytest.approx(mean([sample.thinking_tokens for sample in samples]))


def test_what_the_prompts_do_with_think(measured):
    # By hand: the last <think> is open in two plain prompts, closed in one; the second instruction closes it in all
    opened = [one.thinking.prompts_open for one in (measured.plain, *measured.told)]
    closed = [one.thinking.prompts_close for one in (measured.plain, *measured.told)]
    assert opened == pytest.approx([2 / 6, 2 / 6, 0])
    assert closed == pytest.approx([1 / 6, 1 / 6, 1])


def test_the_scores_of_each_answer(measured):
    for prompt, (plain, gold) in enumerate(zip(measured.plain_scores, GOLDS, strict=True)):
        assert plain.tokens == TOKENS[0][prompt]
        assert plain.agrees is None
        assert plain.correct == (None if gold is None else [answer == gold for answer in ANSWERS[0][prompt]])
        for kind in (1, 2):
            told = measured.told_scores[kind - 1][prompt]
            reference = majority(ANSWERS[0][prompt])
            assert told.tokens == TOKENS[kind][prompt]
            assert told.agrees == (
                None if reference is None else [answer == reference for answer in ANSWERS[kind][prompt]]
            )


def math_samples(texts: list[list[str]]) -> list[list[Sample]]:
    return [
        [Sample(str(i), j, text, [1, 2], 0, True, "") for j, text in enumerate(row)] for i, row in enumerate(texts)
    ]


def test_answers_are_compared_by_value_without_a_function_of_the_user():
    plain = math_samples([["Answer: 1/2", "Answer: 0.5"], ["Answer: 3", r"\boxed{3}"], ["Answer: 5", "none"]])
    told = math_samples([[r"\boxed{\frac12}", "Answer: 2"], ["so 3", "Answer: 3"], ["Answer: )(", "Answer: 6"]])
    labels = Labels("answer", ["0.5", "3", None], "math", "")
    found = measure(plain, [told], [[1]] * 3, [[[1]] * 3], labels, None)
    assert [reference.answer for reference in found.references] == ["1/2", "3", "5"]
    assert [one.agrees for one in found.told_scores[0]] == [[True, False], [True, True], [False, False]]
    assert [one.correct for one in found.plain_scores] == [[True, True], [True, True], None]
    assert found.plain.final_answer == pytest.approx(5 / 6)
    # "so 3" has no answer line and no box, and )( is no math
    assert found.told[0].final_answer == pytest.approx(4 / 6)
    assert found.plain.thinking is None


def test_an_answer_that_is_cut_in_its_thinking_has_no_final_answer():
    """The prompt has opened the thinking, so the text does not show it."""
    cut = Sample("0", 1, r"First \boxed{3}, but wait", [1, 2], 2, False, "")
    whole = Sample("0", 0, "So.</think>Answer: 3", [1, 2], 1, True, "")
    kind = [[whole, cut]] * 2
    found = measure(kind, [kind], [[1]] * 2, [[[1]] * 2], Labels(None, [None] * 2, "math", ""), None)
    assert [reference.votes for reference in found.references] == [1, 1]
    assert found.told_scores[0][0].agrees == [True, False]
    assert found.told[0].final_answer == 0.5


def test_texts_agree_by_their_answer_line():
    plain = math_samples([["Answer: Oslo", "Answer: oslo"]] * 2)
    told = math_samples([["It is Oslo.", "Answer: **Oslo**"]] * 2)
    found = measure(plain, [told], [[1]] * 2, [[[1]] * 2], Labels(None, ["Oslo", "Oslo"], "text", ""), None)
    assert found.told_scores[0][0].agrees == [False, True]
    # Graded as an evaluation does, by the first sentence too
    assert found.told_scores[0][0].correct == [True, True]


def test_too_few_references_turn_agreement_off():
    texts = [["Answer: 1", "Answer: 1"]] + [["a", "b"]] * 2
    found = measure(
        math_samples(texts), [math_samples(texts)], [[1]] * 3, [[[1]] * 3], Labels(None, [None] * 3, "math", ""), None
    )
    assert not found.has_agreement
    assert found.plain.agreement is None
    assert found.told[0].agreement is None
    assert found.effects[0].agreement_change is None
    assert found.effects[0].accuracy_change is None
    assert found.plain.accuracy is None
