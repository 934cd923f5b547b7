"""The teacher in full fine-tuning: a frozen copy of the student."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from trl_crisp.config import CRISPConfig
from trl_crisp.teacher.schedule import Teacher
from trl_crisp.teacher.sharding import is_partitioned, named_parameters, place, plain_name, zero3_copy


class CopyTeacher(Teacher):
    """A frozen copy of the student's module in evaluation mode. It has the student's dtype unless the config sets one."""

    def __init__(self, student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> None:
        super().__init__(student, args)
        copied = _frozen_copy(student, (args.teacher_model_init_kwargs or {}).get("dtype"))  # type: ignore[union-attr]
        self._model, self.wrapped_model = place(copied, accelerator)
        if self.kind == "ema" and is_partitioned(self._model) and self._model.dtype != torch.float32:
            raise ValueError(
                "teacher_model_kind='ema' needs a float32 moving average, which cannot be kept under ZeRO-3 in addition to "
                f"{self._model.dtype} parameters. Use ZeRO-2 or FSDP2, or teacher_model_kind='periodic'."
            )
        self._start_averages()

    def _weight_pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        sources = {plain_name(name): parameter for name, parameter in named_parameters(self.student)}
        for name, target in named_parameters(self._model):
            yield plain_name(name), sources[plain_name(name)], target

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        yield self._model


def _frozen_copy(student: nn.Module, dtype: str | torch.dtype | None) -> nn.Module:
    teacher = zero3_copy(student) if is_partitioned(student) else copy.deepcopy(student)
    if dtype not in (None, "auto"):
        teacher = teacher.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return teacher.requires_grad_(False).eval()
