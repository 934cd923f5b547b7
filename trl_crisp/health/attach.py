"""Attaches what watches a run's health to a trainer."""

from transformers import Trainer

from trl_crisp.health.guard import CollapseGuard
from trl_crisp.health.signals import HealthSignals


def attach_signals(trainer: Trainer) -> tuple[HealthSignals, CollapseGuard | None]:
    """
    Make a trainer judge its own signals, and stop if they say that the run is lost.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]. The guard is attached if its config's `collapse_guard` is set.

    Returns:
        The two callbacks; the guard is `None` if it is off.
    """
    signals = HealthSignals()
    guard = CollapseGuard(signals) if trainer.args.collapse_guard else None  # type: ignore[attr-defined]
    # Before the trackers and the line of the terminal, which report what the signals add to the log
    trainer.callback_handler.callbacks[:0] = [signals, *([guard] if guard is not None else [])]
    return signals, guard
