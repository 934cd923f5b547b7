"""Measures the parts of each training step: where the time goes, and how close training comes to the hardware's limit."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.run.flops import MatrixWeights, count_matrix_weights, measure_limit, step_flops, synchronize

PARTS = ("rollout", "weight_sync", "teacher_refresh", "teacher", "student_forward", "backward", "optimizer")
# The training half of a step
TRAINING_PARTS = ("teacher", "student_forward", "backward", "optimizer")


class PartTimes:
    """
    Seconds by part. A part inside of another one interrupts it, so that the parts add up to the time of all.

    Args:
        wait: Called before the clock is read, until the device has done its work.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = wait
        self._open: list[str] = []
        self._since_s = 0.0

    def begin(self, part: str) -> None:
        """Begin a part, inside of the open one if there is one."""
        self._read_clock()
        self._open.append(part)

    def end(self) -> None:
        """End the part that began last."""
        self._read_clock()
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Return a context that is a part."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def reset(self) -> None:
        """Forget all seconds and open parts."""
        self.seconds.clear()
        self._open.clear()

    def _read_clock(self) -> None:
        self._wait()
        now_s = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now_s - self._since_s
        self._since_s = now_s


class StepProfile(TrainerCallback):
    """
    Logs, for each optimizer step, the seconds of its parts on this process. The device is waited for at the ends of each part,
    which costs some speed.

    - `profile/rollout_s`: sampling the rollouts and padding them.
    - `profile/weight_sync_s`: sending the weights to vLLM.
    - `profile/teacher_refresh_s`: sending the weights to the teacher; 0 if no refresh is due.
    - `profile/teacher_s`, `profile/student_forward_s`: the passes; the student's includes the divergence.
    - `profile/backward_s`: with recomputation, and under DeepSpeed with the optimizer's step.
    - `profile/optimizer_s`: clipping, the check of the gradient, the step.
    - `profile/step_s`: the whole step, from its first micro-batch to the end of the optimizer's step.
    - `profile/computed_to_real_tokens`: tokens that student and teacher compute, with padding, to those without.
    - `profile/limit_tflops`: TFLOP per second of a matrix product on this device in the training dtype, measured once before the
      first step.
    - `profile/limit_share`: FLOPs that the training half needs ([`~trl_crisp.run.flops.step_flops`], without padding) per second of
      teacher, student, backward and optimizer, as a share of that limit. `profile/recomputed_limit_share`: those that
      gradient checkpointing computes again, apart.

    Args:
        trainer: A `CRISPTrainer`, whose methods are timed from now on.
    """

    def __init__(self, trainer: Any) -> None:
        device = trainer.accelerator.device
        self._trainer = trainer
        self._times = PartTimes(lambda: synchronize(device))
        self._began_s = 0.0
        self._limit_flops: float | None = None
        self._tokens: dict[str, int] = defaultdict(int)
        student = trainer.model
        self._has_adapter = is_peft_model(student)
        self._weights: MatrixWeights | None = None
        try:
            self._weights = count_matrix_weights(student.get_base_model() if self._has_adapter else student)
        except ValueError as error:
            warnings.warn(f"profile_steps logs no profile/limit_share: {error}", stacklevel=3)

        self._time(trainer, "_generate_and_score_completions", "rollout")
        if trainer.use_vllm:
            self._time(trainer.vllm_generation, "sync_weights", "weight_sync")
        self._time(trainer.teacher, "refresh", "teacher_refresh")
        self._time(trainer, "compute_loss", "student_forward", before=self._count_tokens)
        self._time(trainer.accelerator, "backward", "backward")
        self._time_teacher(trainer.teacher)
        self._time_optimizer(trainer)
        # Before the callbacks that do work of their own at the end of a step
        trainer.callback_handler.callbacks.insert(0, self)

    def _time(self, owner: Any, name: str, part: str, before: Callable[..., None] | None = None) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            with self._times.part(part):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    def _time_teacher(self, teacher: Any) -> None:
        serving: Callable[[], AbstractContextManager[Any]] = teacher.serving

        @contextmanager
        def timed() -> Iterator[Any]:
            with self._times.part("teacher"), serving() as model:
                yield model

        teacher.serving = timed

    def _time_optimizer(self, trainer: Any) -> None:
        training_step = trainer.training_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            # All that follows the last micro-batch of a step belongs to the optimizer, until the step ends
            if trainer.accelerator.gradient_state.sync_gradients:
                self._times.begin("optimizer")
            return loss

        trainer.training_step = timed

    def _count_tokens(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        completion_mask = inputs["completion_mask"]
        for side, prompt in (("student", "prompt"), ("teacher", "teacher_prompt")):
            lengths_B = inputs[f"{prompt}_mask"].sum(dim=1) + completion_mask.sum(dim=1)
            self._tokens[side] += int(lengths_B.sum())
            # The rows of a pass are cut to the longest
            multiple_of = self._trainer.pad_to_multiple_of or 1
            self._tokens["computed"] += len(lengths_B) * -(-int(lengths_B.max()) // multiple_of) * multiple_of
        self._tokens["loss"] += int((self._trainer.get_loss_mask(inputs) != 0).sum())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._limit_flops is None:
            self._limit_flops = measure_limit(self._trainer.accelerator.device, self._training_dtype(args))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Also drops the parts of an evaluation
        self._times.reset()
        self._tokens.clear()
        synchronize(self._trainer.accelerator.device)
        self._began_s = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._times.end()
        seconds = self._times.seconds
        values = {f"{part}_s": seconds[part] for part in PARTS}
        values["step_s"] = time.perf_counter() - self._began_s
        values["computed_to_real_tokens"] = self._tokens["computed"] / (
            self._tokens["student"] + self._tokens["teacher"]
        )
        assert self._limit_flops is not None
        values["limit_tflops"] = self._limit_flops / 1e12
        if self._weights is not None:
            flops = step_flops(
                self._weights,
                self._tokens["student"],
                self._tokens["teacher"],
                self._tokens["loss"],
                has_frozen_weights=self._has_adapter,
                recomputes=bool(args.gradient_checkpointing),
            )
            at_the_limit = self._limit_flops * sum(seconds[part] for part in TRAINING_PARTS)
            values["limit_share"] = flops.needed / at_the_limit
            values["recomputed_limit_share"] = flops.recomputed / at_the_limit
        for name, value in values.items():
            self._trainer._metrics["train"][f"profile/{name}"].append(value)

    def _training_dtype(self, args: TrainingArguments) -> torch.dtype:
        if args.bf16 or args.fp16:
            return torch.bfloat16 if args.bf16 else torch.float16
        return self._trainer.model.dtype
