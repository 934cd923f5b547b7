"""The teacher in full fine-tuning: a frozen copy of the student."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from trl_crisp.config import CRISPConfig
from trl_crisp.teacher.offload import HostWeights
from trl_crisp.teacher.schedule import Teacher
from trl_crisp.teacher.sharding import (
    check_offload,
    is_partitioned,
    named_parameters,
    place,
    plain_name,
    zero3_copy,
)


class CopyTeacher(Teacher):
    """
    A frozen copy of the student's module in evaluation mode. It has the student's dtype unless the config sets one.

    With `teacher_offload` its weights are on the host, and on the device only from [`fetch`] or [`serving`] to the end of `serving`. Its
    output head stays on the device, because the loss reads it later.
    """

    _host: HostWeights | None = None

    def __init__(self, student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> None:
        super().__init__(student, args)
        copied = _frozen_copy(student, (args.teacher_model_init_kwargs or {}).get("dtype"))  # type: ignore[union-attr]
        self._model, self.wrapped_model = place(copied, accelerator)
        if args.teacher_offload:
            self._offload(accelerator)
        if self.kind == "ema" and is_partitioned(self._model) and self._model.dtype != torch.float32:
            raise ValueError(
                "teacher_model_kind='ema' needs a float32 moving average, which cannot be kept under ZeRO-3 in addition to "
                f"{self._model.dtype} parameters. Use ZeRO-2 or FSDP2, or teacher_model_kind='periodic'."
            )
        self._start_averages()

    def _offload(self, accelerator: Accelerator) -> None:
        check_offload(accelerator)
        if accelerator.device.type == "cpu":
            warnings.warn("teacher_offload has no effect on a CPU: the teacher is on the host already.", stacklevel=2)
        # The head may be the embedding too
        kept = set(self._model.get_output_embeddings().parameters())  # type: ignore[operator, union-attr]
        self._host = HostWeights(self._model, kept)

    @property
    def is_offloaded(self) -> bool:
        return self._host is not None

    def fetch(self) -> None:
        if self._host is not None:
            self._host.fetch()

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        if self._host is not None:
            # Who changes the weights has to change those on the host
            self._host.release()
        sources = {plain_name(name): parameter for name, parameter in named_parameters(self.student)}
        for name, target in named_parameters(self._model):
            yield plain_name(name), sources[plain_name(name)], target

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        if self._host is None:
            yield self._model
            return
        self._host.fetch()
        self._host.wait()
        try:
            yield self._model
        finally:
            self._host.release()


def _frozen_copy(student: nn.Module, dtype: str | torch.dtype | None) -> nn.Module:
    teacher = zero3_copy(student) if is_partitioned(student) else copy.deepcopy(student)
    if dtype not in (None, "auto"):
        teacher = teacher.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return teacher.requires_grad_(False).eval()
