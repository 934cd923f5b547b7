"""Stops a run that is lost, by its signals alone."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.health.signals import EVENT_KEY, HealthSignals

# Unhealthy for so many steps on end, by at least two log entries. Ours: each verdict is on 5 steps' means, so ten are two windows
# that share no step. By then the lab's lost runs had lost half of the accuracy or more, and no run that kept it had a single
# unhealthy step.
GUARD_STEPS = 10
GUARD_ENTRIES = 2
# The exit status of a training that was stopped
EXIT_CODE = 3


class CollapseGuard(TrainerCallback):
    """
    Ends training if the signals were unhealthy for 10 steps on end, with a checkpoint, and nothing is pushed or deleted for it.

    It promises only to stop: from signals alone, accuracy is lost before it shows. What to go back to needs a measure of the
    answers.

    Args:
        signals: The callback that judges the steps. It must come before the guard.

    Attributes:
        stopped_at_step: The optimizer step after which training was stopped, `None` if it was not stopped.
        reasons: What the signals said then.
    """

    def __init__(self, signals: HealthSignals) -> None:
        self.signals = signals
        self.stopped_at_step: int | None = None
        self.reasons: list[str] = []
        self._before: tuple[bool, int | None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped_at_step, self.reasons = None, []
        if self._before is not None:
            (args.push_to_hub, args.save_total_limit), self._before = self._before, None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        running = self.signals.running
        if logs is None or "loss" not in logs or running.unhealthy_entries < GUARD_ENTRIES:
            return
        if running.unhealthy_steps < GUARD_STEPS:
            return
        self.stopped_at_step, self.reasons = state.global_step, list(running.verdict.reasons)
        control.should_save = control.should_training_stop = True
        told = f"Training stops after step {state.global_step}: the run looks lost"
        texts: dict[str, Any] = logs
        texts[EVENT_KEY] = f"{texts[EVENT_KEY]}\n{told}" if EVENT_KEY in texts else told
        # The lost model's checkpoint is not uploaded, and takes no good one's place
        self._before = args.push_to_hub, args.save_total_limit
        args.push_to_hub, args.save_total_limit = False, None

    def describe(self, held: Path | None = None, command: str | None = None) -> str:
        """
        Return why training was stopped, and what to do. Call it after a stop.

        Args:
            held: The latest checkpoint whose measurement held, if there is one.
            command: The command that resumes from it with a gentler setting.
        """
        steps = self.signals.running.unhealthy_steps
        reasons = "".join(f"\n  - {reason}" for reason in self.reasons)
        advice = (
            "An earlier checkpoint may still be good: measure it with `trl-crisp eval`. A larger teacher_sync_steps, a lower learning_rate or "
            "fewer steps may keep the model."
        )
        if held is not None:
            advice = f"{held} is the last checkpoint that held when it was measured: use it"
            advice += "." if command is None else f", or go on from it more gently:\n  {command}"
        return (
            f"Stopped after step {self.stopped_at_step}: the run looks lost. For {steps} steps on end:{reasons}\n"
            f"The model was not saved as the result, and nothing was pushed. {advice}\n"
            "`--collapse_guard false` trains on."
        )
