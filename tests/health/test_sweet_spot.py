"""The stop: its rule, the best checkpoint, what a run ends with, and the same after a kill."""

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from tests.health.test_guard import fed
from tests.helpers import config, make_trainer, parameters_of, rows
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp.health.attach import attach_health
from trl_crisp.health.ending import describe_end, describe_lost, gentler
from trl_crisp.health.monitor import AgreementMonitor
from trl_crisp.health.signals import HealthSignals
from trl_crisp.health.sweet_spot import Measurement, SweetSpot, has_fallen, holds, offer_best
from trl_crisp.health.watchers import Health
from trl_crisp.run.interruption import resume_command
from trl_crisp.train import main, parse_args

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is",
    "ignore:teacher_sync_steps=",
    "ignore:.* of the base.s answers to the monitor prompts",
)

MARGIN = 0.03
# A change and the upper end of its interval: fine, below by noise, below for sure but within the margin, fallen
KINDS = {"fine": (0.01, 0.03), "noise": (-0.05, 0.01), "small": (-0.02, -0.005), "fallen": (-0.06, -0.02)}


def measured(step: int, kind: str, tokens: float = 50.0) -> Measurement:
    return Measurement(step, tokens, 1 - tokens / 100, *KINDS[kind])


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=3)))
def test_a_run_has_fallen_after_two_sure_drops_in_a_row(kinds):
    found = [has_fallen([measured(i, kind) for i, kind in enumerate(kinds[: n + 1])], MARGIN) for n in range(3)]
    expected = [n > 0 and kinds[n] == "fallen" and kinds[n - 1] == "fallen" for n in range(3)]
    assert found == expected


def test_a_drop_of_exactly_the_margin_holds_and_an_unknown_change_does_not():
    assert holds(Measurement(1, 50, 0.5, 0.87 - 0.9, -0.01), MARGIN)
    assert not holds(Measurement(1, 50, 0.5, -0.0301, -0.01), MARGIN)
    assert not holds(Measurement(1, 50, 0.5), MARGIN)
    assert not has_fallen([Measurement(1, 50, 0.5), Measurement(2, 50, 0.5)], MARGIN)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_checkpoint_is_the_shortest_that_holds(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(80, 106, (8,), generator=generator).tolist()
    kinds = [list(KINDS)[k] for k in torch.randint(0, 4, (8,), generator=generator).tolist()]
    args, state = config(tmp_path), TrainerState()
    for n in range(8):
        control = TrainerControl()
        offer_best(args, state, control, measured(n + 1, kinds[n], tokens[n]), MARGIN)
        fitting = [i for i in range(n + 1) if tokens[i] < 100 and kinds[i] in ("fine", "small")]
        best = min(fitting, key=lambda i: (tokens[i], i)) + 1 if fitting else None
        assert state.best_global_step == best
        assert control.should_save == (best == n + 1)
        assert state.best_model_checkpoint == (None if best is None else str(tmp_path / f"checkpoint-{best}"))


class Given:
    """Measurements that are given: (tokens, kind) by step; the base has 100 tokens."""

    margin, subject, every_steps, saves_held = MARGIN, "agreement", 1, True
    # The monitor measures one step before each multiple of every_steps, a benchmark after it
    before = 0

    def __init__(self, given):
        self.given = given

    def measurements(self, state):
        return [measured(s, kind, tokens) for s, (tokens, kind) in self.given.items() if s <= state.global_step]

    def why_not(self, state):
        return None

    def is_due(self, step):
        return (step + self.before) % self.every_steps == 0


class Source(Given, TrainerCallback):
    """The same as a benchmark's callback."""

    name = "given"


# The best is step 2; step 4 is the second sure drop in a row
GIVEN = {1: (90, "fine"), 2: (70, "small"), 3: (60, "fallen"), 4: (50, "fallen"), 5: (40, "fine"), 6: (40, "fine")}


def run(output_dir, given=GIVEN, resume=None, **fields):
    fields = {"max_steps": 6, "learning_rate": 1e-2, "stop_at_sweet_spot": True, **fields}
    trainer = make_trainer(output_dir, dataset=rows(24), **fields)
    spot = SweetSpot(trainer, Given(given))
    trainer.add_callback(spot)
    trainer.is_over = lambda state: spot.reason_to_stop(state) is not None
    trainer.is_watched = True
    trainer.train(resume_from_checkpoint=resume)
    return trainer, spot


def weights(trainer):
    return {name: value.clone() for name, value in parameters_of(trainer.model).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_result_of_a_stopped_run_is_its_best_checkpoint(tmp_path, capsys):
    trainer, spot = run(tmp_path, save_total_limit=1)
    assert trainer.state.global_step == 4
    assert "Training ends after step 4: agreement is -6.0 points from the base's" in capsys.readouterr().out
    assert spot.loaded_step == 2
    assert not spot.is_lost(trainer.state)
    trainer.save_model(str(tmp_path / "result"))
    assert same(
        load_file(tmp_path / "result/model.safetensors"), load_file(tmp_path / "checkpoint-2/model.safetensors")
    )
    # Despite the limit of 1, which stays the user's, both are there: the best, and the last, which can be resumed
    assert trainer.args.save_total_limit == 1
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not same(weights(trainer), load_file(tmp_path / "checkpoint-4/model.safetensors"))


def test_a_killed_run_ends_with_the_same_result(tmp_path):
    whole, _ = run(tmp_path)
    for checkpoint in ("checkpoint-1", "checkpoint-2", "checkpoint-4"):
        resumed, spot = run(tmp_path, resume=str(tmp_path / checkpoint))
        assert (resumed.state.global_step, spot.loaded_step) == (4, 2)
        assert same(weights(whole), weights(resumed))


def test_without_the_field_a_run_keeps_its_last_step_and_names_the_best(tmp_path):
    trainer, spot = run(tmp_path, stop_at_sweet_spot=False)
    assert trainer.state.global_step == 6
    assert spot.loaded_step is None
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (5, 40)
    plain = make_trainer(tmp_path / "plain", dataset=rows(24), max_steps=6, learning_rate=1e-2)
    plain.train()
    assert same(weights(plain), weights(trainer))


def test_a_run_that_reaches_its_last_step_ends_with_the_best_too(tmp_path):
    trainer, spot = run(tmp_path, given={1: (60, "fine"), 3: (70, "fine")}, max_steps=3)
    assert (trainer.state.global_step, spot.loaded_step) == (3, 1)
    assert same(weights(trainer), load_file(tmp_path / "checkpoint-1/model.safetensors"))


def test_a_run_with_an_adapter_ends_with_its_best_adapter(tmp_path):
    trainer = make_trainer(
        tmp_path,
        dataset=rows(24),
        max_steps=6,
        learning_rate=1e-1,
        stop_at_sweet_spot=True,
        peft_config=LoraConfig(r=4),
    )
    spot = SweetSpot(trainer, Given(GIVEN))
    trainer.add_callback(spot)
    trainer.is_watched = True
    base = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()
    assert (trainer.state.global_step, spot.loaded_step) == (4, 2)
    trainer.save_model(str(tmp_path / "result"))
    saved = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("result", "checkpoint-2", "checkpoint-4")
    ]
    assert same(saved[0], saved[1])
    assert not same(saved[0], saved[2])
    now = {name: value for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    assert same(base, now)


@pytest.mark.parametrize(("target", "step"), [(0.3, 2), (0.299, 2), (0.31, 3), (0.99, 6)])
def test_a_target_ends_the_run(tmp_path, target, step):
    trainer, spot = run(tmp_path, stop_at_sweet_spot=False, target_reduction=target)
    assert trainer.state.global_step == step
    assert spot.loaded_step is None


def test_a_run_without_a_step_that_holds_is_lost(tmp_path):
    trainer, spot = run(tmp_path, given={1: (60, "fallen"), 2: (50, "fallen"), 3: (40, "fine")})
    assert trainer.state.global_step == 2
    assert spot.is_lost(trainer.state)
    # Nothing that was trained is gone
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


class Removes(TrainerCallback):
    """Removes the best checkpoint, or its weights, before the end."""

    def __init__(self, pattern):
        self.pattern = pattern

    def on_train_end(self, args, state, control, **kwargs):
        for path in Path(state.best_model_checkpoint).glob(self.pattern):
            path.unlink()


def health_of(spot, guard=None):
    return Health(HealthSignals(), guard, None, None, spot)


@pytest.mark.parametrize("pattern", ["*", "model.safetensors"])
@pytest.mark.parametrize("fallen", [True, False])
def test_a_best_checkpoint_that_somebody_removed_is_told(tmp_path, fallen, pattern):
    # After the last measurement the model of the last step is what is left
    given = (
        {2: (70, "small"), 3: (60, "fallen"), 4: (50, "fallen")} if fallen else {2: (70, "small"), 4: (110, "fine")}
    )
    trainer, spot = run(tmp_path, given, callbacks=[Removes(pattern)], max_steps=4)
    assert spot.loaded_step is None
    # What is said to be saved is what is saved
    assert trainer.model_step == 4
    lost = describe_lost(trainer, health_of(spot))
    if fallen:
        assert "not saved as the result" in lost
        assert "the best checkpoint, that of step 2, no longer exists" in lost
    else:
        assert lost is None
        assert (
            "The result is the model of step 4; the best measured is that of step 2: its checkpoint no longer exists."
            in describe_end(trainer, health_of(spot))
        )


def test_the_next_best_is_the_result_if_somebody_removed_the_best(tmp_path):
    trainer, spot = run(tmp_path, GIVEN, callbacks=[Removes("*")], max_steps=4)
    assert spot.loaded_step == 1
    assert same(weights(trainer), load_file(tmp_path / "checkpoint-1/model.safetensors"))
    assert f"The result is the best checkpoint, that of step 1: {tmp_path}/checkpoint-1." in describe_end(
        trainer, health_of(spot)
    )


def test_a_better_checkpoint_that_is_gone_is_told(tmp_path):
    given = {1: (60, "fine"), 3: (70, "fine"), 5: (80, "fine")}
    run(tmp_path, given, max_steps=2, save_strategy="steps", save_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    fields = {"resume": str(tmp_path / "checkpoint-2"), "stop_at_sweet_spot": False, "max_steps": 5}
    trainer, spot = run(tmp_path, given, **fields)
    assert (
        "The result is the model of step 5; the best measured is that of step 1: its checkpoint no longer exists; the best that exists is "
        f"that of step 3: {tmp_path}/checkpoint-3."
    ) in describe_end(trainer, health_of(spot))


class LogsGiven(Given, TrainerCallback):
    """As a monitor: its measurements are in the log."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.given:
            tokens, kind = self.given[state.global_step]
            state.log_history.append({"step": state.global_step, "tokens": tokens, "kind": kind})

    def measurements(self, state):
        return [measured(log["step"], log["kind"], log["tokens"]) for log in state.log_history if "kind" in log]


def test_a_checkpoint_of_a_branch_that_the_run_has_left_is_not_the_result(tmp_path):
    """The run goes back to step 1 and trains otherwise; what the first branch saved is still there."""
    first = {1: (90, "fine"), 2: (50, "fine"), 3: (60, "fallen"), 4: (60, "fallen")}
    second = {1: (90, "fine"), 2: (50, "small"), 3: (60, "fallen"), 4: (60, "fallen")}

    def train(given, resume=None, margin=MARGIN, **fields):
        trainer = make_trainer(
            tmp_path, dataset=rows(24), stop_at_sweet_spot=True, **{"max_steps": 6, "learning_rate": 1e-2, **fields}
        )
        source = LogsGiven(given)
        source.margin = margin
        spot = SweetSpot(trainer, source)
        for callback in (source, spot):
            trainer.add_callback(callback)
        trainer.is_watched = True
        trainer.train(resume_from_checkpoint=resume)
        return trainer, spot

    _, spot = train(first, save_strategy="steps", save_steps=1)
    assert spot.loaded_step == 2
    # On the second branch step 2 is below its margin, so nothing is saved over the first's
    fields = {"learning_rate": 1e-3, "allow_changed_resume": True}
    _, spot = train(second, str(tmp_path / "checkpoint-1"), margin=0.01, max_steps=3, **fields)
    assert spot.loaded_step == 1
    trainer, spot = train(second, str(tmp_path / "checkpoint-3"), **fields)
    assert spot.loaded_step == 1
    assert same(weights(trainer), load_file(tmp_path / "checkpoint-1/model.safetensors"))
    assert spot.last_held(trainer.args, trainer.state) == tmp_path / "checkpoint-1"


class FailsOnce(Given):
    """As a measurement that fails at step 3 and is made up for when the run resumes."""

    def __init__(self, given, missing):
        super().__init__(given)
        self.missing = missing

    def measurements(self, state):
        return [one for one in super().measurements(state) if one.step != self.missing]


@pytest.mark.parametrize(
    "fields", [{"stop_at_sweet_spot": True}, {"stop_at_sweet_spot": False, "target_reduction": 0.5}]
)
def test_a_stop_by_what_is_measured_at_a_resume_trains_no_further_step(tmp_path, fields):
    given = {1: (80, "fine"), 2: (60, "fallen"), 3: (50, "fallen"), 4: (80, "fine"), 5: (80, "fine")}
    trainer = make_trainer(tmp_path, dataset=rows(24), max_steps=6, learning_rate=1e-2, save_steps=1, **fields)
    trainer.args.save_strategy = "steps"
    failing = FailsOnce(given, 3)
    spot = SweetSpot(trainer, failing)
    trainer.add_callback(spot)
    trainer.is_over = lambda state: spot.reason_to_stop(state) is not None
    trainer.is_watched = True

    class MakesUp(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            failing.missing = None

    trainer.callback_handler.callbacks.insert(0, MakesUp())
    interrupted = Interrupts()
    interrupted.step = 3
    whole = make_trainer(tmp_path / "whole", dataset=rows(24), max_steps=3, learning_rate=1e-2)
    whole.train()
    # The first part: step 3 is not measured
    first, _ = run(
        tmp_path,
        {1: given[1], 2: given[2]},
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        callbacks=[interrupted],
        **fields,
    )
    assert first.state.global_step == 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 3
    if fields["stop_at_sweet_spot"]:
        assert spot.loaded_step == 1
    else:
        assert same(weights(trainer), weights(whole))


@pytest.mark.parametrize("strategy", ["no", "steps"])
@pytest.mark.parametrize("moved", ["elsewhere", "written differently"])
def test_the_best_checkpoint_is_found_where_output_dir_is_now(tmp_path, moved, strategy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"save_strategy": strategy, "save_steps": 1, "save_total_limit": 1}
    run("run", **fields)
    if moved == "elsewhere":
        shutil.move("run", "other")
    there = tmp_path / ("other" if moved == "elsewhere" else "run")
    # The last step's checkpoint, which trains no more, and the best's own, from which it goes on
    for name in ("checkpoint-4", "checkpoint-2"):
        trainer, spot = run(there, resume=str(there / name), **fields)
        assert spot.loaded_step == 2
        assert describe_lost(trainer, health_of(spot)) is None
        assert trainer.state.best_model_checkpoint == str(there / "checkpoint-2")
        assert same(weights(trainer), load_file(there / "checkpoint-2/model.safetensors"))


def test_a_best_checkpoint_of_another_run_is_not_taken(tmp_path):
    given = {1: (60, "fine"), 4: (40, "fallen"), 5: (40, "fallen")}
    run(tmp_path / "one", given, max_steps=3, save_strategy="steps", save_steps=1)
    # Another run of that directory's name has replaced step 1
    run(tmp_path / "two", given, max_steps=2)
    shutil.rmtree(tmp_path / "one" / "checkpoint-1")
    shutil.move(tmp_path / "two" / "checkpoint-1", tmp_path / "one" / "checkpoint-1")
    shutil.move(tmp_path / "one", tmp_path / "three")
    resume = str(tmp_path / "three" / "checkpoint-3")
    trainer, spot = run(tmp_path / "three", given, resume=resume)
    assert trainer.state.global_step == 5
    assert spot.loaded_step is None
    assert "that of step 1, no longer exists" in describe_lost(trainer, health_of(spot))


def test_a_best_checkpoint_of_another_run_at_the_recorded_path_is_not_taken(tmp_path):
    given = {1: (60, "fine"), 4: (40, "fallen"), 5: (40, "fallen")}
    run(tmp_path / "one", given, max_steps=3, save_strategy="steps", save_steps=1)
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    shutil.rmtree(tmp_path / "three" / "checkpoint-1")
    # The path in the state is that of the first directory, in which another run is now
    shutil.rmtree(tmp_path / "one")
    run(tmp_path / "one", given, max_steps=2)
    trainer, spot = run(tmp_path / "three", given, resume=str(tmp_path / "three" / "checkpoint-3"))
    assert trainer.state.global_step == 5
    assert spot.loaded_step is None


def test_a_target_that_a_fallen_run_reaches_is_told(tmp_path):
    given = {1: (60, "fallen"), 2: (40, "fallen")}
    trainer, spot = run(tmp_path, given, stop_at_sweet_spot=False, target_reduction=0.6)
    assert trainer.state.global_step == 2
    assert (
        "step 2 was the last. There agreement is -6.0 points from the base's, which is more than noise: do not use it unmeasured."
        in describe_end(trainer, health_of(spot))
    )


def test_another_step_takes_the_place_of_a_best_checkpoint_that_is_gone(tmp_path):
    given = {1: (60, "fine"), 3: (70, "fine"), 4: (40, "fallen"), 5: (40, "fallen")}
    run(tmp_path, given, max_steps=2, save_strategy="steps", save_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    trainer, spot = run(tmp_path, given, resume=str(tmp_path / "checkpoint-2"))
    assert (trainer.state.global_step, spot.loaded_step) == (5, 3)


def test_the_last_step_is_kept_if_another_is_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(Given, "saves_held", False)
    _, spot = run(tmp_path, {1: (60, "fine"), 3: (70, "fine")}, max_steps=3)
    assert spot.loaded_step == 1
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()


def test_a_resumed_run_chooses_the_best_by_its_own_margin(tmp_path, monkeypatch):
    # Step 1 is 2 points below, which the margin of 3 allows
    given = {1: (60, "small"), 2: (70, "fine"), 4: (50, "small")}
    first, _ = run(tmp_path, given, max_steps=3, save_strategy="steps", save_steps=1)
    assert first.state.best_global_step == 1
    monkeypatch.setattr(Given, "margin", 0.01)
    trainer, spot = run(tmp_path, given, resume=str(tmp_path / "checkpoint-3"), max_steps=5)
    assert (trainer.state.best_global_step, trainer.state.best_metric, spot.loaded_step) == (2, 70, 2)


def test_a_best_checkpoint_without_weights_is_not_named_again(tmp_path):
    """transformers names it at each save if its directory exists."""
    given = {1: (60, "fine"), 3: (70, "fine"), 4: (40, "fallen"), 5: (40, "fallen")}
    run(tmp_path, given, max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    fields = {"resume": str(tmp_path / "checkpoint-2"), "save_strategy": "steps", "save_steps": 1}
    trainer, spot = run(tmp_path, given, **fields)
    assert (trainer.state.global_step, spot.loaded_step) == (5, 3)


class AtEnd(TrainerCallback):
    """Keeps the weights at the end of a training, as a tracker that uploads the model reads them."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.may_push = args.push_to_hub
        self.weights = {name: value.clone() for name, value in parameters_of(model).items()}


def test_trackers_that_read_the_model_at_the_end_get_the_result(tmp_path, monkeypatch):
    tracker = AtEnd()
    trainer = make_trainer(
        tmp_path, dataset=rows(24), max_steps=6, learning_rate=1e-2, stop_at_sweet_spot=True, callbacks=[tracker]
    )
    monkeypatch.setattr("trl_crisp.health.attach.BenchmarkCallback", Source)
    trainer.add_callback(Source(GIVEN))
    health = attach_health(trainer)
    trainer.train()
    assert health.sweet_spot.loaded_step == 2
    assert same(tracker.weights, load_file(tmp_path / "checkpoint-2/model.safetensors"))


@pytest.mark.parametrize("lost", [True, False])
def test_trackers_that_save_the_model_at_the_end_push_nothing(tmp_path, monkeypatch, lost):
    """wandb saves it by a trainer of its own, with the config of the run."""
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    tracker = AtEnd()
    fields = {"push_to_hub": True, "hub_strategy": "end", "stop_at_sweet_spot": True, "max_steps": 3}
    trainer = make_trainer(tmp_path, dataset=rows(24), callbacks=[tracker], **fields)
    monkeypatch.setattr("trl_crisp.health.attach.BenchmarkCallback", Source)
    trainer.add_callback(Source({3: (50, "fallen" if lost else "fine")}))
    attach_health(trainer)
    trainer.train()
    assert not tracker.may_push
    # Then the run's own push follows, if it has a result
    assert trainer.args.push_to_hub == (not lost)


def test_a_run_that_the_stop_calls_lost_names_the_last_that_held(tmp_path):
    # Step 1 holds and is not shorter than the base
    given = {1: (110, "fine"), 2: (50, "fallen"), 3: (40, "fallen")}
    trainer, spot = run(tmp_path, given)
    assert trainer.state.global_step == 3
    lost = describe_lost(trainer, health_of(spot))
    assert "no measured step is shorter than the base and holds." in lost
    assert f"{tmp_path}/checkpoint-1 is the last checkpoint that held when it was measured: use it, or go on" in lost
    assert f"--resume_from_checkpoint {tmp_path}/checkpoint-1 --teacher_sync_steps 100" in lost


class Interrupts(TrainerCallback):
    """Ends the training with a checkpoint after step 5, as a signal does."""

    step = 5

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


@pytest.mark.parametrize(("kind", "is_lost"), [("fallen", True), ("noise", False)])
def test_a_run_that_has_fallen_at_its_last_step_is_lost(tmp_path, kind, is_lost):
    """Also by one measurement: the rule of two is against an end by noise, and this run is over."""
    trainer, spot = run(tmp_path, {3: (50, kind)}, max_steps=3)
    lost = describe_lost(trainer, health_of(spot))
    if is_lost:
        assert "step 3 was not saved as the result, and it was not pushed: no measured step is shorter" in lost
        # Nothing that was trained is gone
        assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    else:
        assert lost is None


@pytest.mark.parametrize(
    ("before", "fields", "names"),
    [
        # A benchmark measures after step 2, and the last step ends the run anyway
        (0, {"max_steps": 4}, "stop_at_sweet_spot"),
        (0, {"max_steps": 5}, None),
        # The monitor measures after steps 1 and 3
        (1, {"max_steps": 3}, "stop_at_sweet_spot"),
        (1, {"max_steps": 4}, None),
        (0, {"max_steps": 2, "target_reduction": 0.5}, "stop_at_sweet_spot and target_reduction"),
        (0, {"max_steps": 2, "target_reduction": 0.5, "stop_at_sweet_spot": False}, "target_reduction"),
        (0, {"max_steps": 3, "target_reduction": 0.5, "stop_at_sweet_spot": False}, None),
        (0, {"max_steps": 1, "stop_at_sweet_spot": False}, None),
    ],
)
def test_a_run_that_is_too_short_for_a_stop_is_warned_of(tmp_path, monkeypatch, recwarn, before, fields, names):
    monkeypatch.setattr(Given, "every_steps", 2)
    monkeypatch.setattr(Given, "before", before)
    run(tmp_path, {}, **fields)
    told = [str(one.message) for one in recwarn if "cannot end this run before its last step" in str(one.message)]
    assert [one.split(" cannot")[0] for one in told] == ([] if names is None else [names])


def test_an_interrupted_run_is_not_lost(tmp_path):
    # Without the field the run goes on after the second sure drop, and it is turned on at a resume
    given = {1: (60, "fine"), 2: (50, "fallen"), 3: (40, "fallen")}
    run(tmp_path, given, stop_at_sweet_spot=False, max_steps=4, save_strategy="steps", save_steps=4)
    fields = {"resume": str(tmp_path / "checkpoint-4"), "max_steps": 6}
    trainer, spot = run(tmp_path, given, callbacks=[Interrupts()], **fields)
    assert (trainer.state.global_step, spot.loaded_step) == (5, None)
    assert describe_lost(trainer, health_of(spot)) is None
    trainer, spot = run(tmp_path, given, resume=True, max_steps=6)
    assert (trainer.state.global_step, spot.loaded_step) == (6, 1)


def test_a_best_checkpoint_is_the_result_also_if_the_guard_stops_at_the_same_step(tmp_path):
    trainer, spot = run(tmp_path / "run")
    guard, *_ = fed(tmp_path, [0.04] * 5 + [1.0] * 20)
    assert (spot.loaded_step, guard.stopped_at_step) == (2, 15)
    assert describe_lost(trainer, health_of(spot, guard)) is None
    line = describe_end(trainer, health_of(spot, guard))
    assert f"The result is the best checkpoint, that of step 2: {tmp_path}/run/checkpoint-2. By its signals" in line
    assert "the run looked lost after step 15: the student's entropy is 2.5 times" in line


def test_a_checkpoint_after_a_sure_drop_is_not_pushed(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append(self.state.global_step)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(f"{folder}/{name}", tmp_path)

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    given = {2: (70, "small"), 3: (60, "fallen"), 5: (60, "fine"), 6: (60, "fallen"), 7: (60, "fallen")}
    fields = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    trainer = make_trainer(tmp_path, dataset=rows(24), stop_at_sweet_spot=True, **fields)
    monkeypatch.setattr("trl_crisp.health.attach.BenchmarkCallback", Source)
    trainer.add_callback(Source(given))
    health = attach_health(trainer)
    trainer.train()
    assert trainer.state.global_step == 7
    # Those after step 3 are not, until step 5 was measured
    assert pushed == [1, 2, 5]
    # The card in output_dir is still that of the weights beside it
    assert json.loads((tmp_path / "crisp_training.json").read_text())["step"] == 5
    assert health.sweet_spot.loaded_step == 5
    # The best checkpoint is pushed at the end
    assert trainer.args.push_to_hub


HELD = {1: (60, "fine"), 2: (70, "fine"), 3: (40, "fallen"), 4: (40, "fallen")}


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_last_that_held_is_saved_and_kept(tmp_path, is_resumed):
    """Step 2, though step 1 is the best, and a limit removes others."""
    fields = {"stop_at_sweet_spot": False, "max_steps": 5, "save_total_limit": 1}
    trainer, spot = run(tmp_path, HELD, **{**fields, "max_steps": 2} if is_resumed else fields)
    if is_resumed:
        trainer, spot = run(tmp_path, HELD, resume=True, **fields, save_strategy="steps", save_steps=1)
    assert spot.last_held(trainer.args, trainer.state) == tmp_path / "checkpoint-2"
    guard, *_ = fed(tmp_path / "guard", [0.04] * 5 + [1.0] * 20)
    lost = describe_lost(trainer, health_of(spot, guard))
    assert f"{tmp_path}/checkpoint-2 is the last checkpoint that held when it was measured: use it, or go on" in lost
    assert f"--resume_from_checkpoint {tmp_path}/checkpoint-2" in lost


def test_a_benchmark_saves_no_more_than_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(Given, "saves_held", False)
    run(tmp_path, HELD, stop_at_sweet_spot=False, max_steps=5, save_strategy="no")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}


def test_with_a_benchmark_and_the_monitor_each_step_that_holds_is_saved(tmp_path):
    """The benchmark decides which hold, and the monitor has them saved."""
    trainer = make_trainer(tmp_path, dataset=rows(24), max_steps=5, learning_rate=1e-2, save_strategy="no")
    benchmark, monitor = Given({1: (60, "fine"), 2: (70, "fine"), 3: (40, "fallen")}), Given({4: (50, "fine")})
    benchmark.saves_held = False
    spot = SweetSpot(trainer, benchmark, monitor)
    trainer.add_callback(spot)
    trainer.is_watched = True
    trainer.train()
    assert spot.last_held(trainer.args, trainer.state) == tmp_path / "checkpoint-2"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_checkpoint_of_another_run_is_not_the_last_that_held(tmp_path):
    run(tmp_path / "other", {}, max_steps=2, save_strategy="steps", save_steps=1)
    trainer, spot = run(tmp_path / "run", HELD)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    shutil.move(tmp_path / "other" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert spot.last_held(trainer.args, trainer.state) == tmp_path / "run" / "checkpoint-1"


def test_no_command_resumes_from_a_checkpoint_without_an_optimizer(tmp_path):
    trainer, spot = run(tmp_path, HELD, stop_at_sweet_spot=False, max_steps=4, save_only_model=True)
    guard, *_ = fed(tmp_path / "guard", [0.04] * 5 + [1.0] * 20)
    lost = describe_lost(trainer, health_of(spot, guard))
    assert f"{tmp_path}/checkpoint-2 is the last checkpoint that held when it was measured: use it.\n" in lost
    assert "--resume_from_checkpoint" not in lost


def test_going_on_from_the_last_that_held_leaves_the_given_up_steps_behind(tmp_path, capsys):
    trainer, spot = run(tmp_path, save_strategy="steps", save_steps=1)
    assert spot.last_held(trainer.args, trainer.state) == tmp_path / "checkpoint-2"
    changes = gentler(trainer.args)
    assert changes == {"teacher_sync_steps": 100, "allow_changed_resume": "true"}
    command = resume_command(str(tmp_path / "checkpoint-2"), **changes)
    assert command.endswith(
        f"--resume_from_checkpoint {tmp_path}/checkpoint-2 --teacher_sync_steps 100 --allow_changed_resume true"
    )
    healthy = dict.fromkeys(range(1, 7), (70, "fine"))
    fields = {"teacher_sync_steps": 100, "allow_changed_resume": True, "save_strategy": "steps", "save_steps": 1}
    again, _ = run(tmp_path, given=healthy, resume=str(tmp_path / "checkpoint-2"), max_steps=3, **fields)
    assert again.state.global_step == 3
    capsys.readouterr()
    # checkpoint-4 is a later step of what was given up
    last, _ = run(tmp_path, given=healthy, resume=True, max_steps=3, **fields)
    assert last.state.global_step == 3
    said = capsys.readouterr().out
    assert f"{tmp_path}/checkpoint-4 is skipped: after saving it, this run went back to an earlier step" in said
    assert f"resuming from {tmp_path}/checkpoint-3" in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"teacher_sync_steps": 4, "monitor_prompts": 8},
            {"teacher_sync_steps": 8, "monitor_steps": 4, "allow_changed_resume": "true"},
        ),
        (
            {"teacher_model_kind": "ema", "teacher_update_rate": 0.1},
            {"teacher_update_rate": 0.05, "allow_changed_resume": "true"},
        ),
        ({"teacher_model_kind": "base"}, None),
    ],
)
def test_a_gentler_setting_is_one_that_a_resume_accepts(tmp_path, fields, expected):
    assert gentler(config(tmp_path, **fields)) == expected


def test_stopping_needs_something_that_is_measured(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(24), stop_at_sweet_spot=True, target_reduction=0.5)
    with pytest.raises(ValueError, match="stop_at_sweet_spot and target_reduction: nothing is measured"):
        attach_health(trainer)
    with pytest.raises(ValueError, match=r"stop_at_sweet_spot=True, target_reduction=0\.5: nothing measures"):
        trainer.train()


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, 50, math.nan])
def test_a_target_is_a_share(tmp_path, target):
    with pytest.raises(ValueError, match="a number between 0 and 1"):
        config(tmp_path, target_reduction=target)


def test_health_is_attached_once_and_owns_the_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    attach_health(trainer)
    with pytest.raises(ValueError, match="watched already"):
        attach_health(trainer)
    other = make_trainer(tmp_path, dataset=rows(24), monitor_prompts=8, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="monitor_prompts finds the best checkpoint by a rule of its own"):
        attach_health(other, str)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    third = make_trainer(tmp_path, dataset=rows(24), eval_dataset=rows(4), monitor_prompts=8, **plateau)
    with pytest.raises(ValueError, match="lr_scheduler_type='reduce_lr_on_plateau' makes transformers find one"):
        attach_health(third, str)


# The training script, with a model that has learned to answer


def answering_model(directory, answers: dict[str, str]):
    """Save a tiny model that was trained to give each prompt its answer, and return its directory."""
    torch.manual_seed(0)
    tokenizer, model = tiny_tokenizer(), tiny_model(scale=1.0)
    sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers.values()]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in answers
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        for prompt, side in zip(prompts[:3], sides[:3], strict=True):
            ids = torch.tensor([[*prompt, *side, tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_tiny(directory)
    model.eval().save_pretrained(directory)
    return directory


QUESTIONS = {f"What is {'9' * (1 + i % 5)} + {i}?": "So. Answer: 12" for i in range(24)}


def script(tmp_path, *flags):
    lines = [json.dumps({"prompt": [{"role": "user", "content": q}], "answer": "12"}) for q in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:16]) + "\n")
    (tmp_path / "monitor.jsonl").write_text("\n".join(lines[16:]) + "\n")
    argv = [
        *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "6", "--max_completion_length", "24"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--report_to", "none"),
        *("--use_cpu", "--bf16", "false", "--monitor_samples", "2", "--monitor_steps", "1", "--temperature", "0.2"),
        *("--gradient_checkpointing", "false", "--save_strategy", "no", "--logging_steps", "1", *flags),
    ]
    try:
        main(*parse_args(argv))
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_script_measures_a_file_of_prompts_and_stops_a_run_that_loses_its_answers(tmp_path, capsys):
    answering_model(tmp_path / "model", QUESTIONS)
    file = ("--monitor_file", str(tmp_path / "monitor.jsonl"))
    # A rate at which one step destroys the model
    assert script(tmp_path, *file, "--learning_rate", "0.5", "--stop_at_sweet_spot") == 3
    out = capsys.readouterr().out
    assert (
        "is measured: 8 prompts, of monitor_file, 2 answers of the base to each, 2 at each measurement, and their accuracy"
        in out
    )
    assert "Training ends after step 2: accuracy on the monitor prompts is -100.0 points from the base's" in out
    assert "agreement 100.0% -> 0.0% (-100.0 points [-100.0, -100.0])" in out
    assert "accuracy 100.0% -> 0.0% (-100.0 points [-100.0, -100.0])" in out
    assert "The model of step 2 was not saved as the result, and it was not pushed: no measured step" in out
    assert out.count("it was not pushed") == out.count("agreement 100.0% -> 0.0%") == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()


def test_a_signal_during_a_measurement_ends_the_run_after_it(tmp_path, capsys, monkeypatch):
    save_tiny(tmp_path / "model")
    measure = AgreementMonitor._measure

    def press(self, state):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        measure(self, state)

    monkeypatch.setattr(AgreementMonitor, "_measure", press)
    file = ("--monitor_file", str(tmp_path / "monitor.jsonl"))
    assert script(tmp_path, *file, "--target_reduction", "0.9") == 130
    out = capsys.readouterr().out
    assert "The run ended after step 2, before its last step, 6." in out
    assert "Stopped after step 2; its checkpoint is in" in out


def test_a_file_whose_prompts_are_trained_on_is_refused(tmp_path):
    answering_model(tmp_path / "model", QUESTIONS)
    with pytest.raises(ValueError, match="16 of its prompts are training prompts, such as the file's prompt 0"):
        script(tmp_path, "--monitor_file", str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("fields", "count", "words"),
    [
        ({}, 7, "has 7 different prompts, and at least 8 are needed"),
        ({"monitor_prompts": 9}, 8, "has 8 different prompts, and monitor_prompts=9"),
    ],
)
def test_a_small_file_is_refused(tmp_path, fields, count, words):
    trainer = make_trainer(tmp_path, dataset=rows(8), monitor_file="own.jsonl", **fields)
    with pytest.raises(ValueError, match=words):
        attach_health(trainer, str, monitor_dataset=rows(count, "Now: "))


def test_a_file_that_does_not_exist_is_named(tmp_path):
    trainer = make_trainer(tmp_path, monitor_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"monitor_file='.*none\.jsonl': there is no such file"):
        attach_health(trainer, str)


@pytest.mark.parametrize(
    ("cells", "golds"),
    [
        ({"answer": ["6 + 6\n#### 12", "7", "x"]}, ["12", "7", "x"]),
        ({"solution": ["So \\boxed{\\frac{1}{2}}.", "\\boxed{3} or \\boxed{4}", "5"]}, ["\\frac{1}{2}", "4", "5"]),
        ({"answer": ["1", "2", "3"], "solution": ["a", "b", "c"]}, ["1", "2", "3"]),
        ({"answer": [1, 2.0, 0.5]}, ["1", "2", "0.5"]),
        ({"answer": ["1", None, "3"]}, ["1", None, "3"]),
        ({"answer": ["1", "", "3"]}, ["1", None, "3"]),
        ({"other": ["1", "2", "3"]}, [None, None, None]),
    ],
)
def test_right_answers_are_found_in_the_rows(cells, golds):
    from trl_crisp.evaluation.row_answers import find_golds

    assert find_golds(list(Dataset.from_dict({"prompt": ["a", "b", "c"], **cells})))[1] == golds


@pytest.mark.parametrize(
    ("kind", "golds", "unreadable"),
    [
        ("math", ["12", "\\frac{1}{2}", "the \\frac{"], 2),
        ("math", ["12", ["1", "2"]], 1),
        ("math", ["12", "7"], None),
        ("choice", ["A", "(B)", "12"], 2),
        ("text", ["Paris", ["Rome", "Roma"]], None),
        ("text", ["Paris", "..."], 1),
    ],
)
def test_answers_that_cannot_be_graded_are_found(kind, golds, unreadable):
    from trl_crisp.health.monitor_prompts import find_unreadable

    assert find_unreadable(golds, kind) == unreadable


def test_answers_that_cannot_be_graded_leave_agreement_alone(tmp_path, capsys):
    data = rows(24).add_column("answer", ["an essay \\frac{"] * 24)
    trainer = make_trainer(tmp_path, dataset=data, monitor_prompts=8)
    health = attach_health(trainer)
    out = capsys.readouterr().out
    assert (
        "cannot be graded as 'math', so accuracy is not measured beside agreement: that of prompt 0 is 'an essay"
        in out
    )
    assert health.monitor.subject == "agreement with the base's majority answers"


def first_characters(text: str) -> str | None:
    return text[:2] or None


def test_a_target_is_measured_where_answers_cannot_be_compared(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, dataset=rows(24), monitor_prompts=8, monitor_steps=1, monitor_samples=2, target_reduction=0.9
    )
    health = attach_health(trainer, lambda text: None)
    trainer.train()
    out = capsys.readouterr().out
    assert "only 0 of 8 monitor prompts, so agreement is not measured." in out
    logs = [log for log in trainer.state.log_history if "eval_agreement_mean_tokens" in log]
    assert [log["step"] for log in logs] == [0, 1, 2, 3]
    assert all("eval_agreement" not in log for log in logs)
    assert all(
        log["eval_agreement_reduction"]
        == 1 - log["eval_agreement_mean_tokens"] / logs[0]["eval_agreement_mean_tokens"]
        for log in logs[1:]
    )
    line = describe_end(trainer, health)
    assert "tokens (" in line
    assert line.endswith(
        "Nothing says whether the answers hold (agreement is not measured), so no step can be recommended; step 3 was the last."
    )
    assert describe_lost(trainer, health) is None


def test_the_last_line_of_a_run_that_measured_nothing_says_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=2)
    health = attach_health(trainer)
    trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "loss" in log]
    mean = sum(lengths) / 2
    line = (
        f"rollouts {mean:,.0f} -> {mean:,.0f} tokens (+0%); accuracy not measured; the teacher was refreshed 0 times. "
        "The result is the model of step 2."
    )
    assert describe_end(trainer, health) == line
    # In Python too
    assert capsys.readouterr().out.count(line) == 1
