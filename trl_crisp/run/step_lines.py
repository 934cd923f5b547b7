"""What a run prints: one line with the main values for each log entry. The trackers get all values."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepLines(TrainerCallback):
    """Prints one line per logged step instead of transformers' dict, on the main process."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._started_at_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started_s, self._started_at_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            steps = state.global_step - self._started_at_step
            passed_s = time.monotonic() - self._started_s
            left_s = passed_s / steps * (state.max_steps - state.global_step) if steps else None
            print(format_line(state.global_step, state.max_steps, logs, left_s), flush=True)


def format_line(step: int, max_steps: int, logs: dict[str, float], left_s: float | None) -> str:
    """
    Return the line for one log entry.

    Args:
        step, max_steps: Optimizer steps done, and in total.
        logs: The trainer's log entry: the values of a step or of an evaluation, or the summary at the end.
        left_s: Seconds until the last step, `None` if unknown.
    """
    parts = [f"step {step}/{max_steps}"]
    if "train_runtime" in logs:
        return f"{parts[0]}  trained in {format_duration(logs['train_runtime'])}"
    if "loss" not in logs:
        # The values of an evaluation, printed under their own names
        values = {name.removeprefix("eval_"): value for name, value in logs.items() if name != "epoch"}
        return "  ".join([*parts, "evaluation", *(f"{name} {value:.4g}" for name, value in values.items())])
    if (length := logs.get("completions/mean_length")) is not None:
        relative = logs.get("completions/relative_length")
        of_start = "" if relative is None else f" ({relative:.0%} of the first steps')"
        parts.append(f"length {length:,.0f} tokens{of_start}")
    for name, key, form in (
        ("clipped", "completions/clipped_ratio", "{:.0%}"),
        ("reverse KL", "reverse_kl", "{:.3g} nats"),
        ("loss", "loss", "{:.3g}"),
    ):
        if (value := logs.get(key)) is not None:
            parts.append(f"{name} {form.format(value)}")
    if status := logs.get("health/status"):
        parts.append("unhealthy" if status == 2 else "watch")
    if skipped := logs.get("skipped_steps"):
        parts.append(f"skipped steps {skipped:.0f}")
    if left_s is not None and step < max_steps:
        parts.append(f"{format_duration(left_s)} left")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return a duration with at most two units: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
