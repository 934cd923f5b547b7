import json
import time
from pathlib import Path

import pytest

from tests.report.made_results import training_log, write_run
from trl_crisp.report.run_log import load_run


def test_a_run_is_read_as_it_was_left(tmp_path):
    directory = write_run(
        tmp_path / "run", training_log(), max_steps=50, best_global_step=10, best_model_checkpoint="run/checkpoint-10"
    )
    event = {"step": 19, "status": "watch", "reasons": ["more rollouts are clipped than at the start"]}
    (directory / "health_events.jsonl").write_text(json.dumps({**event, "values": {}}) + "\n" + '{"step": 20, "sta')
    run = load_run(directory)
    assert (run.name, run.last_step, run.max_steps, run.best_step) == ("run", 20, 50, 10)
    assert run.best_checkpoint == "checkpoint-10"
    assert run.refreshes == [10]
    assert run.postponed == [15]
    assert run.events == [event]
    assert run.series("eval_agreement_mean_tokens") == [(0, 100.0), (10, 70.0), (20, 40.0)]
    assert run.describe_end() == "The run ended at step 20 of 50."
    assert not run.is_unhealthy_at(20)
    assert run.saved_step is None


def test_values_that_are_not_finite_are_left_out(tmp_path):
    entries = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 0.5}]
    run = load_run(write_run(tmp_path, entries))
    assert run.series("loss") == [(3, 0.5)]
    assert run.describe_end() == "The run did 3 steps."


def test_an_interrupted_run_is_read_from_its_latest_checkpoint(tmp_path):
    for step in (9, 10):
        write_run(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": 0.1}])
    run = load_run(tmp_path)
    assert (run.last_step, run.directory) == (10, tmp_path)


def test_a_log_that_a_later_checkpoint_continues_is_read_from_the_checkpoint(tmp_path):
    """A run was finished, resumed and killed."""
    write_run(tmp_path, [{"step": 4, "loss": 0.1}])
    write_run(tmp_path / "checkpoint-6", [{"step": 6, "loss": 0.1}])
    record = tmp_path / "checkpoint-6" / "crisp_run.json"
    record.write_text('{"saved_at": 1.0}')
    assert load_run(tmp_path).last_step == 4
    record.write_text(json.dumps({"saved_at": time.time() + 60}))
    assert load_run(tmp_path).last_step == 6
    # That of another run is not this run's
    (tmp_path / "_crisp_run.json").write_text('{"run_id": "a"}')
    record.write_text(json.dumps({"saved_at": time.time() + 60, "run_id": "b"}))
    assert load_run(tmp_path).last_step == 4


@pytest.mark.parametrize("place", ["checkpoint-2", "."])
def test_a_checkpoints_log_has_the_events_until_it_and_no_end(tmp_path, monkeypatch, place):
    write_run(tmp_path / "run" / "checkpoint-2", [{"step": 2, "loss": 0.1}], max_steps=4)
    events = [{"step": step, "status": "watch", "reasons": ["long"]} for step in (1, 3)]
    (tmp_path / "run" / "health_events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    monkeypatch.chdir(tmp_path / "run" / ("checkpoint-2" if place == "." else ""))
    run = load_run(Path(place))
    assert (run.name, run.directory) == ("run", tmp_path / "run")
    assert [event["step"] for event in run.events] == [1]
    assert not run.ended_early
    assert run.describe_end() == "This is the log of the checkpoint of step 2 of 4."


def test_a_run_that_went_back_is_read_from_the_checkpoint_saved_last(tmp_path):
    for step, saved_at in ((4, 10.0), (9, 20.0), (10, 15.5)):
        write_run(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": 0.1}])
        (tmp_path / f"checkpoint-{step}" / "crisp_run.json").write_text(f'{{"saved_at": {saved_at}}}')
    assert load_run(tmp_path).last_step == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_history": [{"step": 1', "is torn or no log of a run"),
        ("[]", "is torn or no log of a run"),
        ('{"log_history": 3}', "log_history is not a list"),
        ('{"log_history": []}', "has no log entries"),
    ],
)
def test_a_torn_log_is_refused_in_words(tmp_path, text, message):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_step": "abc"}, "global_step is 'abc', not a step"),
        ({"global_step": 1.5}, "global_step is 1.5, not a step"),
        ({"max_steps": [1]}, r"max_steps is \[1\], not a step"),
        ({"best_global_step": "x", "best_model_checkpoint": "x"}, "best_global_step is 'x', not a step"),
        ({"best_model_checkpoint": 5}, "best_model_checkpoint is 5, not a path"),
        ({"log_history": [{"step": None, "loss": 1.0}]}, r"log_history\[0\] has the step None"),
        ({"log_history": [{"loss": 1.0}]}, r"log_history\[0\] has the step None"),
        ({"log_history": [{"step": float("nan")}]}, r"log_history\[0\] has the step nan"),
        ({"log_history": [{"step": 1}, {"step": "2"}]}, r"log_history\[1\] has the step '2'"),
        ({"log_history": [{"step": 1, "teacher/refreshes": None}]}, r"has teacher/refreshes None"),
        ({"log_history": [{"step": 1, "teacher/postponed": "x"}]}, r"has teacher/postponed 'x'"),
        ({"log_history": [{"step": 1, "health/status": float("inf")}]}, r"has health/status inf"),
        ({"log_history": [5]}, "log_history is not a list of entries"),
    ],
)
def test_a_log_with_values_of_another_type_is_refused_with_the_files_name(tmp_path, changed, message):
    write_run(tmp_path, [{"step": 1, "loss": 0.1}])
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=f"^{file} is torn or no log of a run .*{message}"):
        load_run(tmp_path)


@pytest.mark.parametrize("absent", ["global_step", "max_steps", "best_global_step", "best_model_checkpoint"])
def test_a_log_without_a_value_is_read(tmp_path, absent):
    write_run(tmp_path, [{"step": 1, "loss": 0.1, "note": "text"}])
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), absent: None}))
    assert load_run(tmp_path).series("loss") == [(1, 0.1)]


def test_a_directory_without_a_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training has logged there"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        load_run(tmp_path / "missing")


def test_a_line_that_is_no_event_is_named(tmp_path):
    write_run(tmp_path, [{"step": 1, "loss": 0.1}])
    (tmp_path / "health_events.jsonl").write_text('{"step": 1}\n{"step": 2, "status": "watch", "reasons": []}\n')
    with pytest.raises(ValueError, match="line 1: this line does not hold a health event"):
        load_run(tmp_path)
