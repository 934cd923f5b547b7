"""Does an optimizer step of this size change weights of this precision at all?"""

import math

import torch

_SAMPLED_WEIGHTS = 4096


@torch.no_grad()
def unchanged_weight_share(parameters: list[torch.nn.Parameter], learning_rate: float) -> float:
    """
    Share of weights that an AdamW step leaves as they are, because their precision rounds it away.

    AdamW moves a weight by about the learning rate, whatever the gradient's size; a weight whose spacing to the next
    representable number is more than twice that stays where it is.

    Args:
        parameters: Trainable parameters of one or several dtypes.
        learning_rate: Of the optimizer.

    Returns:
        A share from 0 to 1 of all weights, estimated from an evenly spaced sample of at most 4,096 a parameter.
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
