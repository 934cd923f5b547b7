"""The base's answers on disk: the file that an evaluation reads, and the one that a resume reads, or refuses."""

import json

import pytest

from trl_crisp.evaluation.problems import load_benchmark
from trl_crisp.health.base_answers import Base, read_base, write_references
from trl_crisp.health.reference import Reference

PROMPTS = [[{"role": "user", "content": f"1 + {n}?"}] for n in range(3)]

GOLDS = {0: "1", 2: ["3", "3.0"]}


def make_base(**changes) -> Base:
    fields = {
        "prompts": PROMPTS,
        "references": [Reference("1", 4, 0.75), None, Reference("3", 5, 1.0)],
        "golds": GOLDS,
        "accuracies": {0: 0.8, 2: 1.0},
    }
    return Base(**fields | changes)


def test_an_evaluation_reads_the_file_with_prompts_as_they_are(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}]
    others = [{"role": "user", "content": "1 + 2?"}]
    path = tmp_path / "deep" / "reference.jsonl"
    assert (
        write_references(path, [messages, others, others], [Reference("2", 4, 0.8), None, Reference("3", 5, 1.0)]) == 1
    )
    benchmark = load_benchmark(str(path))
    assert [(problem.id, problem.prompt, problem.answer) for problem in benchmark.problems] == [
        ("0", messages, "2"),
        ("2", others, "3"),
    ]
    assert benchmark.kind == "math"
    assert [json.loads(line)["base_agreement"] for line in path.read_text(encoding="utf-8").splitlines()] == [0.8, 1.0]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "agreement" / "base.json"
    make_base().write(path)
    read = read_base(path, 3)
    assert read == make_base()
    read.check(path, PROMPTS, GOLDS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([*PROMPTS[:2], "x"], GOLDS), "prompt 2 is not the one that this run monitors"),
        ((PROMPTS[:2], GOLDS), "prompt 2 is not the one that this run monitors"),
        ((PROMPTS, {0: "1"}), "2 of the monitor prompts had a right answer .* now 1 have"),
        ((PROMPTS, {**GOLDS, 0: "13"}), "the right answer of prompt 0 was '1' .* now it is '13'"),
        ((PROMPTS, {**GOLDS, 2: ["3"]}), r"the right answer of prompt 2 was \['3', '3\.0'\] .* now it is \['3'\]"),
    ],
)
def test_other_prompts_or_right_answers_are_refused(tmp_path, asked, message):
    path = tmp_path / "base.json"
    with pytest.raises(ValueError, match=f"base\\.json: .*{message}"):
        make_base().check(path, *asked)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"resumes after step 3, .* not there.*start again in another output_dir"
    ):
        read_base(tmp_path / "base.json", 3)


@pytest.mark.parametrize("damage", ["torn", "empty", "other", "list", "reference", "number"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "base.json"
    make_base().write(path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(
        {
            "torn": whole[: len(whole) // 2],
            "empty": "",
            "other": "{}",
            "list": "[]",
            "reference": whole.replace('"votes"', '"vote"'),
            "number": '{"prompts": 3}',
        }[damage],
        encoding="utf-8",
    )
    with pytest.raises(
        ValueError, match=r"base\.json: this run resumes after step 3, .* damaged \(\w+: .*Put the file back"
    ):
        read_base(path, 3)
