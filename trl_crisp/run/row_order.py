"""The order in which a run reads its rows in each pass. A run that resumes in a later pass reads the same rows."""

import warnings
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochOrder(Sampler[int]):
    """
    TRL's repeating sampler, shuffled by the seed and the number of the epoch.

    TRL's sampler shuffles each epoch with the state that the previous epoch left in the generator, so a run that resumes in the
    second epoch would get the order of the first epoch again. The order of the first epoch is the same as TRL's.

    Args:
        sampler: A `RepeatSampler`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Passes(TrainerCallback):
    """
    Counts the passes over the rows, and tells the sampler which pass begins.

    accelerate does this only in part: it passes `set_epoch` through two wrappers of the sampler, but a run on several processes
    that resumes inside an epoch has three. transformers assumes that a stream has `max_steps` steps, so it does not know if a run
    resumes in the stream's second pass.

    Attributes:
        order: The sampler, or `None` for a stream.
        index: The current pass, counted from 0.
        started_at_step: Optimizer steps before the current pass.
    """

    def __init__(self) -> None:
        self.order: EpochOrder | None = None
        self.index = -1
        self.started_at_step = 0
        self._is_resumed = False

    def start(self) -> None:
        """Reset to the first pass."""
        self.index, self.started_at_step, self._is_resumed = -1, 0, False

    def resume(self, index: int, started_at_step: int) -> None:
        """Resume inside a pass."""
        self.index, self.started_at_step, self._is_resumed = index, started_at_step, True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_resumed:
            self._is_resumed = False
        else:
            self.index += 1
            self.started_at_step = state.global_step
        if self.order is not None:
            self.order.set_epoch(self.index)


def warn_of_rows_made_on_access(dataset: Dataset | IterableDataset) -> None:
    """Warn that a transform that makes rows on access is applied only once."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        warnings.warn(
            "the train dataset makes its rows on access (set_transform or with_transform). The transform is applied once, at the "
            "start, so every epoch and a resumed run read the same rows. A run whose rows change in each epoch could not resume.",
            stacklevel=4,
        )
