"""The lab: its task, its table, and CRISP itself from end to end on the lab's small base."""

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.lab.base import sha256_of
from benchmarks.lab.run import FIXTURES, run
from benchmarks.lab.settings import SETTINGS
from benchmarks.lab.table import load, mean_interval, table_rows, with_tables
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

RESULTS = Path("benchmarks/results/lab")


def solutions(form: str, concise: bool, difficulty: int, count: int = 400) -> list[tuple[list[int], str]]:
    rng = random.Random(7)
    problems = [draw_problem(rng, difficulty) for _ in range(count)]
    return [(problem, solve(problem, FORMS[form], concise, rng)) for problem in problems]


def test_a_solution_by_hand():
    rng = random.Random(0)
    assert solve([3, 8], FORMS["stability"], True, rng).startswith("b 3 + 8 = 1 1 ;")
    assert prompt([3, 8])[0]["content"] == "add : a 3 b 8"
    assert is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1 1")
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1 2")
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 2 1 1")
    # Cut before its end, or with something behind the answer
    assert not is_correct([3, 8], "b 3 + 8 = 1 1 ; so answer 1")
    assert not is_correct([3, 8], "so answer 1 1 ; check b 3 + 8 = 1 1 ok")


@pytest.mark.parametrize("form", FORMS)
def test_the_concise_writer_writes_less_and_both_write_every_length(form):
    lengths = {concise: [len(text.split()) for _, text in solutions(form, concise, 4)] for concise in (False, True)}
    assert statistics.mean(lengths[True]) < 0.75 * statistics.mean(lengths[False])
    # The modes overlap: reverse KL has next to no gradient toward what the student never does
    assert min(lengths[False]) < statistics.mean(lengths[True]) < max(lengths[True])


def test_brevity_is_nearly_free_at_first_and_dear_beyond_on_long_problems_first():
    never = replace(FORMS["tradeoff"], first_check_probability=(0.0, 0.0))
    rng = random.Random(7)
    accuracy = {}
    for k in (2, 7):
        for concise in (False, True):
            accuracy[concise, k] = statistics.mean(
                is_correct(p, text) for p, text in solutions("tradeoff", concise, k, 2000)
            )
        problems = [draw_problem(rng, k) for _ in range(2000)]
        accuracy["unchecked", k] = statistics.mean(is_correct(p, solve(p, never, True, rng)) for p in problems)
    assert accuracy[True, 7] > accuracy[False, 7] - 0.06
    assert accuracy["unchecked", 7] < accuracy[True, 7] - 0.3
    assert accuracy["unchecked", 2] > accuracy[True, 2] - 0.2
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


@pytest.mark.parametrize("form", FORMS)
def test_the_committed_base_is_the_one_of_the_results(form):
    directory = FIXTURES / form
    assert sum(path.stat().st_size for path in directory.iterdir()) < 3_000_000
    expected = json.loads((directory / "source.json").read_text(encoding="utf-8"))["weights_sha256"]
    assert sha256_of(directory) == expected
    for results in load(RESULTS).values():
        for result in results:
            if result["protocol"]["form"] == form:
                assert result["protocol"]["base_sha256"] == expected, result["setting"]


def test_interval_over_seeds():
    # Three seeds: t = 4.303, standard deviation 1
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_interval([5.0]) == (5.0, 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    names = ("stability-untrained", "short", "short-m1")
    return {name: run(name, 0, tmp_path_factory.mktemp(name)) for name in names}


def test_crisp_compresses_at_the_bases_accuracy(runs):
    base, trained = (runs[name]["plain"]["all"] for name in ("stability-untrained", "short"))
    assert trained["mean_tokens"] <= 0.7 * base["mean_tokens"]
    assert trained["accuracy"] >= base["accuracy"] - 0.03
    assert trained["truncated"] == 0
    assert runs["short"]["log"][-1]["teacher/refreshes"] == 0


def test_the_live_teacher_is_worse_than_the_base(runs):
    base, live = (runs[name]["plain"]["all"] for name in ("stability-untrained", "short-m1"))
    assert live["accuracy"] < base["accuracy"] - 0.1
    assert runs["short-m1"]["log"][-1]["teacher/refreshes"] == SETTINGS["short-m1"].overrides["max_steps"]


def test_table_of_runs(runs):
    rows = {row[0]: row for row in table_rows({name: [result] for name, result in runs.items()})}
    base, trained = (runs[name]["plain"]["all"]["mean_tokens"] for name in ("stability-untrained", "short"))
    assert rows["short"][4] == f"{100 * (trained / base - 1):+.0f}%"
    assert rows["stability base"][4] == ""
    assert (
        rows["stability base, concise prompt"][3]
        == f"{runs['stability-untrained']['concise']['all']['mean_tokens']:.1f}"
    )


def test_the_readmes_tables_are_those_of_the_committed_runs():
    text = Path("benchmarks/README.md").read_text(encoding="utf-8")
    assert with_tables(text, load(RESULTS)) == text
