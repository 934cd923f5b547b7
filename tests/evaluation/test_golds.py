"""The right answers of users' own files: their text, and the one kind that a file is graded by."""

import datetime
import json
import math

import pytest

from trl_crisp.evaluation.golds import gold_of, kind_of_file
from trl_crisp.evaluation.problems import CHOICE_TEMPLATE, MATH_TEMPLATE, load_benchmark


def write(path, answers, **columns):
    rows = [{"question": f"{i}?", "answer": answer, **columns} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (1e-05, "0.00001"),
        (1e23, "100000000000000000000000"),
        (5.0, "5"),
        (0.1, "0.1"),
        (7, "7"),
        (True, "true"),
        (" Oslo ", "Oslo"),
        (None, ""),
        (["Oslo"], "Oslo"),
        (["USA", "United States", "USA"], ["USA", "United States"]),
        (datetime.datetime(2020, 1, 31), "2020-01-31"),
    ],
)
def test_a_cell_becomes_the_text_of_its_answer(value, gold):
    assert gold_of(value) == gold


@pytest.mark.parametrize("value", [{"value": 5}, [["a"]], ["a", None], math.nan, math.inf])
def test_a_cell_that_is_no_answer_is_refused(value):
    with pytest.raises(ValueError, match="its answer is"):
        gold_of(value)


@pytest.mark.parametrize(
    ("golds", "kind"),
    [
        (["A", "(b)", "J."], "choice"),
        (["A", "K"], "math"),
        (["1", r"\frac{1}{2}", "2xy + 3", "(1, 2)", r"\sin x"], "math"),
        (["12:00", "6:15 p.m.", "5 apples", "12 cm", r"\$18.90", r"\text{even}"], "math"),
        (["1", "Oslo"], "text"),
        (["Ar", "1"], "text"),
        (["12 May 1990"], "text"),
        (["2020-01-01"], "text"),
        (["1", "東京"], "text"),
        (["5 +"], "text"),
        (["A", ["B", "b"]], "text"),
    ],
)
def test_a_file_is_of_the_kind_that_its_answers_fit(golds, kind):
    if golds[-1] == ["B", "b"]:
        golds = [*golds, "Oslo"]
    assert kind_of_file(golds, None, "own.jsonl")[0] == kind


def test_the_kind_has_a_reason_and_answers_that_do_not_fit_are_named():
    assert kind_of_file(["1", "Oslo"], None, "f") == ("text", "the answer of row 1 is 'Oslo'")
    assert kind_of_file(["1", "2"], "text", "f") == ("text", "asked for")
    with pytest.raises(ValueError, match=r"own.jsonl, row 1: the answer '5 \+' cannot be read as math"):
        kind_of_file(["1", "5 +"], "math", "own.jsonl")
    with pytest.raises(ValueError, match=r"own.jsonl, row 1: the answer '42' is not a letter"):
        kind_of_file(["A", "42"], "choice", "own.jsonl")
    with pytest.raises(ValueError, match=r"own.jsonl, row 0: its answer is a list.*'1, 2'"):
        kind_of_file([["1", "2"]], None, "own.jsonl")
    with pytest.raises(ValueError, match=r"own.jsonl, row 1: the answer '!!' has no word"):
        kind_of_file(["Oslo", "!!"], "text", "own.jsonl")


@pytest.mark.parametrize(
    ("answers", "kind", "prompt"),
    [
        (["1", "#### 5"], "math", MATH_TEMPLATE.format(problem="0?")),
        (["A", "B"], "choice", CHOICE_TEMPLATE.replace("\n\n{choices}", "").format(problem="0?")),
        (["Oslo", "Bergen"], "text", "0?"),
    ],
)
def test_a_file_has_one_kind_and_its_prompt(tmp_path, answers, kind, prompt):
    benchmark = load_benchmark(write(tmp_path / "own.jsonl", answers))
    assert {problem.kind for problem in benchmark.problems} == {kind}
    assert benchmark.kind == kind
    assert benchmark.problems[0].prompt == prompt
    assert benchmark.problems[1].answer == answers[1].removeprefix("#### ")


def test_lists_of_answers_and_numbers_are_read_from_a_file(tmp_path):
    benchmark = load_benchmark(write(tmp_path / "own.jsonl", [["USA", "United States"], ["Oslo"]]))
    assert [problem.answer for problem in benchmark.problems] == [["USA", "United States"], "Oslo"]
    benchmark = load_benchmark(write(tmp_path / "numbers.jsonl", [1e-05, 1e23, 5]))
    assert [problem.answer for problem in benchmark.problems] == ["0.00001", "1" + 23 * "0", "5"]
    with pytest.raises(ValueError, match=r"own2.jsonl, row 0: its answer is \{'value': 5\}"):
        load_benchmark(write(tmp_path / "own2.jsonl", [{"value": 5}]))


def test_the_grader_can_be_asked_for(tmp_path):
    path = write(tmp_path / "own.jsonl", ["1", "Oslo"])
    assert load_benchmark(write(tmp_path / "n.jsonl", ["1969", "1"]), kind="text").problems[0].prompt == "0?"
    with pytest.raises(ValueError, match="is not a letter A to J"):
        load_benchmark(path, kind="choice")
    rows = tmp_path / "math500.jsonl"
    rows.write_text(json.dumps({"problem": "1?", "answer": "1", "level": 1, "unique_id": "a"}) + "\n")
    benchmark = load_benchmark("math500", file=rows, kind="text")
    assert (benchmark.kind, benchmark.kind_reason) == ("text", "asked for")
    assert benchmark.problems[0].prompt == MATH_TEMPLATE.format(problem="1?")


def test_a_users_template_reads_columns_and_names_missing_ones(tmp_path):
    path = write(tmp_path / "own.jsonl", ["Oslo"], country="Norway")
    benchmark = load_benchmark(path, prompt_template="{country}: {question}")
    assert benchmark.problems[0].prompt == "Norway: 0?"
    with pytest.raises(ValueError, match=r"placeholder \{town\}, which is not a column"):
        load_benchmark(path, prompt_template="{town}")
    with pytest.raises(ValueError, match=r"no \{column\} placeholder"):
        load_benchmark(path, prompt_template="What?")
    empty = write(tmp_path / "empty.jsonl", ["Oslo"], country=None)
    with pytest.raises(ValueError, match="row 0: prompt_template: it has nothing in its column 'country'"):
        load_benchmark(empty, prompt_template="{country}")
    rows = tmp_path / "mmlu.jsonl"
    rows.write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 1, "subject": "s"}) + "\n")
    with pytest.raises(ValueError, match="lists the choices under letters"):
        load_benchmark("mmlu", file=rows, prompt_template="{question}")
