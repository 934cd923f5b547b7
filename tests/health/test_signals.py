"""What the signals say: each threshold, the windows, the lab's committed logs, and the callback on real runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers import make_trainer, parameters_of
from trl_crisp.health.attach import attach_health
from trl_crisp.health.guard import GUARD_ENTRIES, GUARD_STEPS
from trl_crisp.health.signals import EVENTS_FILE, RunningSignals, Verdict, judge

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is", "ignore:teacher_sync_steps=", "ignore:The teacher follows the student"
)

LAB = Path(__file__).parents[2] / "benchmarks" / "results" / "lab"
FIRST = {
    "completions/mean_length": 100.0,
    "completions/p95_length": 160.0,
    "completions/clipped_ratio": 0.1,
    "completions/repeats": 0.1,
    "completions/empty": 0.1,
    "completions/epistemic_words": 8.0,
    "entropy": 0.04,
    "teacher_entropy": 0.04,
    "reverse_kl": 0.02,
    "topk_overlap": 0.98,
}
STEP = 1e-6


def test_a_run_as_at_its_start_is_healthy():
    assert judge(FIRST, FIRST) == Verdict("healthy", ())
    assert judge({}, FIRST) == judge(FIRST, {}) == Verdict("healthy", ())


@pytest.mark.parametrize(
    ("name", "limit", "worse", "status", "words"),
    [
        # `worse` is the direction in which the signal gets worse
        ("entropy", 0.08, +1, "watch", "the student's entropy is 2 times"),
        ("entropy", 0.1, +1, "unhealthy", "the student's entropy is 2.5 times"),
        ("entropy", 0.008, -1, "watch", "the student's entropy has fallen to 20%"),
        ("teacher_entropy", 0.08, +1, "watch", "the teacher's entropy is 2 times"),
        ("reverse_kl", 0.04, +1, "watch", "the reverse KL is 2 times"),
        ("topk_overlap", 0.9 - STEP, -1, "watch", "less than 90% of the two models' probability"),
        ("completions/mean_length", 150, +1, "watch", "rollouts are 1.5 times as long"),
        ("completions/mean_length", 35, -1, "watch", "rollouts have 35% or less of their length"),
        ("completions/p95_length", 240, +1, "watch", "the longest rollouts (95th percentile) are 1.5 times"),
        ("completions/clipped_ratio", 0.3, +1, "watch", "more rollouts are clipped"),
        ("completions/repeats", 0.3, +1, "watch", "more rollouts end in repetition"),
        ("completions/repeats", 0.5, +1, "unhealthy", "most rollouts end in repetition"),
        ("completions/empty", 0.3, +1, "watch", "more rollouts are empty"),
        ("completions/empty", 0.5, +1, "unhealthy", "most rollouts are empty"),
    ],
)
def test_each_threshold_holds_from_its_value_on(name, limit, worse, status, words):
    at = judge(FIRST | {name: limit + worse * STEP / 10}, FIRST)
    assert at.status == status
    assert len(at.reasons) == 1
    assert at.reasons[0].startswith(words)
    before = judge(FIRST | {name: limit - worse * 2 * STEP}, FIRST)
    assert before.reasons != at.reasons
    assert before.status == ("watch" if status == "unhealthy" else "healthy")


@pytest.mark.parametrize(
    ("first", "now", "status"),
    [
        # A rise that is large only against a tiny start
        ({"entropy": 0.001}, {"entropy": 0.0309}, "healthy"),
        ({"entropy": 0.001}, {"entropy": 0.0311}, "unhealthy"),
        ({"entropy": 0.03}, {"entropy": 0.0}, "watch"),
        ({"entropy": 0.029}, {"entropy": 0.0}, "healthy"),
        ({"teacher_entropy": 0.001}, {"teacher_entropy": 0.0309}, "healthy"),
        ({"reverse_kl": 1e-8}, {"reverse_kl": 0.0099}, "healthy"),
        ({"reverse_kl": 1e-8}, {"reverse_kl": 0.0101}, "watch"),
        ({"reverse_kl": 0.02}, {"reverse_kl": math.inf}, "watch"),
        ({"reverse_kl": 0.02}, {"reverse_kl": math.nan}, "healthy"),
        # Most from the start on
        ({"completions/repeats": 0.4}, {"completions/repeats": 0.59}, "healthy"),
        ({"completions/repeats": 0.4}, {"completions/repeats": 0.64}, "watch"),
        ({"completions/repeats": 0.4}, {"completions/repeats": 0.66}, "unhealthy"),
        # Training removes words of doubt on purpose
        ({"completions/epistemic_words": 60.0}, {"completions/epistemic_words": 0.0}, "healthy"),
        # Unlike prompts from the start on
        ({"topk_overlap": 0.6}, {"topk_overlap": 0.56}, "healthy"),
        ({"topk_overlap": 0.6}, {"topk_overlap": 0.54}, "watch"),
    ],
)
def test_a_threshold_needs_a_change_that_is_no_noise(first, now, status):
    assert judge(FIRST | now, FIRST | first).status == status


@pytest.mark.parametrize(
    ("clipped_first", "clipped", "length", "status"),
    [
        (0.1, 0.5, 120.1, "unhealthy"),
        (0.1, 0.5, 119.9, "watch"),
        (0.1, 0.49, 120.1, "watch"),
        (0.3, 0.54, 120.1, "watch"),
        (0.3, 0.56, 120.1, "unhealthy"),
        # The cap clips most from the start on
        (0.9, 1.0, 104, "healthy"),
    ],
)
def test_a_runaway_is_clipped_and_longer(clipped_first, clipped, length, status):
    now = {"completions/clipped_ratio": clipped, "completions/mean_length": length}
    assert judge(FIRST | now, FIRST | {"completions/clipped_ratio": clipped_first}).status == status


def test_all_reasons_are_told_and_each_subject_once():
    verdict = judge(FIRST | {"entropy": 0.4, "reverse_kl": 0.2, "completions/empty": 0.4}, FIRST)
    assert verdict.status == "unhealthy"
    assert [reason.split(" is ")[0] for reason in verdict.reasons] == [
        "more rollouts are empty than at the start",
        "the student's entropy",
        "the reverse KL",
    ]


@pytest.mark.parametrize(
    ("logged_at", "first", "now"),
    [
        # Each entry's value is its step
        (range(1, 13), 3.0, 10.0),
        # The entries that cover the first 5 steps: 6 steps, and the last 5: those at 8, 10, 12
        (range(2, 13, 2), 4.0, 10.0),
        (range(3, 13, 3), 4.5, 10.5),
        ((5, 10, 15), 5.0, 15.0),
        ((10, 20, 30), 10.0, 30.0),
        # logging_first_step: 1 step of value 1, and 9 steps of value 10
        ((1, 10, 20), 9.1, 20.0),
    ],
)
def test_the_windows_are_five_steps_whatever_logging_steps_is(logged_at, first, now):
    running = RunningSignals()
    for step in logged_at:
        running.add(step, {"entropy": float(step), "teacher/age_steps": step, "grad_norm": 1.0, "loss": 1.0})
    assert running.first == {"entropy": pytest.approx(first)}
    assert running.now == {"entropy": pytest.approx(now), "teacher/age_steps": step}


def test_a_value_that_is_missing_is_left_out_of_the_mean():
    running = RunningSignals()
    for step in range(1, 6):
        running.add(step, {"entropy": None if step % 2 else float(step)})
    assert running.first == {"entropy": 3.0}


def test_entries_without_signals_change_no_verdict():
    """Not even as many as fill the window."""
    running = RunningSignals()
    for step in range(1, 13):
        running.add(step, {"entropy": 0.1 if step <= 5 else 1.0})
    assert (running.verdict.status, running.unhealthy_steps) == ("unhealthy", 7)
    before = running.verdict
    for step in range(13, 23):
        assert running.add(step, {"loss": 0.1}) is None
        assert (running.verdict, running.unhealthy_steps, running.unhealthy_entries) == (before, 7, 7)


def test_events_are_changes_of_the_status_and_new_reasons():
    """And the steps on end are those of the entries that were unhealthy."""
    running, events, lost = RunningSignals(), [], []
    for step in range(1, 41):
        entropy = 0.04 if step <= 9 or step > 30 else 0.2
        logs = FIRST | {"entropy": entropy, "reverse_kl": 0.2 if 20 <= step <= 30 else 0.02}
        if (event := running.add(step, logs)) is not None:
            events.append((event["step"], event["status"], len(event["reasons"])))
        lost.append(running.unhealthy_steps)
    # The means of 5 steps: of the entropy 0.072 at step 10, 0.104 at 11, 0.104 at 33, 0.072 at 34 (no less than 0.08: at 33);
    # of the reverse KL 0.056 at step 20
    assert events == [(11, "unhealthy", 1), (20, "unhealthy", 2), (34, "watch", 1), (35, "healthy", 0)]
    assert lost[9:13] == [0, 1, 2, 3]
    assert lost[-1] == 0
    assert running.unhealthy_entries == 0


def replay(path):
    """Return a lab run's accuracy, the worst status of its log, and the step at which the guard stops it."""
    run = json.loads(path.read_text())
    running, statuses, stop = RunningSignals(), set(), None
    for log in run["log"]:
        running.add(log["step"], log)
        statuses.add(running.verdict.status)
        lost = running.unhealthy_steps >= GUARD_STEPS and running.unhealthy_entries >= GUARD_ENTRIES
        stop = log["step"] if lost and stop is None else stop
    worst = next(status for status in ("unhealthy", "watch", "healthy") if status in statuses | {"healthy"})
    return run["plain"]["all"]["accuracy"], worst, stop


def lab_runs():
    bases: dict[str, list[float]] = {"": [], "stability-": []}
    for prefix in bases:
        for path in LAB.glob(f"{prefix}untrained-*.json"):
            bases[prefix].append(json.loads(path.read_text())["plain"]["all"]["accuracy"])
    found = {}
    for path in sorted(LAB.glob("*.json")):
        if "untrained" not in path.stem:
            mean = bases["stability-" if path.stem.startswith(("stability", "short")) else ""]
            accuracy, worst, stop = replay(path)
            found[path.stem] = (accuracy >= sum(mean) / len(mean) - 0.10, worst, stop)
    return found


def test_the_labs_committed_runs_are_judged_rightly():
    """No word on a run that keeps its accuracy; the guard stops every run of M = 1 and M = 5 that ends in ruin."""
    runs = lab_runs()
    kept = {name for name, (is_kept, *_) in runs.items() if is_kept}
    assert len(runs) == 78
    assert len(kept) == 53
    assert {name for name in kept if runs[name][1:] != ("healthy", None)} == set()
    stopped = {name: stop for name, (_, _, stop) in runs.items() if stop is not None}
    assert stopped == {
        **{"m1-seed0": 67, "m1-seed1": 60, "m1-seed2": 56},
        **{"m5-seed0": 75, "m5-seed1": 64, "m5-seed2": 63},
        **{"m10-seed1": 89, "m10-seed2": 92},
        **{"long-m20-seed0": 166, "long-m20-seed1": 195, "long-m20-seed2": 155},
        **{"stability-m1-seed0": 85, "stability-m1-seed1": 93, "stability-m1-seed2": 92},
    }
    watched = {name for name, (_, worst, stop) in runs.items() if worst == "watch" and stop is None}
    assert watched == {"m20-seed0", "m20-seed1", "m20-seed2", "lora-3e-3-seed1"}
    # Unhealthy in the last steps of the log
    assert [name for name, (_, worst, stop) in runs.items() if worst == "unhealthy" and not stop] == ["m10-seed0"]
    # Where the signals see nothing: 11 to 16 points are lost
    unseen = {name for name, (is_kept, worst, _) in runs.items() if not is_kept and worst == "healthy"}
    assert unseen == {
        *("stability-m20-seed0", "stability-m20-seed1", "stability-m20-seed2"),
        *("short-m1-seed0", "short-m1-seed2", "lora-3e-3-seed2"),
    }
    told = " ".join(Path("benchmarks/README.md").read_text(encoding="utf-8").split())
    assert f"the lab's {len(runs)} runs it stops none of the {len(kept)} that" in told
    assert f"and {len(stopped)} of the other {len(runs) - len(kept)}, among" in told
    assert f"at steps {min(stopped.values())} to {max(stopped.values())}. Of {len(unseen)} others" in told


class Seen(TrainerCallback):
    """Keeps the logs as a tracker gets them."""

    def __init__(self):
        self.statuses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.statuses.append(logs.get("health/status"))


# A teacher that follows the student, at a rate that ends in one repeated character
LOST = {"learning_rate": 0.3, "teacher_model_kind": "live", "max_completion_length": 64}


def lost_run(directory, max_steps, **overrides):
    seen = Seen()
    trainer = make_trainer(directory, max_steps=max_steps, callbacks=[seen], **{**LOST, **overrides})
    health = attach_health(trainer)
    signals, guard = health.signals, health.guard
    return trainer, signals, guard, seen


def events_of(directory):
    return [json.loads(line) for line in (directory / EVENTS_FILE).read_text().splitlines()]


def test_a_resumed_run_has_the_same_events(tmp_path, capsys):
    """The trackers, the log and the file say the same; lines after the checkpoint go, and so does a torn one."""
    saves = {"save_strategy": "steps", "save_steps": 9, "collapse_guard": False}
    trainer, signals, guard, seen = lost_run(tmp_path, 12, **saves)
    assert guard is None
    trainer.train()
    output = capsys.readouterr().out
    events = events_of(tmp_path)
    assert [event["status"] for event in events] == ["watch", "watch", "unhealthy"]
    first, _, lost = events
    assert "most rollouts end in repetition" in lost["reasons"]
    assert lost["values"]["completions/repeats"] >= 0.5
    assert lost["first"]["completions/repeats"] == 0
    assert all(f"health at step {event['step']}: {event['status']} (" in output for event in events)
    assert "loss" in output
    assert "  unhealthy" in output
    logged = [log["health/status"] for log in trainer.state.log_history if "loss" in log]
    assert logged == seen.statuses
    begins, ends = first["step"], lost["step"]
    assert logged == [0.0] * (begins - 1) + [1.0] * (ends - begins) + [2.0] * (13 - ends)

    whole = (tmp_path / EVENTS_FILE).read_text()
    (tmp_path / EVENTS_FILE).write_text(whole + '{"step": 11, "status": "healthy"}\n{"step": 12, "sta')
    resumed, again, _, _ = lost_run(tmp_path, 12, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert (tmp_path / EVENTS_FILE).read_text() == whole
    assert [log["health/status"] for log in resumed.state.log_history if "loss" in log] == logged
    assert again.running == signals.running


def test_signals_leave_the_weights_as_they_are(tmp_path):
    """Bit for bit; and a new run takes the events of an earlier one away."""
    plain = make_trainer(tmp_path / "plain", max_steps=3)
    plain.train()
    watched = make_trainer(tmp_path / "watched", max_steps=3)
    attach_health(watched)
    (tmp_path / "watched" / EVENTS_FILE).parent.mkdir(exist_ok=True)
    (tmp_path / "watched" / EVENTS_FILE).write_text("{}\n")
    watched.train()
    expected = parameters_of(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in parameters_of(watched.model).items())
    assert not (tmp_path / "watched" / EVENTS_FILE).exists()
