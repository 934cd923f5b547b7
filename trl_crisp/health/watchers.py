"""What watches a trainer's health, by name."""

from dataclasses import dataclass

from trl_crisp.health.guard import CollapseGuard
from trl_crisp.health.measuring import BenchmarkCallback
from trl_crisp.health.monitor import AgreementMonitor
from trl_crisp.health.signals import HealthSignals
from trl_crisp.health.sweet_spot import SweetSpot


@dataclass(frozen=True)
class Health:
    """
    What watches a trainer. All but the signals are `None` if the config does not ask for them.

    Attributes:
        signals: Judges the training's log.
        guard: Stops a run that is lost by its signals (`collapse_guard`).
        monitor: Measures agreement (`monitor_prompts`, `monitor_file`).
        benchmark: Measures accuracy on a benchmark, if the trainer has a [`~trl_crisp.BenchmarkCallback`].
        sweet_spot: Finds the best checkpoint by the benchmark, else by the monitor, and stops (`stop_at_sweet_spot`, `target_reduction`).
    """

    signals: HealthSignals
    guard: CollapseGuard | None
    monitor: AgreementMonitor | None
    benchmark: BenchmarkCallback | None
    sweet_spot: SweetSpot | None
