"""A `DistillationTrainer` whose runs can be killed at any point and resume exactly."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import DistillationTrainer

from trl_crisp.run.checkpoints import RUN_FILE, keep_at_most, remove_torn, seal
from trl_crisp.run.files import write_json
from trl_crisp.run.identity import (
    check_same_run,
    last_own_checkpoint,
    resolve_checkpoint,
    run_id_of,
    saved_checkpoints,
    start_run,
)
from trl_crisp.run.nonfinite import SkipNonFiniteSteps
from trl_crisp.run.resume_checks import ChecksResume
from trl_crisp.run.row_order import EpochOrder, Passes, warn_of_rows_made_on_access
from trl_crisp.run.saving import check_can_be_saved
from trl_crisp.run.step_lines import StepLines

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ResumableTrainer(DistillationTrainer):
    """
    TRL's `DistillationTrainer` for runs that can be killed at any point. A resumed run equals the uninterrupted run bit by bit.

    What differs from [`~trl.DistillationTrainer`]:

    - A torn checkpoint is detected, and each checkpoint records its run. `resume_from_checkpoint=True` takes the run's own last
      whole checkpoint.
    - A run that resumes in a later epoch, or in a stream's later pass, reads the rows that the uninterrupted run reads.
    - Metrics that were not logged before a checkpoint are logged after resuming.
    - Saving is tried before the first step. A step whose gradient is not finite is skipped.
    - The terminal gets one line for each log entry ([`~trl_crisp.run.step_lines.StepLines`]).

    A subclass sets `run_description` before it trains, and overrides [`save_own_state`] and [`load_own_state`].

    Attributes:
        run_description: The settings that identify a run ([`~trl_crisp.run.identity.describe_run`]). A checkpoint of a run with
            another description is refused.
        run_id: The id of the run, which its checkpoints have too; `None` before training.
        is_over: Receives the state of a checkpoint, and says whether the run had ended there before its last step. Then nothing more is
            trained from it. `None` if only the last step ends a run.
        kept_checkpoint: A checkpoint that `save_total_limit` keeps besides the latest and the best.
        check_callbacks: Called before a training touches anything; raises `ValueError` if the callbacks do not fit each other. `None` if all do.
        may_upload: Says whether the checkpoint that was just saved may go to the Hub, if the config uploads checkpoints. `None` if each may.
    """

    run_description: dict[str, Any]
    is_over: Callable[[TrainerState], bool] | None = None
    kept_checkpoint: Path | None = None
    check_callbacks: Callable[[], None] | None = None
    may_upload: Callable[[], bool] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_can_be_saved(self.model, self.processing_class)  # type: ignore[arg-type]
        warn_of_rows_made_on_access(self.train_dataset)  # type: ignore[arg-type]
        self.run_id: str | None = None
        self._loaded_step: int | None = None
        self._passes = Passes()
        self._nonfinite = SkipNonFiniteSteps(self.accelerator)
        # transformers prints a dict of twenty values per step. The trackers keep these values; StepLines prints one line
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        for callback in (self._passes, self._nonfinite, StepLines()):
            self.add_callback(callback)
        # Values from the checkpoint for the steps since its last log entry; `None` once they are restored
        self._unlogged: dict[str, Any] | None = None

    def save_own_state(self, directory: str) -> dict[str, Any]:
        """Write the subclass's state into a checkpoint; return the part for the JSON record. All processes call it."""
        return {}

    def start_own_state(self) -> None:
        """Prepare the subclass's state for a run that starts afresh. All processes call it."""

    def load_own_state(self, directory: str, record: dict[str, Any]) -> None:
        """Restore what [`save_own_state`] wrote and returned. All processes call it."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train, from the start or from a checkpoint. A resumed run continues as if it had not been interrupted.

        Args:
            resume_from_checkpoint: A checkpoint's path, or `True` for the run's own last whole checkpoint in `output_dir`. Torn
                checkpoints and those of other runs are skipped with a message. If no checkpoint is left, training starts afresh.
                A checkpoint of the run's end is loaded and no further step is trained.
            trial, ignore_keys_for_eval: As in the parent.

        Raises:
            ValueError: If the checkpoint is torn, is past the last step, or belongs to a run with another instruction, schedule,
                adapter or model.
            FileNotFoundError: If the path does not exist.
        """
        if self.check_callbacks is not None:
            self.check_callbacks()
        output_dir = self.args.output_dir or "."
        allowed = self.args.allow_changed_resume  # type: ignore[attr-defined]
        # The main process decides for all, because the directory may look different to the others
        chosen = self._from_main_process(lambda: resolve_checkpoint(resume_from_checkpoint, output_dir, allowed))
        if chosen is not None:
            check_same_run(chosen, self.run_description, allowed)
        self._passes.start()
        self._loaded_step = None
        # A run of this trainer that was interrupted leaves a step's rollouts half used, and its metrics
        self._step, self._buffered_inputs = 0, None
        self._metrics["train"].clear()
        return super().train(chosen, trial, ignore_keys_for_eval)

    @property
    def model_step(self) -> int:
        """The optimizer step whose weights the model has: the last one or, if they were loaded, that of the best checkpoint."""
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded_step = self.state.best_global_step

    def _from_main_process(self, decide: Any) -> Any:
        if self.accelerator.num_processes == 1:
            return decide()
        decision: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                decision = [decide()]
            except (ValueError, FileNotFoundError) as error:
                decision = [error]
        (decided,) = broadcast_object_list(decision)
        if isinstance(decided, Exception):
            raise decided
        return decided

    # Rows

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            # Persistent workers draw their seed once per run, others once per epoch. If they drew it from the rollouts' random
            # stream, a resumed run would draw once more than the uninterrupted run.
            (getattr(loader, "base_dataloader", loader)).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, *args, **kwargs)
        # TRL reads a stream without workers, and torch refuses these settings then
        settings = ("dataloader_persistent_workers", False), ("dataloader_prefetch_factor", None)
        before = [getattr(self.args, name) for name, _ in settings]
        try:
            for name, value in settings:
                setattr(self.args, name, value)
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            for (name, _), value in zip(settings, before, strict=True):
                setattr(self.args, name, value)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._passes.order = EpochOrder(super()._get_train_sampler(dataset))
        return self._passes.order

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        output_dir = self.args.output_dir or "."
        if resume_from_checkpoint is None:
            self.run_id = self._from_main_process(lambda: start_run(output_dir))
            self.start_own_state()
            return epochs, batches
        step = self.state.global_step
        if step > max_steps:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is of step {step}, and this run ends at step {max_steps}. Resume "
                "from an earlier checkpoint, train for more steps (max_steps, num_train_epochs), or use another output_dir for "
                "another run."
            )
        self.run_id = self._from_main_process(lambda: self._take_over(output_dir, run_id_of(resume_from_checkpoint)))
        started_at_step = step - batches // self.args.gradient_accumulation_steps
        record = _read_record(resume_from_checkpoint)["pass"]
        # transformers assumes that a stream has max_steps steps, and that every epoch before was read to its end. Its numbers are
        # those of the record, or, at the end of an epoch, those of the next one.
        is_next = batches == 0 and epochs == record["index"] + 1
        if not self.args.ignore_data_skip and not is_next:
            epochs, started_at_step = record["index"], record["started_at_step"]
            batches = (step - started_at_step) * self.args.gradient_accumulation_steps
        self._passes.resume(epochs, started_at_step)
        # From the checkpoint of a run's end transformers would train one more step
        is_over = step == max_steps or (self.is_over is not None and self.is_over(self.state))
        return (num_train_epochs, 0) if is_over else (epochs, batches)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A callback may have ended the run before its first step
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _take_over(self, output_dir: str, run_id: str | None) -> str:
        # Before the directory is written to, which may be another run's
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ChecksResume):
                callback.check_resume(run_id, self.state)
        return start_run(output_dir, run_id)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training and self._unlogged is not None:  # type: ignore[union-attr]
            # Restored at the first batch, because the training loop sets these counters to zero when it starts
            self._tr_loss += self._unlogged["loss_sum"]
            self._globalstep_last_logged = self._unlogged["last_logged_step"]
            self._metrics["train"].update(self._unlogged["metrics"])
            self._unlogged = None
        return super()._prepare_inputs(generation_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.is_deepspeed_enabled and self.model.training:
            self._nonfinite.check_loss(loss, self.state.global_step + 1, self.args.output_dir)
        return loss

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        directory = Path(self._get_output_dir(trial))
        checkpoint = directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and checkpoint.is_dir():
            # The directory is torn or from an earlier run. If it were only half overwritten, it could pass as a whole checkpoint
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        # transformers also counts checkpoints of other runs, and may take one of them for the latest
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            error.add_note(self._describe_failed_save(checkpoint, error))
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            if self.args.save_only_model:
                # It has no record of what a resume needs
                write_json(checkpoint / RUN_FILE, {"run_id": self.run_id, "saved_at": time.time()})
            # A run that began to save only its model keeps the last checkpoint that it can resume from
            kept = self.state.best_model_checkpoint, self.kept_checkpoint, last_own_checkpoint(directory)
            keep_at_most(saved_checkpoints(directory, self.run_id), limit, *kept)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It also copies the weights into output_dir
        if self.may_upload is None or self.may_upload():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # With a limit of 1 transformers removes all checkpoints but the best at the end, including those of other runs
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        # A best checkpoint that was not found by transformers' metric stays beside the last one, which can be resumed
        by_metric = self.args.metric_for_best_model is not None
        if self.args.should_save and limit == 1 and best is not None and by_metric:
            for path in saved_checkpoints(self._get_output_dir(trial), self.run_id):
                if path != Path(best):
                    shutil.rmtree(path, ignore_errors=True)
        return output

    def _describe_failed_save(self, checkpoint: Path, error: Exception) -> str:
        # The user, or the next run, may need the disk space of the torn checkpoint
        if self.args.should_save:
            remove_torn(checkpoint)
        last = last_own_checkpoint(checkpoint.parent)
        if last == checkpoint:
            return f"{checkpoint} is whole; the error came after it. Resume from it with resume_from_checkpoint true."
        make_room = ""
        if _is_disk_full(error):
            free_mb = shutil.disk_usage(checkpoint.parent).free / 1e6
            make_room = f"The disk is full ({free_mb:,.0f} MB free now). Make room, or lower save_total_limit. "
        return f"Saving {checkpoint} failed, so training stopped; its incomplete files were removed. {make_room}" + (
            f"Then resume from {last} with resume_from_checkpoint true."
            if last
            else "No checkpoint is whole, so the run has to start again."
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        own = self.save_own_state(output_dir)
        # The sum of the losses since the last log entry
        loss_sum = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        if self.args.should_save:
            record = {
                "run_id": self.run_id,
                "saved_at": time.time(),
                "run": self.run_description,
                "pass": {"index": self._passes.index, "started_at_step": self._passes.started_at_step},
                "skipped_steps": self._nonfinite.skipped_steps,
                "unlogged": {
                    "loss_sum": loss_sum,
                    "last_logged_step": self._globalstep_last_logged,
                    "metrics": self._metrics["train"],
                },
                **own,
            }
            write_json(Path(output_dir, RUN_FILE), record)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # This is the last file that all processes write. transformers writes trainer_state.json after it, as the end mark
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            record = _read_record(checkpoint)
            self.load_own_state(checkpoint, record)
            self._nonfinite.skipped_steps = record["skipped_steps"]
            self._unlogged = record["unlogged"]


def _read_record(checkpoint: str) -> dict[str, Any]:
    return json.loads(Path(checkpoint, RUN_FILE).read_text(encoding="utf-8"))


def _is_disk_full(error: BaseException | None) -> bool:
    for cause in _causes(error):
        # safetensors gives the error number only in its message
        if getattr(cause, "errno", None) in _DISK_FULL or any(f"os error {n})" in str(cause) for n in _DISK_FULL):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
