"""Benchmarks from files in their own columns; what is not there is named, with the ways to have it."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from trl_crisp.evaluation.problems import BENCHMARKS, MATH_TEMPLATE, load_benchmark

ROWS = {
    "math500": {"problem": "What is $1+1$?", "answer": "2", "level": 3, "unique_id": "test/1.json", "solution": ""},
    "aime24": {"ID": "2024-I-1", "Problem": "What is 20 + 4?", "Answer": "024"},
    "aime25": {"problem": "Find it.", "answer": 70, "id": "0"},
    "gsm8k": {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"},
    "gpqa-diamond": {
        "Question": "Which one?",
        "Correct Answer": "right\n",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "High-level domain": "Physics",
    },
    "mmlu": {"question": "Which one?", "choices": ["p", "q", "r", "s"], "answer": 2, "subject": "law"},
}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "answer", "kind", "level"),
    [
        ("math500", "2", "math", "3"),
        ("aime24", "24", "math", None),
        ("aime25", "70", "math", None),
        ("gsm8k", "1072", "math", None),
        ("mmlu", "C", "choice", "law"),
    ],
)
def test_each_benchmark_in_its_own_columns(tmp_path, name, answer, kind, level):
    benchmark = load_benchmark(name, file=write(tmp_path / "rows.jsonl", ROWS[name]))
    (problem,) = benchmark.problems
    assert (problem.answer, problem.kind, problem.level) == (answer, kind, level)
    assert problem.prompt.count("Remember to put your answer on its own line") == 1
    assert benchmark.source == "rows.jsonl"
    assert benchmark.revision.startswith("sha256:")


def test_every_benchmark_has_a_row_here():
    assert set(ROWS) == set(BENCHMARKS)


def test_the_prompt_of_a_problem_is_the_papers():
    prompt = MATH_TEMPLATE.format(problem="What is 1 + 1?")
    assert prompt == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\nWhat is 1 + 1?\n\nRemember to put your answer on its "
        'own line after "Answer:".'
    )
    # The sentence that the instruction replaces
    from trl_crisp.prompts.instructions import build_teacher_prompt

    text, replaced = build_teacher_prompt(prompt, "Be brief.", "Solve the following math problem step by step.")
    assert replaced
    assert isinstance(text, str)
    assert "step by step" not in text


def test_choices_are_shuffled_the_same_way_each_time(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[ROWS["gpqa-diamond"]] * 40)
    problems = load_benchmark("gpqa-diamond", file=path).problems
    assert problems == load_benchmark("gpqa-diamond", file=path).problems
    assert {problem.answer for problem in problems} == set("ABCD")
    for problem in problems:
        assert f"{problem.answer}) right\n" in problem.prompt
        assert all(f") wrong {i}" in problem.prompt for i in (1, 2, 3))


@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv"])
def test_a_users_file_of_any_format_becomes_problems(tmp_path, extension):
    rows = Dataset.from_list(
        [{"question": f"What is {i} + 1?", "answer": str(i + 1), "level": "easy"} for i in range(5)]
    )
    path = tmp_path / f"own.{extension}"
    {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[extension](path)
    benchmark = load_benchmark(str(path), limit=3)
    assert [problem.answer for problem in benchmark.problems] == ["1", "2", "3"]
    assert [problem.id for problem in benchmark.problems] == ["0", "1", "2"]
    assert benchmark.problems[0].level == "easy"
    assert "What is 0 + 1?" in benchmark.problems[0].prompt


def test_benchmarks_limits_and_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'math5000' is unknown.*math500, aime24.*question and answer"):
        load_benchmark("math5000")
    with pytest.raises(ValueError, match="limit=0"):
        load_benchmark("math500", limit=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_benchmark("math500", file=tmp_path / "nowhere.jsonl")
    own = write(tmp_path / "own.jsonl", {"question": "1 + 1?", "reply": "2"})
    with pytest.raises(ValueError, match=r"own.jsonl, row 0: there is no column 'answer'; it has question, reply"):
        load_benchmark(str(own))
    with pytest.raises(ValueError, match=r"no column 'problem'.*the benchmark's own rows"):
        load_benchmark("math500", file=own)


def test_offline_names_both_ways(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"(?s)HuggingFaceH4/MATH-500.*HF_HUB_OFFLINE is set.*goes in with --file"
    ):
        load_benchmark("math500")


def test_offline_the_rows_come_from_the_cache(monkeypatch):
    commit = "0123456789" * 4
    rows = Dataset.from_list([ROWS["math500"]])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    assert load_benchmark("math500").revision.startswith("cached, sha256 of the rows:")
    rows.info.download_checksums = {f"hf://datasets/HuggingFaceH4/MATH-500@{commit}/test.jsonl": {}}
    assert load_benchmark("math500").revision == commit


def test_a_missing_id_is_the_rows_number_and_no_id_may_repeat(tmp_path):
    rows = [{"question": "1?", "answer": "1", "id": None}, {"question": "2?", "answer": 2, "id": "b"}]
    benchmark = load_benchmark(
        str(write(tmp_path / "rows.jsonl", *rows, {"question": "3?", "answer": "3", "id": None}))
    )
    assert [problem.id for problem in benchmark.problems] == ["0", "b", "2"]
    twice = write(tmp_path / "twice.jsonl", *[{"question": "1?", "answer": "1", "id": "x"}] * 2)
    with pytest.raises(ValueError, match="rows 0 and 1 have the same id 'x'"):
        load_benchmark(str(twice))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None, "answer": "2"}, "it has no text: its column 'question' holds None"),
        ({"question": " ", "answer": "2"}, "it has no text: its column 'question' holds ' '"),
        ({"answer": "2"}, "it has no text: its column 'question' holds None"),
        ({"problem": "2?", "answer": "2"}, "its column 'question' holds None, and its column 'problem' a text"),
        ({"question": "2?"}, "it has no answer to grade by: its column 'answer' holds None"),
    ],
)
def test_a_cell_of_a_users_file_that_cannot_be_used_is_named(tmp_path, row, message):
    path = write(tmp_path / "own.jsonl", {"question": "1?", "answer": "1"}, row)
    with pytest.raises(ValueError, match=f"^own.jsonl, row 1: {re.escape(message)}"):
        load_benchmark(str(path))


def test_a_question_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "own.jsonl", {"question": [{"role": "user", "content": "1?"}], "answer": "1"})
    with pytest.raises(ValueError, match=r"row 0: its column 'question' holds a list and not a text: \"\[\{'role"):
        load_benchmark(str(path))


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("math500", "problem", None, "'problem' holds None"),
        ("aime24", "Answer", "abc", "'answer' holds 'abc' and not an integer"),
        ("aime25", "answer", 70.5, "'answer' holds 70.5 and not an integer"),
        ("aime25", "answer", None, "'answer' holds None"),
        ("gsm8k", "answer", None, "'answer' holds None"),
        ("gsm8k", "question", "", "'question' holds ''"),
        ("gpqa-diamond", "Incorrect Answer 2", None, "'Incorrect Answer 2' holds None"),
        ("mmlu", "answer", 4, "'answer' holds 4, and there are 4 choices, from 0"),
        ("mmlu", "choices", "pqrs", "'choices' holds 'pqrs' and not a list of texts"),
        ("mmlu", "choices", None, "'choices' holds None"),
    ],
)
def test_a_cell_of_a_benchmark_that_cannot_be_used_is_named(tmp_path, name, column, value, message):
    path = write(tmp_path / "rows.jsonl", ROWS[name], {**ROWS[name], column: value})
    with pytest.raises(ValueError, match=f"^rows.jsonl, row 1: .*{re.escape(message)}"):
        load_benchmark(name, file=path)


def test_a_level_may_be_missing(tmp_path):
    path = write(tmp_path / "rows.jsonl", {**ROWS["math500"], "level": None})
    assert [problem.level for problem in load_benchmark("math500", file=path).problems] == [None]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("MATH-500", "math500"), ("aime_2024", "aime24"), ("gpqa", "gpqa-diamond"), ("GSM-8K", "gsm8k"), ("mlu", "mmlu")],
)
def test_a_name_that_is_close_is_suggested(name, meant):
    with pytest.raises(ValueError, match=rf"benchmark '{name}' is unknown. Did you mean {meant}[ ?]"):
        load_benchmark(name)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer_is_named(tmp_path, answer):
    path = write(tmp_path / "rows.jsonl", {"question": "1?", "answer": "1"}, {"question": "2?", "answer": answer})
    with pytest.raises(ValueError, match="row 1: it has no answer to grade by"):
        load_benchmark(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "1?", "answer": "1"}\n{broken\n', "cannot be read as .jsonl"), ("", "is an empty file")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"benchmark file='.*rows.jsonl'.*{message}"):
        load_benchmark(str(path))


def test_a_file_beside_a_file_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "1?", "answer": "1"})
    with pytest.raises(ValueError, match="is a file of your own, and so is"):
        load_benchmark(str(path), file=path)


def test_a_prompt_column_is_used_as_it_is(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}]
    (problem,) = load_benchmark(str(write(tmp_path / "m.jsonl", {"prompt": messages, "answer": "2"}))).problems
    assert (problem.prompt, problem.is_whole_prompt) == (messages, True)
    (problem,) = load_benchmark(str(write(tmp_path / "t.jsonl", {"prompt": "1 + 1 =", "answer": "2"}))).problems
    assert (problem.prompt, problem.is_whole_prompt) == ("1 + 1 =", True)
    # A question has a template, also beside a prompt
    (problem,) = load_benchmark(
        str(write(tmp_path / "q.jsonl", {"prompt": "p", "question": "1 + 1?", "answer": "2"}))
    ).problems
    assert problem.prompt == MATH_TEMPLATE.format(problem="1 + 1?")


@pytest.mark.parametrize(
    ("row", "template", "words"),
    [
        ({"prompt": [], "answer": "2"}, None, r"row 0: its column 'prompt' holds an empty prompt"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, None, r"row 0: its column 'prompt': message 0"),
        ({"prompt": "1 + 1 =", "answer": "2"}, "{prompt}!", r"prompt_template: the column 'prompt' of m.jsonl"),
    ],
)
def test_a_bad_prompt_column_is_refused(tmp_path, row, template, words):
    with pytest.raises(ValueError, match=words):
        load_benchmark(str(write(tmp_path / "m.jsonl", row)), prompt_template=template)
