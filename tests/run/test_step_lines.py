"""What a run prints on a terminal."""

import pytest
from transformers import TrainerState

from tests.helpers import make_trainer
from trl_crisp.run.step_lines import StepLines, format_duration, format_line


@pytest.mark.parametrize(
    ("logs", "left_s", "line"),
    [
        (
            {
                "loss": 0.03456,
                "reverse_kl": 0.0312,
                "completions/mean_length": 1234.4,
                "completions/relative_length": 0.834,
                "completions/clipped_ratio": 0.031,
                "skipped_steps": 0,
                "grad_norm": 3.0,
            },
            185,
            "step 3/20  length 1,234 tokens (83% of the first steps')  clipped 3%  reverse KL 0.0312 nats  loss 0.0346  "
            "3 min 5 s left",
        ),
        ({"loss": 1.0, "skipped_steps": 2.0}, None, "step 3/20  loss 1  skipped steps 2"),
        ({"loss": 1.0, "health/status": 0.0}, None, "step 3/20  loss 1"),
        ({"loss": 1.0, "health/status": 1.0}, None, "step 3/20  loss 1  watch"),
        ({"loss": 1.0, "health/status": 2.0}, None, "step 3/20  loss 1  unhealthy"),
        ({"eval_facts_accuracy": 0.71239, "epoch": 1.0}, 5, "step 3/20  evaluation  facts_accuracy 0.7124"),
        ({"train_runtime": 61.2, "train_loss": 0.1}, 0, "step 3/20  trained in 1 min 1 s"),
    ],
    ids=["step", "skipped", "healthy", "watch", "unhealthy", "evaluation", "end"],
)
def test_a_line_shows_what_the_log_has(logs, left_s, line):
    assert format_line(3, 20, logs, left_s) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 0 s"), (3599.4, "59 min 59 s"), (7800, "2 h 10 min")]
)
def test_a_duration_has_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


def test_the_time_left_follows_from_the_steps_of_this_run(monkeypatch, capsys):
    """Of a run that resumed at step 4: six steps in 30 seconds."""
    lines, state = StepLines(), TrainerState(global_step=4, max_steps=20)
    monkeypatch.setattr("time.monotonic", iter([100.0, 130.0]).__next__)
    lines.on_train_begin(None, state, None)
    state.global_step = 10
    lines.on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().out == "step 10/20  loss 1  50 s left\n"


def test_a_run_prints_a_line_a_step_and_no_dict(tmp_path, capsys):
    make_trainer(tmp_path, disable_tqdm=False).train()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/3", "2/3", "3/3", "3/3"]
    assert all(" left" in line for line in lines if line.startswith(("step 1/", "step 2/")))
    assert "{'" not in printed.out + printed.err
