"""trackio, wandb and tensorboard get the same curves under the same names, and the health events as text.

The callbacks are transformers' own. Packages that are not installed are stood in for by what the callbacks call of them.
"""

import enum
import json
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from tests.helpers import make_trainer, rows
from trl_crisp.health import signals
from trl_crisp.health.attach import attach_health

pytestmark = pytest.mark.filterwarnings("ignore:teacher_sync_steps=")

# What each tracker calls a logged name; a change breaks the dashboards of users
NAMES = {
    "loss": "train/loss",
    "reverse_kl": "train/reverse_kl",
    "entropy": "train/entropy",
    "teacher_entropy": "train/teacher_entropy",
    "topk_overlap": "train/topk_overlap",
    "teacher/age_steps": "train/teacher/age_steps",
    "teacher/refreshes": "train/teacher/refreshes",
    "completions/mean_length": "train/completions/mean_length",
    "completions/p95_length": "train/completions/p95_length",
    "completions/relative_length": "train/completions/relative_length",
    "completions/clipped_ratio": "train/completions/clipped_ratio",
    "completions/repeats": "train/completions/repeats",
    "completions/empty": "train/completions/empty",
    "completions/epistemic_words": "train/completions/epistemic_words",
    "health/status": "train/health/status",
    "skipped_steps": "train/skipped_steps",
    "eval_loss": "eval/loss",
    "eval_reverse_kl": "eval/reverse_kl",
    "eval_agreement_mean_tokens": "eval/agreement_mean_tokens",
}
# transformers writes them once, at the end, and each tracker has its own place for them
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


class AlertLevel(enum.Enum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class Received:
    """What a tracker got: values and texts by name and step, and alerts."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}
        self.texts: list[tuple[str, int, str]] = []
        self.alerts: list[tuple[str, str, AlertLevel]] = []

    def take(self, logs: dict) -> None:
        step = logs.pop("train/global_step")
        for name, value in logs.items():
            if isinstance(value, str):
                self.texts.append((name, step, value))
            else:
                self.values[name, step] = value


def stand_in(kind: str) -> tuple[object, Received]:
    """Return transformers' callback of a tracker, with a package that keeps what it gets."""
    got = Received()
    if kind == "tensorboard":
        callback = TensorBoardCallback.__new__(TensorBoardCallback)

        def add_text(name, text, step=None):
            if step is not None:
                got.texts.append((name, step, text))

        callback.tb_writer = SimpleNamespace(
            add_scalar=lambda name, value, step: got.values.update({(name, step): value}),
            add_text=add_text,
            flush=lambda: None,
            close=lambda: None,
        )
        callback.logging_dir = "unused"
        return callback, got
    config = SimpleNamespace(update=lambda *args, **kwargs: None)
    if kind == "wandb":
        callback = WandbCallback.__new__(WandbCallback)

        def alert(title, text, level, wait_duration):
            assert wait_duration == 0
            got.alerts.append((title, text, level))

        callback._wandb = SimpleNamespace(
            run=SimpleNamespace(alert=alert, summary={}), log=got.take, AlertLevel=AlertLevel, config=config
        )
        callback._log_model = SimpleNamespace(is_enabled=False)
    else:
        callback = TrackioCallback.__new__(TrackioCallback)
        callback._trackio = SimpleNamespace(
            log=got.take,
            alert=lambda title, text, level: got.alerts.append((title, text, level)),
            AlertLevel=AlertLevel,
            finish=lambda: None,
        )
        callback._space_id = None
    callback._initialized = True
    return callback, got


def run(output_dir, monkeypatch, callback=None, **overrides):
    """Train with measurements and one health event: rollouts that never end count as shortened."""
    monkeypatch.setattr(signals, "LENGTH_LEFT_WATCH_RATIO", 2.0)
    trainer = make_trainer(
        output_dir,
        dataset=rows(32),
        eval_dataset=rows(4),
        eval_strategy="steps",
        eval_steps=3,
        monitor_prompts=8,
        monitor_steps=3,
        callbacks=None if callback is None else [callback],
        **{"max_steps": 6, **overrides},
    )
    attach_health(trainer)
    trainer.train()
    return trainer.state.log_history


def curves_of(log_history) -> dict[tuple[str, int], float]:
    """Return the curves that a log has, under the trackers' names."""
    return {
        (f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}", entry["step"]): value
        for entry in log_history
        for name, value in entry.items()
        if name != "step" and name not in SUMMARY
    }


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_the_curves_of_the_log_under_stable_names(tmp_path, monkeypatch, kind):
    callback, got = stand_in(kind)
    log_history = run(tmp_path, monkeypatch, callback)
    curves = {key: value for key, value in got.values.items() if key[0].removeprefix("train/") not in SUMMARY}
    assert curves == curves_of(log_history)
    assert set(NAMES.values()) <= {name for name, _ in curves}
    assert {name for entry in log_history for name in entry} >= NAMES.keys()
    # The base is measured before the first step
    assert ("eval/agreement_mean_tokens", 0) in curves


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_the_health_events_as_text(tmp_path, monkeypatch, kind):
    callback, got = stand_in(kind)
    log_history = run(tmp_path, monkeypatch, callback)
    [event] = [json.loads(line) for line in (tmp_path / "health_events.jsonl").read_text().splitlines()]
    text = f"health at step {event['step']}: watch ({'; '.join(event['reasons'])})"
    assert got.texts == [("train/health/event", event["step"], text)]
    assert got.alerts == ([] if kind == "tensorboard" else [("CRISP: watch", text, AlertLevel.WARN)])
    assert not any("health/event" in entry for entry in log_history)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_an_alert_that_fails_ends_no_training(tmp_path, monkeypatch, kind):
    callback, _ = stand_in(kind)
    package = callback._wandb if kind == "wandb" else callback._trackio
    del package.AlertLevel
    with pytest.warns(UserWarning, match=f"(?i){kind} took no alert of watch: .*AlertLevel"):
        log_history = run(tmp_path, monkeypatch, callback)
    assert log_history[-1]["step"] == 6


def test_a_stop_by_the_guard_is_an_event_too(tmp_path, monkeypatch):
    callback, got = stand_in("wandb")
    monkeypatch.setattr(signals, "RUNAWAY_LENGTH_RATIO", 0.0)
    monkeypatch.setattr(signals, "_most", lambda now, first: True)
    monkeypatch.setattr("trl_crisp.health.guard.GUARD_STEPS", 2)
    run(tmp_path, monkeypatch, callback, max_steps=8)
    assert [(step, level) for (_, step, _), (_, _, level) in zip(got.texts, got.alerts, strict=True)] == [
        (6, AlertLevel.ERROR),
        (7, AlertLevel.ERROR),
    ]
    assert got.alerts[1][1] == "Training stops after step 7: the run looks lost"


def test_a_real_event_file_of_tensorboard_has_curves_and_events(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_history = run(tmp_path, monkeypatch, report_to="tensorboard")
    [directory] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    read = {(name, one.step): one.value for name in events.Tags()["scalars"] for one in events.Scalars(name)}
    expected = curves_of(log_history)
    assert expected.keys() <= read.keys()
    # tensorboard keeps float32
    assert {key: read[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    [text] = events.Tensors("train/health/event/text_summary")
    assert text.tensor_proto.string_val[0].decode().startswith("health at step 6: watch (rollouts have ")
