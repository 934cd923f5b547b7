"""The collapse guard: when it stops, what it leaves on disk, and the training script around it."""

import json

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.health.test_signals import FIRST, LOST
from tests.helpers import config, make_trainer, parameters_of, rows
from tests.tiny_models import save_tiny
from trl_crisp.health.attach import attach_health
from trl_crisp.health.ending import describe_lost
from trl_crisp.health.guard import CollapseGuard
from trl_crisp.health.signals import HealthSignals
from trl_crisp.train import main, parse_args

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is", "ignore:teacher_sync_steps=", "ignore:The teacher follows the student"
)


def fed(directory, entropies, every=1):
    """Return a guard that was fed with a log entry of each entropy, its args, and the controls it gave back."""
    args = config(directory, save_total_limit=2)
    state, signals = TrainerState(), HealthSignals()
    guard, controls = CollapseGuard(signals), []
    for callback in (signals, guard):
        callback.on_train_begin(args, state, TrainerControl())
    for number, entropy in enumerate(entropies, start=1):
        state.global_step = every * number
        logs = FIRST | {"entropy": entropy, "loss": 1.0}
        state.log_history.append(dict(logs))
        controls.append(TrainerControl())
        for callback in (signals, guard):
            callback.on_log(args, state, controls[-1], logs=logs)
        if controls[-1].should_training_stop:
            break
    return guard, args, controls


# Ten unhealthy steps are 6 to 15 with these: the mean of 5 passes 2.5 times the start's with the first value
HIGH = 1.0


def test_it_stops_after_ten_unhealthy_steps_on_end(tmp_path):
    guard, args, controls = fed(tmp_path, [0.04] * 5 + [HIGH] * 20)
    assert guard.stopped_at_step == len(controls) == 15
    assert (controls[-1].should_save, controls[-1].should_training_stop) == (True, True)
    assert not any(control.should_save or control.should_training_stop for control in controls[:-1])
    assert guard.reasons == ["the student's entropy is 2.5 times that of the first steps or more"]
    words = guard.describe()
    assert words.startswith(
        "Stopped after step 15: the run looks lost. For 10 steps on end:\n  - the student's entropy"
    )
    # No other checkpoint makes room for its own; the next training has the user's setting again
    assert args.save_total_limit is None
    guard.on_train_begin(args, TrainerState(), TrainerControl())
    assert args.save_total_limit == 2
    assert (guard.stopped_at_step, guard.reasons) == (None, [])


def test_a_step_that_is_not_unhealthy_starts_the_count_again(tmp_path):
    # A mean of 5 stays high for 4 steps after the last high value, so high values for 5 steps are 9 unhealthy ones
    guard, _, controls = fed(tmp_path, [0.04] * 5 + [HIGH] * 5 + [0.04] * 5 + [HIGH] * 5 + [0.04] * 5)
    assert guard.stopped_at_step is None
    assert len(controls) == 25
    guard, *_ = fed(tmp_path, [0.04] * 5 + [HIGH] * 6 + [0.04] * 5)
    assert guard.stopped_at_step == 15


@pytest.mark.parametrize(("every", "stop"), [(2, 16), (10, 30), (50, 150)])
def test_an_entry_counts_the_steps_that_it_covers_and_one_is_not_enough(tmp_path, every, stop):
    first = -(-5 // every)
    guard, *_ = fed(tmp_path, [0.04] * first + [HIGH] * 10, every)
    assert guard.stopped_at_step == stop


def test_the_config_turns_it_off(tmp_path):
    trainer = make_trainer(tmp_path, collapse_guard=False)
    guard = attach_health(trainer).guard
    assert guard is None
    assert not any(isinstance(callback, CollapseGuard) for callback in trainer.callback_handler.callbacks)


def test_a_healthy_run_with_the_guard_ends_with_the_same_bits(tmp_path):
    """Also the optimizer's state and the random numbers in its checkpoint."""
    files = []
    for guarded in (False, True):
        fields = {"max_steps": 12, "save_strategy": "steps", "save_steps": 12, "learning_rate": 1e-4}
        trainer = make_trainer(tmp_path / str(guarded), collapse_guard=guarded, **fields)
        health = attach_health(trainer)
        trainer.train()
        assert (health.guard is not None) is guarded
        assert trainer.state.global_step == 12
        checkpoint = tmp_path / str(guarded) / "checkpoint-12"
        files.append(
            {name: torch.load(checkpoint / name, weights_only=False) for name in ("optimizer.pt", "rng_state.pth")}
        )
        files[-1]["weights"] = parameters_of(trainer.model)
    unguarded, guarded = (dict(_leaves(one)) for one in files)
    assert unguarded.keys() == guarded.keys()
    assert len(unguarded) > 20
    assert all(_same(value, guarded[name]) for name, value in unguarded.items())


def _leaves(value, name=""):
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if children is None:
        yield name, value
        return
    for key, child in children:
        yield from _leaves(child, f"{name}/{key}")


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_a_stop_in_python_is_told_and_nothing_unhealthy_is_pushed(tmp_path, monkeypatch, capsys):
    """And a resume of a stop at the last step, which trains no more, is lost too."""
    pushed = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint", lambda self, folder: pushed.append(self.state.global_step)
    )
    fields = {"max_steps": 30, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, **LOST}
    trainer = make_trainer(tmp_path, **fields)
    health = attach_health(trainer)
    trainer.train()
    stop = trainer.state.global_step
    out = capsys.readouterr().out
    assert f"Training stops after step {stop}: the run looks lost" in out
    assert out.count(f"Stopped after step {stop}: the run looks lost. For 10 steps on end:") == 1
    assert f"The model of step {stop} was not saved as the result, and it was not pushed. Earlier checkpoints" in out
    assert "`--collapse_guard false` trains on." in out
    healthy = [log["step"] for log in trainer.state.log_history if log.get("health/status", 2) < 2]
    assert pushed == [step for step in range(1, stop + 1) if step in healthy]
    assert 5 <= len(pushed) <= stop - 10
    assert trainer.args.push_to_hub is False

    again = make_trainer(tmp_path, **{**fields, "max_steps": stop})
    resumed = attach_health(again)
    again.train(resume_from_checkpoint=True)
    assert resumed.guard.stopped_at_step == stop
    assert resumed.guard.reasons == health.guard.reasons
    assert describe_lost(again, resumed) == describe_lost(trainer, health)
    assert again.args.push_to_hub is False


def train(model, rows_file, output_dir, *flags):
    """Run the training script in this process, and return its exit status."""
    fields = {
        **{"model_name_or_path": model, "dataset_name": rows_file, "output_dir": output_dir, "report_to": "none"},
        **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False},
        **{
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "instruction": "v1",
        },
        **{"save_strategy": "steps", "save_steps": 12, "save_total_limit": 1, "max_steps": 30, **LOST},
    }
    argv = [item for name, value in fields.items() for item in (f"--{name}", str(value))]
    try:
        main(*parse_args([*argv, *flags]))
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_training_script_ends_a_lost_run_with_status_3(tmp_path, capsys):
    """And a run that is killed before and resumed stops at the same step, with the same events."""
    model, rows_file, output_dir = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "out"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert train(model, rows_file, output_dir) == 3
    output = capsys.readouterr().out
    assert "the run looks lost" in output
    assert "  - most rollouts end in repetition" in output
    assert "The model is in" not in output
    assert not (output_dir / "model.safetensors").exists()
    stop = max(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))
    assert 15 <= stop < 30
    assert f"Stopped after step {stop}:" in output
    # save_total_limit 1 would have removed the earlier one
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-12", f"checkpoint-{stop}"}

    events = (output_dir / "health_events.jsonl").read_text()
    assert train(model, rows_file, output_dir, "--resume_from_checkpoint", str(output_dir / "checkpoint-12")) == 3
    assert f"Stopped after step {stop}:" in capsys.readouterr().out
    assert (output_dir / "health_events.jsonl").read_text() == events
    # From the stop's own checkpoint: one more step
    assert train(model, rows_file, output_dir, "--resume_from_checkpoint", "true") == 3
    assert f"Stopped after step {stop + 1}:" in capsys.readouterr().out
