"""The lab: its task and its table."""

import random
import statistics

import pytest

from benchmarks.lab.table import mean_interval
from benchmarks.lab.task import (
    DIFFICULTIES,
    FORMS,
    MAX_SOLUTION_TOKENS,
    draw_problem,
    is_correct,
    lab_tokenizer,
    prompt,
    solve,
)


def solutions(form: str, concise: bool, difficulty: int, count: int = 400) -> list[tuple[list[int], str]]:
    rng = random.Random(7)
    problems = [draw_problem(rng, difficulty) for _ in range(count)]
    return [(problem, solve(problem, FORMS[form], concise, rng)) for problem in problems]


def test_a_solution_by_hand():
    rng = random.Random(0)
    assert solve([3, 5], FORMS["stability"], True, rng).startswith("3 + 5 = 8 ;")
    assert is_correct([3, 5], "3 + 5 = 8 ; so answer 8")
    assert not is_correct([3, 5], "3 + 5 = 8 ; so answer 9")
    # Cut before its end, or with something behind the answer
    assert not is_correct([3, 5], "3 + 5 = 8 ; so answer")
    assert not is_correct([3, 5], "so answer 8 ; check 3 + 5 = 8 ok")


@pytest.mark.parametrize("form", FORMS)
def test_the_concise_writer_writes_less_and_both_write_every_length(form):
    lengths = {concise: [len(text.split()) for _, text in solutions(form, concise, 4)] for concise in (False, True)}
    assert statistics.mean(lengths[True]) < 0.75 * statistics.mean(lengths[False])
    # The modes overlap: reverse KL has next to no gradient toward what the student never does
    assert min(lengths[False]) < statistics.mean(lengths[True]) < max(lengths[True])


def test_brevity_costs_accuracy_on_long_problems_first():
    accuracy = {
        (concise, k): statistics.mean(is_correct(p, text) for p, text in solutions("tradeoff", concise, k))
        for concise in (False, True)
        for k in (2, 7)
    }
    assert accuracy[False, 2] - accuracy[True, 2] < accuracy[False, 7] - accuracy[True, 7] - 0.05
    assert all(is_correct(p, text) for p, text in solutions("stability", True, 7))


def test_every_word_is_one_token_and_the_longest_solution_fits():
    tokenizer = lab_tokenizer()
    for form in FORMS:
        for difficulty in DIFFICULTIES:
            for problem, text in solutions(form, False, difficulty, 50):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text
                assert len(ids) + 1 <= MAX_SOLUTION_TOKENS
                text = tokenizer.apply_chat_template(prompt(problem), tokenize=False, add_generation_prompt=True)
                # An unknown word would be left out
                assert len(tokenizer(text)["input_ids"]) == len(text.split())


def test_interval_over_seeds():
    # Three seeds: t = 4.303, standard deviation 1
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_interval([5.0]) == (5.0, 0.0)
