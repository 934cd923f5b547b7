"""A measurement during training that fails ends the run after a checkpoint, on all processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp.run.checkpoints import find_fault
from trl_crisp.run.identity import last_own_checkpoint

_T = TypeVar("_T")


class MeasurementError(RuntimeError):
    """Raised on all processes if one of them could not measure, so that none waits for it."""


def measure_on_all(trainer: Any, compute: Callable[[], list[_T]]) -> list[_T]:
    """
    Return what all processes computed, one after another. All processes call it.

    Args:
        trainer: Its accelerator knows the processes.
        compute: Returns the part of this process. It calls no other process.

    Raises:
        MeasurementError: If it fails on one of several processes. One process raises its own error.
    """
    if trainer.accelerator.num_processes == 1:
        return compute()
    part, error = _try(compute)
    found = gather_object([(part, _describe(trainer, error))])
    _raise_any([failure for _, failure in found], error)
    return [one for part, _ in found for one in part]


def measure_on_first(trainer: Any, compute: Callable[[], _T]) -> _T:
    """
    Return what the first process computes, on all of them. All processes call it.

    Args:
        trainer: Its accelerator knows the processes.
        compute: Called on the first process only. It calls no other process.

    Raises:
        MeasurementError: If it fails on the first of several processes. One process raises its own error.
    """
    if trainer.accelerator.num_processes == 1:
        return compute()
    found, error = _try(compute) if trainer.is_world_process_zero() else (None, None)
    ((found, failure),) = broadcast_object_list([(found, _describe(trainer, error))])
    _raise_any([failure], error)
    return found  # type: ignore[return-value]


def _try(compute: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, error


def _describe(trainer: Any, error: Exception | None) -> str | None:
    return None if error is None else f"process {trainer.accelerator.process_index}: {type(error).__name__}: {error}"


def _raise_any(failures: list[str | None], own: Exception | None) -> None:
    if failed := [failure for failure in failures if failure is not None]:
        raise MeasurementError("; ".join(failed)) from own


class SavesFirst(TrainerCallback):
    """Measures during training; if that fails, the run ends once its checkpoint is saved."""

    trainer: Any
    _failed: Exception | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an error of an earlier training, whose checkpoint could not be saved."""
        self._failed = None

    @contextmanager
    def saves_first(self, control: TrainerControl) -> Iterator[None]:
        """Keep an error of the block for [`on_save`], if all processes have it, and have a checkpoint saved."""
        try:
            yield
        except Exception as error:
            # A process that fails alone has left the others waiting, and they would never come to save
            if self.trainer.accelerator.num_processes > 1 and not isinstance(error, MeasurementError):
                raise
            self._failed, control.should_save = error, True

    @contextmanager
    def measures_late(self, state: TrainerState) -> Iterator[None]:
        """Note at an error of the block that the run resumed to measure what failed before, and that nothing is lost."""
        try:
            yield
        except Exception as error:
            error.add_note(
                f"Step {state.global_step} is due to be measured and was not, so a resumed run measures it first. The checkpoint is as it was: "
                "resume again once the cause is gone."
            )
            raise

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise the error that was kept."""
        if self._failed is None:
            return
        error, self._failed = self._failed, None
        # The first process may still be writing, and a launcher ends it when another one fails
        self.trainer.accelerator.wait_for_everyone()
        error.add_note(
            f"The student could not be measured after step {state.global_step}. {_describe_way_on(args, state.global_step)}"
        )
        raise error


def _describe_way_on(args: TrainingArguments, step: int) -> str:
    output_dir = Path(args.output_dir or ".")
    checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if (fault := find_fault(checkpoint)) is None:
        return f"Its checkpoint was saved: once the cause is gone, go on with resume_from_checkpoint true; that first measures step {step}."
    last = last_own_checkpoint(output_dir)
    way_on = (
        f"Once the cause is gone, resume_from_checkpoint true goes on from {last}."
        if last
        else "No other checkpoint can be resumed from, so the run has to start again."
    )
    return f"Its model was saved in {checkpoint}, which cannot be resumed from: {fault}. {way_on}"
