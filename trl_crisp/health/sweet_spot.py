"""The sweet spot: which measured step is the best checkpoint, when a run stops there, and what its result is."""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from trl_crisp.run.checkpoints import has_weights, state_of
from trl_crisp.run.identity import run_id_of

# Ours: of healthy runs of 15 measurements (128 prompts x 5 answers, simulated), one would end 7%, two end 1%, and three miss more
# losses (benchmarks/README, Accuracy without labels)
MEASUREMENTS_IN_A_ROW = 2
# Rounding of the shares must not turn a drop of exactly the margin into a larger one
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Measurement:
    """
    What was measured of the student after a step, against the base.

    Attributes:
        step: The optimizer steps that were done.
        mean_tokens: The mean length of the answers.
        reduction: The share of the base's tokens that is gone; negative if the answers are longer.
        change: How far accuracy, or agreement, is from the base's own: -0.03 is three points below. NaN if only lengths were measured.
        change_high: The upper end of the paired 95% interval of the change. NaN if there is none.
    """

    step: int
    mean_tokens: float
    reduction: float
    change: float = math.nan
    change_high: float = math.nan


class Source(Protocol):
    """
    What measures the student along a run. Labels count more than agreement where there are both.

    Attributes:
        margin: How far the change may be below the base's own, as a share: 0.03 is three points.
        subject: What is measured, in words.
        every_steps: Optimizer steps between two measurements.
        saves_held: Whether it has each measured step that holds saved, to go back to if the run is lost.
    """

    margin: float
    subject: str
    every_steps: int
    saves_held: bool

    def is_due(self, step: int) -> bool:
        """Return whether it measures after this optimizer step. After the last step of a run it always measures."""
        ...

    def measurements(self, state: TrainerState) -> list[Measurement]:
        """Return what was measured so far, without the base's own, from the log alone."""
        ...

    def why_not(self, state: TrainerState) -> str | None:
        """Return why it cannot say whether the answers hold, in words, or `None` if it can. It follows from the log alone."""
        ...


def holds(measured: Measurement, margin: float) -> bool:
    """Whether the change is not below the base by more than the margin. False if it is unknown."""
    return measured.change >= -margin - _ROUNDING


def is_sure_drop(measured: Measurement, margin: float) -> bool:
    """Whether the change is below the base by more than the margin, and its interval below zero. False if it is unknown."""
    return measured.change < -margin - _ROUNDING and measured.change_high < 0


def has_fallen(measured: Sequence[Measurement], margin: float) -> bool:
    """
    The rule of the stop: whether the last two measurements are both below the margin, and each one's interval is below zero.

    The interval is paired over prompts. With the margin alone a noisy measurement would end a run; with the interval alone, a loss too
    small to matter.
    """
    last = measured[-MEASUREMENTS_IN_A_ROW:]
    return len(last) == MEASUREMENTS_IN_A_ROW and all(is_sure_drop(one, margin) for one in last)


def check_sole_owner(args: TrainingArguments, field_name: str) -> None:
    """Raise `ValueError` if transformers would choose a best checkpoint too."""
    rule = f"{field_name} finds the best checkpoint by a rule of its own"
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        raise ValueError(
            f"{rule}, and lr_scheduler_type='reduce_lr_on_plateau' makes transformers find one by a metric. Set another lr_scheduler_type, such "
            "as constant."
        )
    if args.load_best_model_at_end or args.metric_for_best_model:
        raise ValueError(
            f"{rule}, and so do load_best_model_at_end and metric_for_best_model. Leave out one of the two."
        )


def offer_best(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, measured: Measurement, margin: float
) -> None:
    """
    Make the current step the best checkpoint, and have it saved, if it is shorter than the base and the best so far, and holds.

    Only this function and [`find_best`] set `best_model_checkpoint`, which `save_total_limit` keeps.
    """
    shortest = math.inf if state.best_metric is None else state.best_metric
    if qualified([measured], margin) and measured.mean_tokens < shortest:
        state.best_metric, state.best_global_step = measured.mean_tokens, measured.step
        state.best_model_checkpoint = str(_checkpoint(args, measured.step))
        control.should_save = True


def qualified(measured: Sequence[Measurement], margin: float) -> list[Measurement]:
    """Return the measurements that may be the result, the best first: those that hold and are shorter than the base."""
    found = [one for one in measured if holds(one, margin) and one.reduction > 0]
    return sorted(found, key=lambda one: one.mean_tokens)


def find_best(trainer: Any, args: TrainingArguments, state: TrainerState, source: Source) -> None:
    """
    Set the best checkpoint to the best of what was measured so far whose checkpoint exists now. All processes call it.

    A state records the path, and the choice by the margin, as they were then. Since then `output_dir` may have moved, and the margin may be
    another.
    """
    recorded = state.best_global_step, state.best_model_checkpoint
    state.best_global_step = state.best_metric = state.best_model_checkpoint = None
    measured = qualified(source.measurements(state), source.margin)
    paths = [own_checkpoint(trainer, source, one, _checkpoint(args, one.step)) for one in measured]
    for number, one in enumerate(measured):
        if paths[number] is None and one.step == recorded[0] and recorded[1]:
            paths[number] = own_checkpoint(trainer, source, one, Path(recorded[1]))
    on_all = _on_all_processes(trainer, [path is not None for path in paths])
    for one, path, is_there in zip(measured, paths, on_all, strict=True):
        if is_there:
            state.best_global_step, state.best_metric = one.step, one.mean_tokens
            state.best_model_checkpoint = str(path)
            return


def _on_all_processes(trainer: Any, flags: list[bool]) -> list[bool]:
    """Return which flags are set on all processes, because each one loads a checkpoint from its own disk, and all must decide alike."""
    if trainer.accelerator.num_processes == 1:
        return flags
    return [all(column) for column in zip(*gather_object([flags]), strict=True)]


def own_checkpoint(trainer: Any, source: Source, measured: Measurement, path: Path) -> Path | None:
    """
    Return the path if the checkpoint of a measured step is there.

    `None` if it is not, has no weights, is of another run, or was measured otherwise: then the run has gone back behind that step since, and
    trained anew.
    """
    # One that TRL saved, or whose saving was cut off, may not say whose it is
    if not has_weights(path) or run_id_of(path) not in (None, trainer.run_id):
        return None
    saved = state_of(path)
    then = [one for one in source.measurements(saved) if one.step == measured.step] if saved is not None else []
    # Two NaNs differ, and their texts do not. A measurement that failed is not in the checkpoint
    return path if not then or repr(then) == repr([measured]) else None


class SweetSpot(TrainerCallback):
    """
    Finds the best checkpoint by what a source measures, and ends the run there if the config says so.

    - The best checkpoint is the measured step with the fewest mean tokens, fewer than the base's, whose change holds ([`holds`]).
    - With agreement on, each measured step that holds is saved, and `save_total_limit` keeps the last of them, to go back to if the
      run is lost.
    - `stop_at_sweet_spot` ends the run once the change has fallen ([`has_fallen`]). When such a run ends, by this or at its last step, the
      trainer's model gets the weights of the best checkpoint, so these are what is saved and pushed.
    - `target_reduction` ends the run once the measured mean length has fallen by that share.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]; use [`~trl_crisp.health.attach.attach_health`].
        sources: What measures the student. The first that can say whether the answers hold decides; if none can, the first one's lengths
            count. Their callbacks must come before this one.

    Attributes:
        loaded_step: The step of the best checkpoint whose weights the model has, `None` if it has those of the last step.
    """

    def __init__(self, trainer: Any, *sources: Source) -> None:
        self.trainer, self.sources = trainer, sources
        self.loaded_step: int | None = None

    def source(self, state: TrainerState) -> Source:
        """Return what decides."""
        return next((one for one in self.sources if one.why_not(state) is None), self.sources[0])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loaded_step = None
        find_best(self.trainer, args, state, self.source(state))
        self.trainer.kept_checkpoint = self.last_held(args, state)
        # What failed when the run was interrupted has been measured by now
        if state.global_step > 0 and self.reason_to_stop(state) is not None:
            control.should_training_stop = True
        if state.is_world_process_zero and state.max_steps > 0:
            self._warn_of_a_short_run(state)

    def _warn_of_a_short_run(self, state: TrainerState) -> None:
        source, args = self.source(state), self.trainer.args
        needed = {
            "stop_at_sweet_spot": MEASUREMENTS_IN_A_ROW if args.stop_at_sweet_spot else 0,
            "target_reduction": 0 if args.target_reduction is None else 1,
        }
        due = (step for step in range(1, state.max_steps) if source.is_due(step))
        before_last = len(list(itertools.islice(due, max(needed.values()))))
        if late := {name: count for name, count in needed.items() if before_last < count}:
            counts = " and ".join(f"{name} needs {count} before it" for name, count in late.items())
            warnings.warn(
                f"{' and '.join(late)} cannot end this run before its last step, {state.max_steps}: {counts}, and with one measurement every "
                f"{source.every_steps} steps there is {before_last or 'none'}. Measure more often (monitor_steps, eval_benchmark_steps).",
                stacklevel=3,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        source = self.source(state)
        measured = source.measurements(state)
        if not measured or measured[-1].step != state.global_step:
            return
        offer_best(args, state, control, measured[-1], source.margin)
        if any(one.saves_held for one in self.sources) and holds(measured[-1], source.margin):
            # What to go back to if the run is lost later
            control.should_save = True
            self.trainer.kept_checkpoint = _checkpoint(args, state.global_step)
        if self.trainer.args.stop_at_sweet_spot and state.global_step >= state.max_steps:
            # The model may get the best checkpoint's weights, or not be saved as the result
            control.should_save = True
        if (reason := self.reason_to_stop(state)) is not None:
            control.should_training_stop = control.should_save = True
            self.trainer.accelerator.print(f"Training ends after step {state.global_step}: {reason}")

    def reason_to_stop(self, state: TrainerState) -> str | None:
        """Return why the run ends at its current step, in words, or `None`. It follows from the log, so a resumed run agrees."""
        source = self.source(state)
        measured = source.measurements(state)
        if not measured or measured[-1].step != state.global_step:
            return None
        args, last = self.trainer.args, measured[-1]
        target = args.target_reduction
        if target is not None and last.reduction >= target - _ROUNDING:
            return f"answers are {last.reduction:.0%} shorter than the base's (target_reduction={target:g})."
        if args.stop_at_sweet_spot and has_fallen(measured, source.margin):
            return (
                f"{source.subject} is {100 * last.change:+.1f} points from the base's, and more than "
                f"{100 * source.margin:g} points below it at {MEASUREMENTS_IN_A_ROW} measurements in a row (stop_at_sweet_spot)."
            )
        return None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stops = self.trainer.args.stop_at_sweet_spot
        if self.loaded_step is not None or not (stops and self.has_ended(state)) or state.best_global_step is None:
            return
        if state.best_global_step != state.global_step:
            find_best(self.trainer, args, state, self.source(state))
            if state.best_global_step is None:
                return
        if state.best_global_step != state.global_step:
            self.trainer._load_best_model()
        self.loaded_step = state.best_global_step

    def has_ended(self, state: TrainerState) -> bool:
        """Whether the run is at its last step, or ends at this one."""
        return state.global_step >= state.max_steps or self.reason_to_stop(state) is not None

    def is_worried(self, state: TrainerState) -> bool:
        """Whether the run would end if the next measurement were like the last one. Then no checkpoint should be uploaded."""
        return self.trainer.args.stop_at_sweet_spot and self.has_dropped(state)

    def has_dropped(self, state: TrainerState) -> bool:
        """Whether the last measurement is a sure drop ([`is_sure_drop`])."""
        source = self.source(state)
        measured = source.measurements(state)
        return bool(measured) and is_sure_drop(measured[-1], source.margin)

    def is_lost(self, state: TrainerState) -> bool:
        """Whether the run has ended, its last measurement is a sure drop ([`is_sure_drop`]), and no checkpoint can be its result."""
        # An interrupted run goes on when it is resumed
        return self.has_ended(state) and self.loaded_step is None and self.is_worried(state)

    def best_measured(self, state: TrainerState) -> Measurement | None:
        """Return the best of what was measured, whether or not its checkpoint exists."""
        source = self.source(state)
        return next(iter(qualified(source.measurements(state), source.margin)), None)

    def last_held(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Return the run's latest checkpoint on disk whose measurement holds."""
        source = self.source(state)
        held = [one for one in source.measurements(state) if holds(one, source.margin)]
        checkpoints = (
            own_checkpoint(self.trainer, source, one, _checkpoint(args, one.step)) for one in reversed(held)
        )
        return next((path for path in checkpoints if path is not None), None)


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{step}")
