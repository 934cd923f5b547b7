"""The base's majority answers: who agrees with whom, ties, and the base's own level."""

import itertools
from collections import Counter

import pytest

from trl_crisp.health.reference import (
    Reference,
    Votes,
    checked,
    compare_agreement,
    count_votes,
    final_texts,
    find_reference,
)


def votes_of(answers: str) -> Votes:
    """Votes of one-letter answers; a dash is a sample without an answer."""
    found = [None if answer == "-" else answer for answer in answers]
    return Votes(found, [[one is not None and one == other for one in found] for other in found])


def level_of(answers: str) -> float:
    """The leave-one-out level by counting, for answers that are equal if their letters are."""
    total = 0.0
    for j, own in enumerate(answers):
        others = Counter((answers[:j] + answers[j + 1 :]).replace("-", ""))
        leading = [answer for answer, count in others.items() if count == max(others.values())]
        # Each sample of a leading answer leads, and all leading answers have the same number of samples
        total += sum(answer == own for answer in leading) / len(leading) if leading else 0.0
    return total / len(answers)


@pytest.mark.parametrize(
    "answers", ["".join(some) for some in itertools.product("AB-", repeat=4)] + ["ABCDA", "AABBC"]
)
def test_the_majority_and_the_bases_own_level(answers):
    reference = find_reference(votes_of(answers))
    counts = Counter(answers.replace("-", ""))
    if not counts or (max(counts.values()) == 1 and len(counts) > 1):
        assert reference is None
        return
    assert reference is not None
    assert reference.votes == max(counts.values())
    assert reference.answer == next(a for a in answers if counts[a] == reference.votes and a != "-")
    assert reference.base_agreement == pytest.approx(level_of(answers))


def test_math_answers_are_equal_by_value_and_not_by_their_text():
    texts = ["So.\nAnswer: 1/2", "Answer: 0.5", r"\boxed{\frac{1}{2}}", "Answer: 2", "I do not know."]
    (votes,) = count_votes([texts], "math")
    assert votes.answers == ["1/2", "0.5", r"\frac{1}{2}", "2", None]
    assert [row[0] for row in votes.agrees] == [True, True, True, False, False]
    assert [row[3] for row in votes.agrees] == [False, False, False, True, False]
    assert not any(row[4] for row in votes.agrees)
    reference = find_reference(votes)
    assert reference is not None
    # Each of the three agrees with the two others; 2 does not agree with the majority
    assert (reference.answer, reference.votes, reference.base_agreement) == ("1/2", 3, pytest.approx(3 / 5))


def test_a_final_answer_that_is_no_math_does_not_vote():
    (votes,) = count_votes([["Answer: )(", "Answer: )(", "Answer: 7"]], "math")
    assert votes.answers == [None, None, "7"]


def test_letters_agree_by_the_letter():
    (votes,) = count_votes([["Answer: (B) 42", "Answer: b", r"\boxed{C}", "Answer: Z"]], "choice")
    assert votes.answers == ["B", "B", "C", None]
    assert [row[0] for row in votes.agrees] == [True, True, False, False]


def test_texts_vote_by_an_answer_line_only():
    (votes,) = count_votes([["Oslo is it.\nAnswer: Oslo", "Answer: **oslo**.", "It is Oslo."]], "text")
    assert votes.answers == ["Oslo", "oslo", None]
    # The last one says it in its first sentence only
    assert [row[0] for row in votes.agrees] == [True, True, False]


@pytest.mark.parametrize(
    "line",
    [
        r"Answer: none, \boxed{\emptyset}",
        r"Answer: yes \boxed{\checkmark}",
        "Answer: Yes. Final answer: \N{CHECK MARK}",
        "Answer: Paris #### --",
    ],
)
def test_a_line_whose_answer_has_no_word_does_not_vote(line):
    """Though the line has one: nothing could be graded by it."""
    (votes,) = count_votes([[line, "Answer: Oslo", "Answer: Oslo"]], "text")
    assert votes.answers == [None, "Oslo", "Oslo"]


def test_a_blank_answer_of_the_users_function_is_none():
    """As one that takes what follows "Answer:" gives for a text that was cut."""
    find = checked(lambda text: text.partition("Answer:")[2].strip())
    (votes,) = count_votes([["cut", "also cut", "Answer: 7", "Answer: "]], "math", find)
    assert votes.answers == [None, None, "7", None]
    assert find_reference(votes).answer == "7"


def test_a_text_that_hedges_does_not_agree():
    (votes,) = count_votes(
        [["Answer: Paris", "Answer: Rome or Paris or Berlin", "Answer: not Paris", "Answer: **PARIS**."]], "text"
    )
    assert [row[0] for row in votes.agrees] == [True, False, False, True]


def test_what_is_said_in_the_thinking_does_not_vote():
    (votes,) = count_votes([["<think>Answer: 3</think>Answer: 4", "<think>Answer: 3"]], "math")
    assert votes.answers == ["4", None]


def test_thinking_that_the_prompt_opened_and_that_is_cut_says_nothing():
    texts = [["First \\boxed{3}, but wait", "So \\boxed{3}.</think>Answer: 4", "<think>\\boxed{3}", "Answer: 4"]]
    (final,) = final_texts(texts, [[True, False, False, False]])
    assert final == ["", "Answer: 4", "", "Answer: 4"]
    (votes,) = count_votes([final], "math")
    assert votes.answers == [None, "4", None, "4"]
    assert [row[1] for row in votes.agrees] == [False, True, False, True]


def test_a_function_of_the_user_finds_the_answers():
    (votes,) = count_votes([["x 1", "y 1", "z"]], "math", lambda text: text.partition(" ")[2] or None)
    assert votes.answers == ["1", "1", None]
    assert votes.agrees == [[True, True, False], [True, True, False], [False, False, False]]


def test_one_sample_has_no_majority():
    with pytest.raises(ValueError, match=r"prompt 1 has 1 sample.*monitor_samples"):
        count_votes([["a", "b"], ["a"]], "math")


def test_the_change_is_paired_over_prompts():
    references = [Reference("1", 5, 1.0), Reference("2", 2, 0.4)]
    change = compare_agreement(references, [[True, False], [True, True]])
    assert change.estimate == pytest.approx((0.5 - 1.0 + 1.0 - 0.4) / 2)
    assert (change.low, change.high) == (pytest.approx(-0.5), pytest.approx(0.6))
    # The same level on every prompt has no spread, however different the prompts are
    assert compare_agreement(references, [[True] * 5, [True, True, False, False, False]]).low == pytest.approx(0.0)
