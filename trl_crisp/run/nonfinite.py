"""Steps whose gradient is not finite are skipped and counted; three in a row end the run."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.run.identity import last_own_checkpoint

# Our choice: one such step can be due to its batch; three in a row are due to the weights
MAX_SKIPPED_IN_A_ROW = 3


class SkipNonFiniteSteps(TrainerCallback):
    """
    Skips a step if a gradient is NaN or infinite: weights and optimizer state stay as they are, as in the authors' code.

    DeepSpeed takes its step before a callback can read the gradient, so under DeepSpeed [`check_loss`] ends the run if the loss is
    not finite. With float16 the loss scaler skips such steps.

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
        # Each process has its own shards, so a gradient may be finite on one process and not on another
        wrong = torch.tensor(float(not gradients_are_finite(model)), device=args.device)
        if not self.accelerator.reduce(wrong, "sum").item():
            self._in_a_row = 0
            return
        # The optimizer does not change a parameter without a gradient
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
        Check the loss of a run whose gradient cannot be read. All processes call it.

        Raises:
            FloatingPointError: If the loss is NaN or infinite on any process.
        """
        wrong = (~torch.isfinite(loss.detach())).float().reshape(1)
        if self.accelerator.reduce(wrong, "sum").item():
            raise FloatingPointError(
                f"the loss of step {step} is not finite, and under DeepSpeed the step cannot be skipped. "
                + describe_way_back(output_dir)
            )


def describe_way_back(output_dir: str | None) -> str:
    """Return the last good checkpoint, and what may avoid the problem."""
    last = last_own_checkpoint(output_dir or ".")
    where = (
        f"The last good checkpoint is {last}: resume_from_checkpoint true resumes from it" if last else "No checkpoint"
    )
    return (
        f"{where}{'' if last else ' was saved'}. A lower learning_rate, or float32 instead of bfloat16, may avoid it."
    )


def gradients_are_finite(model: torch.nn.Module) -> bool:
    """Return whether no gradient of a model, or of this process's part of it, has a NaN or an infinite value."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    # One result per device, so that the host waits once per device instead of once per parameter
    by_device: dict[torch.device, torch.Tensor] = {}
    for gradient in local:
        if not gradient.numel():
            # A process may have no part of a small sharded parameter
            continue
        # NaN and infinity show in the extremes. isfinite on the whole gradient takes temporaries almost twice as large
        finite = torch.isfinite(torch.stack(gradient.aminmax())).all()
        by_device[finite.device] = by_device[finite.device] & finite if finite.device in by_device else finite
    return all(bool(finite) for finite in by_device.values())
