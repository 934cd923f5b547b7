"""The order of the rows in each epoch, which a run that resumes in a later epoch repeats."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


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
        """Set the epoch, counted from 0, that is iterated over next; the trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
