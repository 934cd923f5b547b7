"""Which rows a run reads, pass after pass, such that a run that resumes in a later pass reads the same ones."""

import warnings
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochOrder(Sampler[int]):
    """
    TRL's repeating sampler, shuffled by the seed and the number of the epoch.

    TRL's draws each epoch's order from what the generator is left at after the epoch before, so a run that resumes in the
    second epoch would get the first one's order again. The first epoch's order is TRL's.

    Args:
        sampler: A `RepeatSampler`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, that is iterated over next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Passes(TrainerCallback):
    """
    Counts the passes over the rows, and tells the sampler which one begins.

    accelerate hands `set_epoch` on through two wrappers of the sampler; a run on several processes that resumes inside an
    epoch has three. And transformers takes the length of a stream to be `max_steps`, so it does not know that a run resumes in
    the stream's second pass.

    Attributes:
        order: The sampler, `None` for a stream.
        index: The current pass, counted from 0.
        started_at_step: Optimizer steps before the current pass.
    """

    def __init__(self) -> None:
        self.order: EpochOrder | None = None
        self.index = -1
        self.started_at_step = 0
        self._is_resumed = False

    def start(self) -> None:
        """Begin with the first pass."""
        self.index, self.started_at_step, self._is_resumed = -1, 0, False

    def resume(self, index: int, started_at_step: int) -> None:
        """Begin inside a pass."""
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
    """Warn that a transform that makes the rows whenever they are read is applied once."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        warnings.warn(
            "the train dataset makes its rows on access (set_transform or with_transform). The transform is applied once, at the "
            "start: every epoch, and a run that resumes, reads the same rows. Other rows in each epoch cannot be repeated.",
            stacklevel=4,
        )
