"""How a run ends: a line on what it did and which checkpoint to use, and whether it has a model to save as its result."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from trl_crisp.config import CRISPConfig
from trl_crisp.health.sweet_spot import SweetSpot
from trl_crisp.health.watchers import Health
from trl_crisp.run.checkpoints import find_fault
from trl_crisp.run.interruption import resume_command


class EndOfRun(TrainerCallback):
    """
    Prints at the end of a training what it did, which checkpoint to use and, if the run is lost, why it has no result.

    A lost run's `push_to_hub` is `False` until the next training, so that `save_model` does not push.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]; use [`~trl_crisp.health.attach.attach_health`].
        health: What watches it. Its callbacks must come before this one.
    """

    def __init__(self, trainer: Any, health: Health) -> None:
        self.trainer, self.health = trainer, health
        self._push_before: bool | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._allow_pushes(args)

    def forbid_pushes(self, args: TrainingArguments) -> None:
        """Let nothing be pushed until it is known whether the run has a result, or until the next training."""
        if self._push_before is None:
            self._push_before, args.push_to_hub = args.push_to_hub, False

    def _allow_pushes(self, args: TrainingArguments) -> None:
        if self._push_before is not None:
            args.push_to_hub, self._push_before = self._push_before, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._allow_pushes(args)
        self.trainer.accelerator.print(describe_end(self.trainer, self.health))
        if (why := describe_lost(self.trainer, self.health)) is not None:
            self.trainer.accelerator.print(why)
            self.forbid_pushes(args)


class BeforeTrackers(TrainerCallback):
    """
    Makes the model the run's result before the trackers end, because they may upload it (`WANDB_LOG_MODEL`), and lets them push nothing.

    wandb's callback saves the model by a trainer of its own, which would push all of `output_dir`, of a lost run too.

    Args:
        end: The run's end, whose callback comes after the trackers.
    """

    def __init__(self, end: EndOfRun) -> None:
        self.end = end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end.forbid_pushes(args)
        if self.end.health.sweet_spot is not None:
            self.end.health.sweet_spot.on_train_end(args, state, control, **kwargs)


def describe_end(trainer: Any, health: Health) -> str:
    """Return a run's start and end in one line."""
    return f"{'; '.join([*_measured(trainer, health), _refreshes(trainer.teacher)])}. {_advice(trainer, health)}"


def _measured(trainer: Any, health: Health) -> list[str]:
    state, step = trainer.state, _result_step(trainer, health)
    parts = []
    names = [(f"eval_{health.benchmark.name}", health.benchmark.name)] if health.benchmark is not None else []
    names += [("eval_agreement", "the monitor prompts")] if health.monitor is not None else []
    for prefix, where in names:
        logs = {log["step"]: log for log in state.log_history if f"{prefix}_mean_tokens" in log}
        measured_steps = [number for number in logs if 0 < number <= step]
        if 0 not in logs or not measured_steps:
            continue
        base, end = logs[0], logs[max(measured_steps)]
        tokens = [one[f"{prefix}_mean_tokens"] for one in (base, end)]
        parts.append(
            f"{tokens[0]:,.0f} -> {tokens[1]:,.0f} tokens ({_percent(tokens)}) on {where}, step {max(measured_steps)}"
        )
        for key, name in ((prefix, "agreement"), (f"{prefix}_accuracy", "accuracy")):
            if key in base and key in end:
                change = end[f"{key}_change"] if f"{key}_change" in end else end[key] - base[key]
                interval = ""
                if f"{key}_change_low" in end:
                    interval = f" [{100 * end[f'{key}_change_low']:+.1f}, {100 * end[f'{key}_change_high']:+.1f}]"
                parts.append(f"{name} {base[key]:.1%} -> {end[key]:.1%} ({100 * change:+.1f} points{interval})")
    if not parts:
        first, now = health.signals.running.first, health.signals.running.now
        key = "completions/mean_length"
        if key in first and key in now:
            parts.append(f"rollouts {first[key]:,.0f} -> {now[key]:,.0f} tokens ({_percent([first[key], now[key]])})")
        parts.append("accuracy not measured")
    return parts


def _percent(tokens: list[float]) -> str:
    return f"{100 * (tokens[1] / tokens[0] - 1):+.0f}%" if tokens[0] else "from none"


def _refreshes(teacher: Any) -> str:
    postponed = f", {teacher.postponed} postponed" if teacher.refresh_gate is not None else ""
    return f"the teacher was refreshed {teacher.refreshes} times{postponed}"


def _result_step(trainer: Any, health: Health) -> int:
    sweet_spot = health.sweet_spot
    loaded = sweet_spot.loaded_step if sweet_spot is not None else None
    return trainer.state.global_step if loaded is None else loaded


def _has_ended(trainer: Any, health: Health) -> bool:
    state, guard, sweet_spot = trainer.state, health.guard, health.sweet_spot
    is_stopped = guard is not None and guard.stopped_at_step is not None
    return (
        is_stopped or state.global_step >= state.max_steps or (sweet_spot is not None and sweet_spot.has_ended(state))
    )


def _advice(trainer: Any, health: Health) -> str:
    state, guard, sweet_spot = trainer.state, health.guard, health.sweet_spot
    if not _has_ended(trainer, health):
        return f"The run ended after step {state.global_step}, before its last step, {state.max_steps}."
    if sweet_spot is None:
        return f"The result is the model of step {state.global_step}."
    if sweet_spot.loaded_step is not None:
        result = (
            f"The result is the best checkpoint, that of step {sweet_spot.loaded_step}: {state.best_model_checkpoint}."
        )
        if guard is None or guard.stopped_at_step is None:
            return result
        return f"{result} By its signals the run looked lost after step {guard.stopped_at_step}: {'; '.join(guard.reasons)}."
    source = sweet_spot.source(state)
    if all(math.isnan(one.change) for one in source.measurements(state)):
        why = source.why_not(state) or "nothing was measured after step 0"
        return f"Nothing says whether the answers hold ({why}), so no step can be recommended; step {state.global_step} was the last."
    dropped = ""
    if sweet_spot.has_dropped(state):
        change = source.measurements(state)[-1].change
        dropped = f" There {source.subject} is {100 * change:+.1f} points from the base's, which is more than noise: do not use it unmeasured."
    last, best = f"The result is the model of step {state.global_step}", sweet_spot.best_measured(state)
    if best is None:
        return f"No measured step is shorter than the base and holds, so there is none to recommend; step {state.global_step} was the last.{dropped}"
    is_there = best.step == state.best_global_step
    if not is_there:
        last += f"; the best measured is that of step {best.step}: its checkpoint no longer exists"
    if state.best_global_step not in (None, state.global_step):
        which = "the best measured" if is_there else "the best that exists"
        last += f"; {which} is that of step {state.best_global_step}: {state.best_model_checkpoint}"
    elif best.step == state.global_step:
        last += ", which is the best measured"
    return f"{last}.{dropped}"


def describe_lost(trainer: Any, health: Health) -> str | None:
    """
    Return why a run has no model to save as its result: the guard stopped it, or nothing measured qualifies.

    `None` if it has one. A best checkpoint is a result, also if the guard stopped the run at the same step.
    """
    args, guard, sweet_spot, state = trainer.args, health.guard, health.sweet_spot, trainer.state
    if sweet_spot is not None and sweet_spot.loaded_step is not None:
        return None
    no_result = f"The model of step {state.global_step} was not saved as the result, and it was not pushed"
    uploads = args.push_to_hub and args.hub_strategy != HubStrategy.END
    before = " Earlier checkpoints that were pushed stay on the Hub." if uploads else ""
    if guard is not None and guard.stopped_at_step is not None:
        advice = (_way_back(args, sweet_spot, state) if sweet_spot is not None else None) or (
            "An earlier checkpoint may still be good: measure it with `trl-crisp eval`. A larger teacher_sync_steps, a lower learning_rate or "
            "fewer steps may keep the model."
        )
        return f"{guard.describe()}\n{no_result}.{before} {advice}\n`--collapse_guard false` trains on."
    if sweet_spot is not None and sweet_spot.is_lost(state):
        gone = sweet_spot.best_measured(state)
        why = (
            "no measured step is shorter than the base and holds"
            if gone is None
            else f"the best checkpoint, that of step {gone.step}, no longer exists"
        )
        advice = _way_back(args, sweet_spot, state) or (
            "A smaller monitor_steps finds earlier ones; a larger teacher_sync_steps or a lower learning_rate may keep the model."
        )
        return f"{no_result}: {why}.{before} {advice}"
    return None


def _way_back(args: CRISPConfig, sweet_spot: SweetSpot, state: TrainerState) -> str | None:
    """Return which checkpoint held last and how to go on from it; `None` if none did."""
    held = sweet_spot.last_held(args, state)
    if held is None:
        return None
    told = f"{held} is the last checkpoint that held when it was measured: use it"
    changes = gentler(args) if find_fault(held) is None else None
    if changes is None:
        return f"{told}."
    return f"{told}, or go on from it more gently:\n  {resume_command(str(held), **changes)}"


def gentler(args: CRISPConfig) -> dict[str, Any] | None:
    """Return the fields with which the teacher follows the student half as fast, `None` if the teacher has no such field."""
    if args.teacher_model_kind == "periodic":
        assert args.teacher_sync_steps is not None
        # The measurements stay comparable with those before
        monitor = {"monitor_steps": args.monitor_steps} if args.is_monitored else {}
        return {"teacher_sync_steps": 2 * args.teacher_sync_steps, **monitor, "allow_changed_resume": "true"}
    if args.teacher_model_kind == "ema":
        assert args.teacher_update_rate is not None
        return {"teacher_update_rate": args.teacher_update_rate / 2, "allow_changed_resume": "true"}
    return None
