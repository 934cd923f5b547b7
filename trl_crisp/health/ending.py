"""How a run ends: a line on what it did and which checkpoint to use, and whether it has a model to save as its result."""

from typing import Any

from trl_crisp.config import CRISPConfig
from trl_crisp.health.attach import Health
from trl_crisp.run.interruption import resume_command


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


def _advice(trainer: Any, health: Health) -> str:
    state, sweet_spot = trainer.state, health.sweet_spot
    if sweet_spot is None:
        return f"The result is the model of step {state.global_step}."
    if sweet_spot.loaded_step is not None:
        return (
            f"The result is the best checkpoint, that of step {sweet_spot.loaded_step}: {state.best_model_checkpoint}."
        )
    if state.best_global_step is None:
        return f"No measured step is shorter than the base and holds, so there is none to recommend; step {state.global_step} was the last."
    if state.best_global_step == state.global_step:
        return f"The result is the model of step {state.global_step}, which is the best measured."
    best = state.best_model_checkpoint or "its checkpoint no longer exists"
    return f"The result is the model of step {state.global_step}; the best measured is that of step {state.best_global_step}: {best}."


def describe_lost(trainer: Any, health: Health) -> str | None:
    """Return why a run has no model to save as its result: the guard stopped it, or nothing measured qualifies. `None` if it has one."""
    guard, sweet_spot, state = health.guard, health.sweet_spot, trainer.state
    if guard is not None and guard.stopped_at_step is not None:
        held = sweet_spot.last_held(trainer.args, state) if sweet_spot is not None else None
        changes = gentler(trainer.args)
        command = None if held is None or changes is None else resume_command(str(held), **changes)
        return guard.describe(held, command)
    if sweet_spot is not None and sweet_spot.is_lost(state):
        why = (
            "no measured step is shorter than the base and holds"
            if state.best_global_step is None
            else f"the best checkpoint, that of step {state.best_global_step}, no longer exists"
        )
        return (
            f"The model was not saved as the result, and nothing was pushed: {why}. A smaller monitor_steps finds earlier ones; a larger "
            "teacher_sync_steps or a lower learning_rate may keep the model."
        )
    return None


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
