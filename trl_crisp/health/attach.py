"""Attaches what watches a run's health to a trainer, by one call."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from datasets import Dataset

from trl_crisp.config import CRISPConfig
from trl_crisp.evaluation.progress import Tell
from trl_crisp.health.alerts import TrackerAlerts
from trl_crisp.health.ending import BeforeTrackers, EndOfRun
from trl_crisp.health.guard import GUARD_ENTRIES, GUARD_STEPS, CollapseGuard
from trl_crisp.health.measuring import BenchmarkCallback
from trl_crisp.health.monitor import AgreementMonitor
from trl_crisp.health.signals import WINDOW_STEPS, HealthSignals
from trl_crisp.health.sweet_spot import SweetSpot, check_sole_owner
from trl_crisp.health.watchers import Health


def attach_health(
    trainer: Any,
    answer_of: Callable[[str], str | None] | None = None,
    monitor_dataset: Dataset | None = None,
    progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
) -> Health:
    """
    Attach to a trainer what its config asks for. Call it once, before `train`, and after adding a [`~trl_crisp.BenchmarkCallback`].

    A training then ends with a line on what it did and which checkpoint to use ([`~trl_crisp.health.ending.EndOfRun`]).

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`].
        answer_of: Returns the final answer of a text, or `None` if it has none; two answers are the same if these strings are. It replaces
            `monitor_grader`.
        monitor_dataset: Rows with a column `prompt`, and optionally `answer`, instead of those in `monitor_file`.
        progress: As in [`~trl_crisp.BenchmarkCallback`].

    Raises:
        ValueError: If the config's fields do not fit each other or the trainer; see [`~trl_crisp.health.monitor.AgreementMonitor`].
    """
    args = trainer.args
    if trainer.is_watched:
        raise ValueError("this trainer is watched already. Call attach_health once.")
    benchmarks = _benchmarks_of(trainer)
    if len(benchmarks) > 1:
        raise ValueError(
            f"{len(benchmarks)} BenchmarkCallbacks ({', '.join(one.name for one in benchmarks)}) would each choose the best checkpoint. Add one, and "
            "measure the checkpoints on the others with `trl-crisp eval`."
        )
    benchmark = benchmarks[0] if benchmarks else None
    asked = [name for name in ("stop_at_sweet_spot", "target_reduction") if getattr(args, name)]
    if asked and not args.is_monitored and benchmark is None:
        raise ValueError(
            f"{' and '.join(asked)}: nothing is measured to decide by. Set monitor_prompts, such as 128, monitor_file or eval_benchmark."
        )
    if args.stop_at_sweet_spot and args.save_only_model and trainer.is_deepspeed_enabled:
        raise ValueError(
            "stop_at_sweet_spot loads the best checkpoint at the end, and DeepSpeed cannot load one that was saved with save_only_model. Leave "
            "one of the two out."
        )
    monitor = None
    if args.is_monitored:
        check_sole_owner(args, "monitor_prompts")
        if benchmark is not None and benchmark.name == "agreement":
            raise ValueError(
                "eval_benchmark: its measurements and those of the monitor prompts would have the same names, eval_agreement. Rename the file."
            )
        monitor = AgreementMonitor(trainer, answer_of, progress, monitor_dataset)
        trainer.add_callback(monitor)
        trainer.accelerator.print(monitor.describe_start())
    sweet_spot = None
    if sources := [one for one in (benchmark, monitor) if one is not None]:
        sweet_spot = SweetSpot(trainer, *sources)
        trainer.add_callback(sweet_spot)
        trainer.is_over = lambda state: sweet_spot.reason_to_stop(state) is not None
    _warn_of_no_effect(args, answer_of, monitor_dataset)
    _warn_of_a_short_log(trainer)
    _warn_of_a_gate_without_refreshes(trainer)
    signals = HealthSignals()
    guard = CollapseGuard(signals) if args.collapse_guard else None
    # Before the trackers and the line of the terminal, which report what the signals add to the log
    alerts = TrackerAlerts(signals, trainer.callback_handler)
    health = Health(signals, guard, monitor, benchmark, sweet_spot)
    end = EndOfRun(trainer, health)
    trainer.callback_handler.callbacks[:0] = [
        signals,
        *([guard] if guard is not None else []),
        alerts,
        BeforeTrackers(end),
    ]

    def may_upload() -> bool:
        worried = guard is not None and guard.is_worried
        return not (worried or (sweet_spot is not None and sweet_spot.is_worried(trainer.state)))

    def check_callbacks() -> None:
        if any(one not in benchmarks for one in _benchmarks_of(trainer)):
            raise ValueError(
                "a BenchmarkCallback was added after attach_health(trainer), so both would choose the best checkpoint. Add it before that call, "
                "which then decides by the benchmark."
            )

    trainer.may_upload, trainer.check_callbacks = may_upload, check_callbacks
    trainer.is_watched = True
    trainer.add_callback(end)
    return health


def _benchmarks_of(trainer: Any) -> list[BenchmarkCallback]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, BenchmarkCallback)]


def _warn_of_no_effect(args: Any, answer_of: Any, monitor_dataset: Dataset | None) -> None:
    """Warn of arguments that nothing reads."""
    told = []
    if monitor_dataset is not None and args.monitor_file is None:
        told.append(
            "monitor_dataset has no effect without monitor_file: set that to the name of its file, or to any name."
        )
    if answer_of is not None and not args.is_monitored:
        told.append("answer_of has no effect without monitor_prompts or monitor_file: nothing asks for final answers.")
    if answer_of is not None and args.is_monitored and args.monitor_grader != CRISPConfig.monitor_grader:
        told.append(f"monitor_grader={args.monitor_grader!r} has no effect with answer_of, which replaces it.")
    for message in told:
        warnings.warn(message, stacklevel=3)


def _most_steps(trainer: Any) -> float:
    """Return how many steps a run has at most; infinity if that cannot be known before it starts."""
    args, rows = trainer.args, trainer.train_dataset
    if args.max_steps > 0:
        return float(args.max_steps)
    if not isinstance(rows, Dataset):
        return math.inf
    return math.ceil(args.num_train_epochs * math.ceil(len(rows) / args.rollouts_per_step))


def _warn_of_a_gate_without_refreshes(trainer: Any) -> None:
    args, steps = trainer.args, _most_steps(trainer)
    if args.teacher_refresh_gate is not None and args.teacher_sync_steps > steps:
        warnings.warn(
            f"teacher_refresh_gate={args.teacher_refresh_gate!r} has no effect: the first refresh is due at step {args.teacher_sync_steps}, and the "
            f"run has at most {steps:g} steps. Lower teacher_sync_steps, or leave the gate unset.",
            stacklevel=3,
        )


def _warn_of_a_short_log(trainer: Any) -> None:
    """Warn if the signals, or the guard, read a log that has too few entries to say anything."""
    args, steps = trainer.args, _most_steps(trainer)
    way_out = "Set logging_strategy steps and logging_steps, such as 1."
    if args.logging_strategy == "no":
        guard = " and collapse_guard" if args.collapse_guard else ""
        warnings.warn(
            f"logging_strategy='no': the signals of health{guard} read the training's log, and there is none, so they have no effect. {way_out}",
            stacklevel=3,
        )
        return
    if not args.collapse_guard:
        return
    if args.logging_strategy == "epoch":
        epochs = _most_epochs(trainer)
        entries, cause = epochs, f"logging_strategy='epoch' in at most {epochs:g} epochs"
    elif WINDOW_STEPS + GUARD_STEPS <= steps < math.inf:
        # Below 1 it is a share of the steps
        every = args.logging_steps if args.logging_steps >= 1 else math.ceil(args.logging_steps * steps)
        entries, cause = steps // every, f"logging_steps={args.logging_steps:g} in at most {steps:g} steps"
    else:
        # The guard stops no shorter run, however often that logs
        return
    # The first entry is what later ones are compared with
    if entries <= GUARD_ENTRIES:
        warnings.warn(
            f"collapse_guard has no effect: {cause} makes at most {entries:g} log entries, and the guard needs one to compare with and "
            f"{GUARD_ENTRIES} more. {way_out}",
            stacklevel=3,
        )


def _most_epochs(trainer: Any) -> float:
    """Return how many epochs a run begins at most; infinity if that cannot be known before it starts."""
    args, rows = trainer.args, trainer.train_dataset
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    if not isinstance(rows, Dataset):
        return math.inf
    return math.ceil(args.max_steps / max(1, len(rows) // args.rollouts_per_step))
