"""Token weights: pure functions of masks.

Shape suffixes: B rollouts of a micro-batch, T completion positions.
"""

from typing import Literal

import torch


def count_loss_items(loss_mask_BT: torch.Tensor, normalization: Literal["sequence", "token"]) -> torch.Tensor:
    """
    Count what the loss is averaged over: rollouts with at least one token in the loss, or such tokens.

    Args:
        loss_mask_BT: 1 where a token is in the loss, else 0.
        normalization: See [`loss_token_weights`].

    Returns:
        A scalar count (int64), to be summed over processes and micro-batches.
    """
    if normalization == "sequence":
        return (loss_mask_BT != 0).any(dim=1).sum()
    return (loss_mask_BT != 0).sum()


def loss_token_weights(
    loss_mask_BT: torch.Tensor, normalization: Literal["sequence", "token"], num_items: torch.Tensor | float
) -> torch.Tensor:
    """
    Weight of each token in the loss, such that the loss is `(weights * divergence).sum()`.

    - `"sequence"` (Algorithm 1 of the paper): the mean over each rollout's tokens, then over the rollouts.
    - `"token"` (TRL's `DistillationTrainer`): one mean over all tokens.

    A rollout whose mask is all zero has zero weight and is not in the count.

    Args:
        loss_mask_BT: 1 where a token is in the loss, else 0.
        normalization: What the loss is averaged over.
        num_items: The global count of [`count_loss_items`], over all micro-batches of the optimizer step and all
            processes (divided by the number of processes where gradients are averaged over them). Below 1 only where
            that division takes it there.

    Returns:
        Weights of shape [B, T], float32.
    """
    weights_BT = (loss_mask_BT != 0).float()
    if normalization == "sequence":
        weights_BT = weights_BT / weights_BT.sum(dim=1, keepdim=True).clamp(min=1.0)
    return weights_BT / num_items
