"""Alerts of health events in the trackers that have alerts: wandb and trackio."""

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback, WandbCallback

from trl_crisp.health.signals import EVENT_KEY, HealthSignals, Status

_LEVELS: dict[Status, str] = {"healthy": "INFO", "watch": "WARN", "unhealthy": "ERROR"}


class TrackerAlerts(TrainerCallback):
    """
    Makes an alert of each health event. As a text all trackers get it from the log ([`~trl_crisp.health.signals.HealthSignals`]).

    Args:
        signals: What finds the events. Its callback must come before this one.
        handler: The trainer's callback handler, which knows the trackers.
    """

    def __init__(self, signals: HealthSignals, handler: Any) -> None:
        self.signals, self.handler = signals, handler

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or EVENT_KEY not in logs:
            return
        status = self.signals.running.verdict.status
        title = f"CRISP: {status}"
        for callback in self.handler.callbacks:
            try:
                if isinstance(callback, WandbCallback) and callback._wandb is not None:
                    level = callback._wandb.AlertLevel[_LEVELS[status]]
                    # Without a wait: wandb drops alerts of the same title within a minute
                    callback._wandb.run.alert(title=title, text=logs[EVENT_KEY], level=level, wait_duration=0)
                elif isinstance(callback, TrackioCallback):
                    level = callback._trackio.AlertLevel[_LEVELS[status]]
                    callback._trackio.alert(title, logs[EVENT_KEY], level)
            # A tracker's fault must not end a training
            except Exception as error:
                name = type(callback).__name__.removesuffix("Callback")
                warnings.warn(f"{name} took no alert of {status}: {error}", stacklevel=2)
