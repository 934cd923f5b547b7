"""The quickstart's questions, its model directory, and what it makes of results."""

import json
import re
import sys

import numpy as np
import pytest

from tests.helpers import EXAMPLES, load_example, make_trainer
from tests.tiny_models import save_tiny
from trl_crisp.evaluation.evaluating import evaluate
from trl_crisp.evaluation.settings import EvaluationSettings

SPLITS = ("train", "tune", "test")


@pytest.fixture(scope="module")
def facts():
    return {
        split: [json.loads(line) for line in (EXAMPLES / "facts" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


def test_there_are_enough_questions_of_enough_kinds(facts):
    every = [row for rows in facts.values() for row in rows]
    assert len(every) >= 300
    assert len(facts["test"]) >= 150
    assert len({row["level"] for row in facts["test"]}) >= 4
    assert {row["level"] for row in every} == {row["level"] for row in facts["test"]}


def test_no_fact_is_in_two_splits_and_no_question_has_its_answer(facts):
    every = [row for rows in facts.values() for row in rows]
    for column in ("id", "question"):
        assert len({row[column] for row in every}) == len(every), column
    for row in every:
        assert row["answer"], row
        for answer in row["answer"]:
            assert not re.search(rf"\b{re.escape(answer)}\b", row["question"], re.IGNORECASE), row


def test_a_model_directory_is_used_again_only_with_its_weights(tmp_path):
    example = load_example("get_smollm2")
    assert example.read_source(tmp_path) is None
    (tmp_path / example.WEIGHTS).write_bytes(b"weights")
    sha256 = example._sha256(tmp_path / example.WEIGHTS)
    source = {"source": "package", "name": example.PACKAGE, "weights_sha256": sha256}
    (tmp_path / example.MARKER).write_text(json.dumps(source))
    assert example.get_smollm2(tmp_path) == source
    (tmp_path / example.WEIGHTS).write_bytes(b"others")
    assert example.read_source(tmp_path) is None
    (tmp_path / example.MARKER).write_text("{")
    assert example.read_source(tmp_path) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of different seeds on a tiny model, as the quickstart leaves them."""
    directory = tmp_path_factory.mktemp("runs")
    model = save_tiny(directory / "tiny")
    for seed in (3, 4):
        run = directory / f"seed{seed}"
        trainer = make_trainer(run / "model", max_steps=2, logging_steps=1, seed=seed)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        for arm, asked in (("base", model), ("concise", model), ("after", str(run / "model"))):
            settings = EvaluationSettings(
                asked,
                str(EXAMPLES / "facts" / "test.jsonl"),
                instruction="Be brief." if arm == "concise" else "",
                samples=1,
                max_new_tokens=8,
                limit=6,
                seed=seed,
            )
            evaluate(settings, run / arm)
    return [directory / "seed3", directory / "seed4"]


def test_runs_are_pooled_by_question(runs):
    quickstart = load_example("quickstart")
    result = quickstart.summarize(runs)
    assert result["protocol"]["seeds"] == [3, 4]
    assert (result["protocol"]["questions"], result["protocol"]["samples"]) == (6, 1)
    assert result["training"]["max_steps"] == 2
    for arm in ("base", "concise", "after"):
        tokens = [
            [
                problem["samples"][0]["tokens"]
                for problem in json.loads((run / arm / "results.json").read_text())["problems"]
            ]
            for run in runs
        ]
        assert result["arms"][arm]["tokens"]["estimate"] == pytest.approx(np.mean(tokens))
        assert result["by_seed"]["4"][arm]["tokens"] == pytest.approx(np.mean(tokens[1]))
    change = result["arms"]["after"]["change"]
    base, after = (result["arms"][arm]["tokens"]["estimate"] for arm in ("base", "after"))
    assert change["tokens"]["estimate"] == pytest.approx(after / base - 1)
    assert change["tokens"]["low"] <= change["tokens"]["estimate"] <= change["tokens"]["high"]
    assert result["example"]["question"].endswith("?") or result["example"]["question"].endswith(".")


def test_the_table_goes_between_the_markers_of_a_readme(runs, tmp_path, monkeypatch, capsys):
    quickstart = load_example("quickstart")
    readme, source = tmp_path / "README.md", tmp_path / "pooled.json"
    readme.write_text(f"before\n{quickstart.README_START}\nold\n{quickstart.README_END}\nafter\n")
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", *map(str, runs), "--json", str(source), "--readme", str(readme)]
    )
    quickstart.main()
    table = quickstart.render(json.loads(source.read_text()), source)
    assert readme.read_text() == f"before\n{quickstart.README_START}\n{table}{quickstart.README_END}\nafter\n"
    assert table in capsys.readouterr().out
    assert (runs[0] / "length.png").stat().st_size > 5_000


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    quickstart = load_example("quickstart")
    with pytest.raises(ValueError, match=r"the runs have the seeds \[3, 3\]"):
        quickstart.summarize([runs[0], runs[0]])
    other = tmp_path / "other"
    for arm in ("base", "concise", "after"):
        (other / arm).mkdir(parents=True)
        results = json.loads((runs[1] / arm / "results.json").read_text())
        results["protocol"]["temperature"] = 1.0
        (other / arm / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="the runs differ in temperature"):
        quickstart.summarize([runs[0], other])
