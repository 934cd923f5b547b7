"""Does an optimizer step of this size change weights of this precision at all?"""

import math

import torch

_SAMPLED_WEIGHTS = 4096


def check_step_size(model: torch.nn.Module, learning_rate: float) -> None:
    """
    Check that an optimizer step changes most trainable weights, and by the right amount.

    Raises:
        ValueError: If more than half of the weights would round back to their old value at each step. Also if some are float16:
            there AdamW's mean of the squared gradients rounds to zero, so its steps are far too large.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.dtype == torch.float16 for parameter in trainable):
        raise ValueError(
            "the trainable weights are float16, in which AdamW's squared gradients round to zero, so its steps would be far "
            "too large and training would diverge. Load the model in float32 (model_init_kwargs={'dtype': 'float32'}, TRL's "
            "default) and set fp16=True, which computes in float16 on float32 weights; or train with DeepSpeed or FSDP2, "
            "which keep float32 masters; or use LoRA, whose weights PEFT keeps in float32."
        )
    unchanged = unchanged_weight_share(trainable, learning_rate) if learning_rate else 0.0
    if unchanged > 0.5:
        raise ValueError(
            f"learning_rate={learning_rate} is too small for {trainable[0].dtype} weights: {unchanged:.0%} of them would "
            "round back to their old value at each step. Load the model in float32 (model_init_kwargs={'dtype': 'float32'}, "
            "TRL's default) and keep bf16=True, which computes in bfloat16 on float32 weights; or train with DeepSpeed or "
            "FSDP2, which keep float32 masters; or use LoRA."
        )


@torch.no_grad()
def unchanged_weight_share(parameters: list[torch.nn.Parameter], learning_rate: float) -> float:
    """
    Return the share of weights that an AdamW step leaves unchanged, because rounding removes the step.

    AdamW changes a weight by about the learning rate, for any size of the gradient. If the distance from a weight to the next
    representable number is more than twice the learning rate, the weight does not change.

    Args:
        parameters: Trainable parameters of one or several dtypes.
        learning_rate: The optimizer's learning rate.

    Returns:
        A share from 0 to 1 of all weights, estimated from an evenly spaced sample of at most 4,096 weights per parameter.
    """
    unchanged, total = 0.0, 0
    for parameter in parameters:
        flat = parameter.detach().flatten()
        if not len(flat):
            continue
        weights = flat[:: math.ceil(len(flat) / _SAMPLED_WEIGHTS)].float().abs()
        smallest = torch.finfo(parameter.dtype).smallest_normal
        exponent = torch.floor(torch.log2(weights.clamp(min=smallest)))
        spacing = torch.exp2(exponent) * torch.finfo(parameter.dtype).eps
        unchanged += (spacing > 2 * learning_rate).float().mean().item() * len(flat)
        total += len(flat)
    return unchanged / total if total else 0.0
