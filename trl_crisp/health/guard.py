"""Stops a run that is lost, by its signals alone."""

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
    Ends training if the signals were unhealthy for 10 steps on end, with a checkpoint, and nothing is deleted for it.

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
        self._began_at_step = 0
        self._limit_before: tuple[int | None] | None = None

    @property
    def is_worried(self) -> bool:
        """Whether the last log entry was unhealthy. Then no checkpoint should be uploaded."""
        return self.signals.running.verdict.status == "unhealthy"

    def _is_met(self) -> bool:
        running = self.signals.running
        return running.unhealthy_entries >= GUARD_ENTRIES and running.unhealthy_steps >= GUARD_STEPS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped_at_step, self.reasons = None, []
        if self._limit_before is not None:
            (args.save_total_limit,), self._limit_before = self._limit_before, None
        self._began_at_step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that resumed from its end has trained no step that was judged
        trained_none = state.global_step == self._began_at_step == self.signals.running.step
        if self.stopped_at_step is None and trained_none and self._is_met():
            self._stop(state)

    def _stop(self, state: TrainerState) -> None:
        self.stopped_at_step, self.reasons = state.global_step, list(self.signals.running.verdict.reasons)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._is_met():
            return
        self._stop(state)
        control.should_save = control.should_training_stop = True
        told = f"Training stops after step {state.global_step}: the run looks lost"
        texts: dict[str, Any] = logs
        texts[EVENT_KEY] = f"{texts[EVENT_KEY]}\n{told}" if EVENT_KEY in texts else told
        if state.is_world_process_zero:
            print(told, flush=True)
        # The lost model's checkpoint takes no good one's place
        self._limit_before = (args.save_total_limit,)
        args.save_total_limit = None

    def describe(self) -> str:
        """Return why training was stopped. Call it after a stop."""
        steps = self.signals.running.unhealthy_steps
        reasons = "".join(f"\n  - {reason}" for reason in self.reasons)
        return f"Stopped after step {self.stopped_at_step}: the run looks lost. For {steps} steps on end:{reasons}"
