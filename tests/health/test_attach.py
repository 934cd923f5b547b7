"""What attaching health says of settings that leave it without effect."""

import warnings

import pytest

from tests.helpers import make_trainer
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
        {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1, "collapse_guard": False},
    ],
)
def test_a_log_with_enough_entries_does_not_warn(tmp_path, fields):
    trainer = make_trainer(tmp_path, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_health(trainer)
