"""Which measure judges: labels where there are enough and they can fall, else agreement; in its rule and in runs."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.health.test_sweet_spot import QUESTIONS, answering_model
from tests.helpers import make_trainer
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.attach import attach_health
from trl_crisp.health.ending import describe_end
from trl_crisp.health.judge import choose_judge
from trl_crisp.health.measuring import BenchmarkCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is",
    "ignore:teacher_sync_steps=",
    "ignore:.* of the base.s answers to the monitor prompts",
)


@pytest.mark.parametrize(
    ("labelled", "agreement", "accuracy", "judged_by"),
    [
        (16, 0.9, 0.8, "accuracy"),
        (15, 0.9, 0.8, "agreement"),
        (0, 0.9, None, "agreement"),
        (0, None, None, None),
        (32, None, 0.5, "accuracy"),
        # What is hardly ever right cannot get worse by more than the margin
        (32, 0.9, 0.03, "agreement"),
        (32, 0.03, 0.03, None),
    ],
)
def test_labels_win_over_agreement_if_half_of_the_prompts_have_them(labelled, agreement, accuracy, judged_by):
    assert choose_judge(32, labelled, accuracy, agreement, 0.03) == judged_by


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the directories of models that have learned to answer: with an answer line, and without."""
    directory = tmp_path_factory.mktemp("models")
    without_line = dict.fromkeys(QUESTIONS, "Rome.")
    return answering_model(directory / "line", QUESTIONS), answering_model(directory / "no-line", without_line)


def train(output_dir, model, golds, resume=None, answer_of=None, **fields):
    """Train at a rate at which one step destroys the model, and return the trainer and its health."""
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    monitored = [{**row, "answer": gold} for row, gold in zip(rows[16:], golds, strict=True)]
    defaults = {
        **{"monitor_file": "own.jsonl", "monitor_samples": 2, "monitor_steps": 1, "temperature": 0.2},
        **{"max_completion_length": 24, "learning_rate": 0.5, "max_steps": 4, "stop_at_sweet_spot": True},
    }
    trainer = make_trainer(
        output_dir,
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        dataset=Dataset.from_list(rows[:16]),
        **{**defaults, **fields},
    )
    health = attach_health(trainer, answer_of, monitor_dataset=Dataset.from_list(monitored))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, health


def logged(trainer, key: str) -> dict[int, float]:
    return {log["step"]: log[key] for log in trainer.state.log_history if key in log}


def test_labels_that_the_base_never_meets_leave_the_stop_to_agreement(models, tmp_path, capsys):
    trainer, health = train(tmp_path, models[0], ["77"] * 8)
    out = capsys.readouterr().out
    assert (
        "Monitor prompts: 8 of 8 have a majority answer of the base's (agreement 100.0%), 8 of 8 have a right answer (accuracy 0.0%). Accuracy "
        "is not above the margin of 3 points, so it cannot fall by more, and it does not judge. Check that monitor_grader reads these answers. "
        "Whether the answers hold is judged by agreement with the base's majority answers."
    ) in out
    assert (
        "Training ends after step 2: agreement with the base's majority answers is -100.0 points from the base's"
        in out
    )
    assert health.sweet_spot.is_lost(trainer.state)
    # It is reported all the same
    assert logged(trainer, "eval_agreement_accuracy") == {0: 0.0, 1: 0.0, 2: 0.0}


def test_labels_judge_where_no_majority_can_be_found(models, tmp_path, capsys):
    # Without an answer line a text has no final answer that could be compared, and its first sentence can still be graded
    fields = {"monitor_grader": "text", "save_strategy": "steps", "save_steps": 1}
    trainer, health = train(tmp_path, models[1], ["Rome"] * 8, **fields)
    out = capsys.readouterr().out
    assert "Monitor prompts: 8 of 8 have a right answer (accuracy 100.0%)." in out
    assert (
        "only 0 of 8 monitor prompts, so agreement is not measured. The task may have no final answers that can be compared. Whether the answers "
        "hold is judged by accuracy on the monitor prompts." in out
    )
    assert "Training ends after step 2: accuracy on the monitor prompts is -100.0 points from the base's" in out
    assert logged(trainer, "eval_agreement_accuracy") == {0: 1.0, 1: 0.0, 2: 0.0}
    assert logged(trainer, "eval_agreement") == {}
    assert "accuracy 100.0% -> 0.0% (-100.0 points" in describe_end(trainer, health)
    # A resumed run has the base's accuracy from the disk
    resumed, _ = train(tmp_path, models[1], ["Rome"] * 8, resume=str(tmp_path / "checkpoint-1"), **fields)
    assert resumed.state.global_step == 2
    assert logged(resumed, "eval_agreement_accuracy") == {0: 1.0, 1: 0.0, 2: 0.0}
    with pytest.raises(ValueError, match=r"8 of the monitor prompts had a right answer .* and now 7 have"):
        train(tmp_path, models[1], ["Rome"] * 7 + [None], resume=str(tmp_path / "checkpoint-1"), **fields)


def test_rows_without_an_answer_do_not_turn_the_others_off(models, tmp_path, capsys):
    trainer, _ = train(tmp_path, models[0], ["12"] * 4 + ["13", None, None, None])
    out = capsys.readouterr().out
    assert "2 at each measurement, and the accuracy of the 5 that have a right answer." in out
    assert "5 of 8 have a right answer (accuracy 80.0%). Whether the answers hold is judged by accuracy" in out
    assert logged(trainer, "eval_agreement_accuracy") == {0: pytest.approx(0.8), 1: 0.0, 2: 0.0}
    assert logged(trainer, "eval_agreement_accuracy_change")[2] == pytest.approx(-0.8)


def test_too_few_answers_are_counted_and_not_used(models, tmp_path, capsys):
    trainer, _ = train(tmp_path, models[0], ["12"] * 3 + [None] * 5, max_steps=1)
    out = capsys.readouterr().out
    assert (
        "Only 3 of 8 monitor prompts have a right answer, and half of them need one, so accuracy is not measured"
        in out
    )
    assert logged(trainer, "eval_agreement_accuracy") == {}


def test_accuracy_is_that_of_all_prompts_with_a_right_answer(models, tmp_path, capsys):
    """Prompts without a majority answer are asked too, and those with one are counted."""
    numbers = iter(range(1000))

    def first_answers_only(text: str) -> str | None:
        # The base has 16 answers; those to the last 4 prompts are not found
        return "12" if "12" in text and next(numbers) < 8 else None

    trainer, health = train(tmp_path, models[0], ["12"] * 8, answer_of=first_answers_only, max_steps=1)
    assert sorted(health.monitor.references) == [0, 1, 2, 3]
    assert (
        "Monitor prompts: 4 of 8 have a majority answer of the base's (agreement 100.0%), 8 of 8"
        in capsys.readouterr().out
    )
    assert logged(trainer, "eval_agreement_references") == {0: 4}
    lengths = logged(trainer, "eval_agreement_mean_tokens")
    assert lengths.keys() == {0, 1}
    assert health.monitor._asked == list(range(8))


def train_with_benchmark(tmp_path, model, golds, answer_of=None, **fields):
    """Train at a rate at which one step destroys the model, with a benchmark of these right answers."""
    file = tmp_path / "held_out.jsonl"
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    lines = [json.dumps({**row, "answer": gold}) for row, gold in zip(rows, golds, strict=False)]
    file.write_text("".join(f"{line}\n" for line in lines))
    defaults = {
        **{"temperature": 0.2, "max_completion_length": 24, "learning_rate": 0.5, "max_steps": 3},
        **{"stop_at_sweet_spot": True, "monitor_samples": 2, "monitor_steps": 1},
    }
    if "monitor_prompts" not in fields:
        defaults = {name: value for name, value in defaults.items() if not name.startswith("monitor")}
    trainer = make_trainer(
        tmp_path / "run",
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        dataset=Dataset.from_list(rows),
        **defaults | fields,
    )
    settings = EvaluationSettings(str(model), str(file), samples=1, max_new_tokens=24, temperature=0.2)
    trainer.add_callback(BenchmarkCallback(trainer, settings, every_steps=1))
    health = attach_health(trainer, answer_of)
    trainer.train()
    return trainer, health


def test_a_benchmark_judges_before_the_monitor(models, tmp_path, capsys):
    # Agreement stays at 100%
    trainer, health = train_with_benchmark(tmp_path, models[0], ["12"] * 8, lambda _: "same", monitor_prompts=8)
    out = capsys.readouterr().out
    assert "is judged by" not in out
    assert "Training ends after step 2: accuracy on held_out is -100.0 points from the base's" in out
    assert logged(trainer, "eval_agreement") == {0: 1.0, 1: 1.0, 2: 1.0}
    assert health.sweet_spot.is_lost(trainer.state)


def test_a_benchmark_that_the_base_does_not_meet_leaves_the_stop_to_the_monitor(models, tmp_path, capsys):
    trainer, health = train_with_benchmark(tmp_path, models[0], ["77"] * 8, monitor_prompts=8)
    out = capsys.readouterr().out
    assert (
        "Whether the answers hold is not judged by accuracy on held_out: the base's own, 0.0%, is not above the margin of 1 points, so it cannot "
        "fall by more.\n" in out
    )
    assert "Whether the answers hold is judged by agreement with the base's majority answers." in out
    assert "Training ends after step 2: agreement with the base's majority answers is -100.0 points" in out
    assert trainer.state.best_global_step is None
    assert health.sweet_spot.is_lost(trainer.state)


@pytest.mark.parametrize(("golds", "why"), [(["77"] * 8, "0.0%, is not above"), (["12"], "one problem is too few")])
def test_a_benchmark_that_cannot_judge_names_no_best_step(models, tmp_path, capsys, golds, why):
    trainer, health = train_with_benchmark(tmp_path, models[0], golds)
    out = capsys.readouterr().out
    assert why in out
    assert "No step is the best. stop_at_sweet_spot does not end the run." in out
    assert (trainer.state.global_step, trainer.state.best_global_step) == (3, None)
    assert "Nothing says whether the answers hold (" in describe_end(trainer, health)
    assert "No measured step can be the best checkpoint by accuracy on held_out: " in health.benchmark.describe_best(
        trainer.state
    )


def test_majority_answers_are_not_taken_for_right_answers(models, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    references = [{**row, "answer": "12", "votes": 5, "base_agreement": 1.0} for row in rows[16:]]
    trainer = make_trainer(
        tmp_path,
        model=AutoModelForCausalLM.from_pretrained(models[0], dtype="float32"),
        dataset=Dataset.from_list(rows[:16]),
        monitor_file="reference.jsonl",
        monitor_samples=2,
    )
    with pytest.warns(UserWarning, match="reference.jsonl' has a column base_agreement, so its answers are"):
        health = attach_health(trainer, monitor_dataset=Dataset.from_list(references))
    assert health.monitor._golds == {}
