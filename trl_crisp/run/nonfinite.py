"""Steps whose gradient is not finite: skipped, counted, and after three in a row the end."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.run.identity import last_own_checkpoint

# Ours: one can be an accident of a batch; three in a row are what the weights now give
MAX_SKIPPED_IN_A_ROW = 3


class SkipNonFiniteSteps(TrainerCallback):
    """
    Leaves the weights and the optimizer's state as they are where a gradient is NaN or infinite, as the authors' code does.

    DeepSpeed takes its step before anything can look at the gradient, so there a loss that is not finite ends the run, by
    [`check_loss`]. With float16 it is the loss scaler that skips steps.

    Attributes:
        skipped_steps: How many steps of this process's run were skipped.

    Raises:
        FloatingPointError: After three skipped steps in a row.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.skipped_steps = 0
        self._in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.accelerator.scaler is not None:
            return
        # Shards differ between processes, and so may what is in them
        wrong = torch.tensor(float(not _gradients_are_finite(model)), device=args.device)
        if not self.accelerator.reduce(wrong, "sum").item():
            self._in_a_row = 0
            return
        # A parameter without a gradient is one that the optimizer leaves alone
        model.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        self._in_a_row += 1
        step = state.global_step + 1
        self.accelerator.print(f"Step {step} is skipped: its gradient is not finite ({self.skipped_steps} so far).")
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients of steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step} are not finite, so training stopped. "
                + describe_way_back(args.output_dir)
            )

    def check_loss(self, loss: torch.Tensor, step: int, output_dir: str | None) -> None:
        """
        End a run whose gradient cannot be looked at; all processes call it.

        Raises:
            FloatingPointError: For a loss that is NaN or infinite on one of them.
        """
        wrong = (~torch.isfinite(loss.detach())).float().reshape(1)
        if self.accelerator.reduce(wrong, "sum").item():
            raise FloatingPointError(
                f"the loss of step {step} is not finite, and under DeepSpeed the step cannot be skipped. "
                + describe_way_back(output_dir)
            )


def describe_way_back(output_dir: str | None) -> str:
    """Return which checkpoint is the last good one, and what to look at."""
    last = last_own_checkpoint(output_dir or ".")
    where = (
        f"The last good checkpoint is {last}: resume_from_checkpoint true goes on from it" if last else "No checkpoint"
    )
    return (
        f"{where}{'' if last else ' was saved'}. A lower learning_rate, or float32 instead of bfloat16, may avoid it."
    )


def _gradients_are_finite(model: torch.nn.Module) -> bool:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    # One answer for each device, so that there is one wait
    by_device: dict[torch.device, torch.Tensor] = {}
    for gradient in local:
        finite = torch.isfinite(gradient).all()
        by_device[finite.device] = by_device[finite.device] & finite if finite.device in by_device else finite
    return all(bool(finite) for finite in by_device.values())
