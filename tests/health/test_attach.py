"""What attaching health says of settings that leave it without effect."""

import warnings

import pytest
from datasets import Dataset

from tests.helpers import make_trainer, rows
from trl_crisp.health.attach import attach_health


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"logging_strategy": "no"},
            "the signals of health and collapse_guard read the training's log, and there is none",
        ),
        ({"logging_strategy": "no", "collapse_guard": False}, "the signals of health read the training's log"),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, "collapse_guard has no effect"),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, "makes at most 2 log entries"),
        # 8 rows are 2 steps
        ({"logging_strategy": "epoch", "max_steps": 4}, "in at most 2 epochs makes at most 2 log entries"),
        ({"logging_steps": 50, "max_steps": 99}, "logging_steps=50 in at most 99 steps makes at most 1 log entries"),
        ({"logging_steps": 50, "max_steps": 149}, "makes at most 2 log entries"),
        (
            {"logging_steps": 0.4, "max_steps": 100},
            "logging_steps=0.4 in at most 100 steps makes at most 2 log entries",
        ),
        ({"logging_steps": 9, "max_steps": -1, "num_train_epochs": 10}, "in at most 20 steps makes at most 2"),
    ],
)
def test_a_log_with_too_few_entries_warns(tmp_path, fields, words):
    trainer = make_trainer(tmp_path, **fields)
    with pytest.warns(UserWarning, match=words):
        attach_health(trainer)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3},
        {"logging_strategy": "epoch", "max_steps": 5},
        {"logging_steps": 50, "max_steps": 150},
        {"logging_steps": 50, "max_steps": 99, "collapse_guard": False},
        {"logging_steps": 5, "max_steps": -1, "num_train_epochs": 10},
        # So few steps are never enough for the guard
        {"logging_steps": 50, "max_steps": 14},
        {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1, "collapse_guard": False},
    ],
)
def test_a_log_with_enough_entries_does_not_warn(tmp_path, fields):
    trainer = make_trainer(tmp_path, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_health(trainer)


def answer_of(text: str) -> str | None:
    return text[:2] or None


GATED = {"monitor_prompts": 8, "teacher_refresh_gate": "agreement"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"teacher_sync_steps": 10, "max_steps": 9},
            "first refresh is due at step 10, and the run has at most 9 steps",
        ),
        # 24 rows without the 8 monitor prompts are 4 steps
        ({"teacher_sync_steps": 10, "max_steps": -1, "num_train_epochs": 2}, "and the run has at most 8 steps"),
        ({"teacher_sync_steps": 10, "max_steps": 10}, None),
        ({"teacher_sync_steps": 10, "max_steps": -1, "num_train_epochs": 3}, None),
        ({"teacher_sync_steps": 10, "max_steps": 9, "teacher_refresh_gate": None}, None),
    ],
)
def test_a_gate_without_a_refresh_to_postpone_warns(tmp_path, fields, words):
    trainer = make_trainer(tmp_path, dataset=rows(24), **{**GATED, **fields})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach_health(trainer, answer_of)
    of_gate = [str(one.message) for one in told if "teacher_refresh_gate" in str(one.message)]
    assert len(of_gate) == (words is not None)
    assert words is None or words in of_gate[0]


@pytest.mark.parametrize(
    ("fields", "given", "words"),
    [
        ({}, {"monitor_dataset": rows(8)}, "monitor_dataset has no effect without monitor_file"),
        ({"monitor_prompts": 8}, {"monitor_dataset": rows(8)}, "monitor_dataset has no effect without monitor_file"),
        ({}, {"answer_of": answer_of}, "answer_of has no effect without monitor_prompts or monitor_file"),
        (
            {"monitor_prompts": 8, "monitor_grader": "text"},
            {"answer_of": answer_of},
            "monitor_grader='text' has no effect with answer_of, which replaces it",
        ),
    ],
)
def test_arguments_that_nothing_reads_warn(tmp_path, fields, given, words):
    trainer = make_trainer(tmp_path, dataset=rows(24), **fields)
    with pytest.warns(UserWarning, match=words):
        attach_health(trainer, **given)


def test_arguments_that_are_read_do_not_warn(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), monitor_file="own.jsonl", monitor_grader="math")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_health(trainer, answer_of, monitor_dataset=rows(8, "Now: "))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (rows(8).rename_column("prompt", "question"), r"no column 'prompt'; it has question\. Rename the column"),
        (list(rows(8)), r"monitor_dataset is a list, and has to be a datasets\.Dataset"),
        (
            Dataset.from_list([*rows(8), {"prompt": None}]),
            r"monitor_dataset: row 8: column 'prompt' holds nothing \(null\)",
        ),
        (
            Dataset.from_list([{"prompt": [{"content": f"What is {i}?"}]} for i in range(8)]),
            r"monitor_dataset: row 0: column 'prompt': message 0 has no 'role'",
        ),
    ],
)
def test_a_monitor_dataset_without_prompts_is_refused(tmp_path, given, words):
    trainer = make_trainer(tmp_path, dataset=rows(24), monitor_file="own.jsonl")
    with pytest.raises(ValueError, match=words):
        attach_health(trainer, answer_of, monitor_dataset=given)
