"""The weight of each token in the loss, computed from masks.

Shape suffixes: B rollouts of a micro-batch, T completion positions.
"""

from typing import Literal

import torch


def count_loss_items(loss_mask_BT: torch.Tensor, normalization: Literal["sequence", "token"]) -> torch.Tensor:
    """
    Return the number of items that the loss is averaged over: rollouts with a token in the loss, or tokens in the loss.

    Args:
        loss_mask_BT: 1 where a token is in the loss, else 0.
        normalization: See [`loss_token_weights`].

    Returns:
        A scalar count (int64), which the caller sums over processes and micro-batches.
    """
    if normalization == "sequence":
        return (loss_mask_BT != 0).any(dim=1).sum()
    return (loss_mask_BT != 0).sum()


def loss_token_weights(
    loss_mask_BT: torch.Tensor, normalization: Literal["sequence", "token"], num_items: torch.Tensor | float
) -> torch.Tensor:
    """
    Return the weight of each token, so that the loss is `(weights * divergence).sum()`.

    - `"sequence"` (Algorithm 1 of the paper): the mean over each rollout's tokens, then over the rollouts.
    - `"token"` (TRL's `DistillationTrainer`): one mean over all tokens.

    A rollout without a token in the loss has zero weight and is not counted.

    Args:
        loss_mask_BT: 1 where a token is in the loss, else 0.
        normalization: What the loss is averaged over.
        num_items: The global count of [`count_loss_items`], over all micro-batches of the optimizer step and all
            processes. If gradients are averaged over processes, the count is divided by their number and may be below 1.

    Returns:
        Weights of shape [B, T], float32.
    """
    weights_BT = (loss_mask_BT != 0).float()
    if normalization == "sequence":
        weights_BT = weights_BT / weights_BT.sum(dim=1, keepdim=True).clamp(min=1.0)
    return weights_BT / num_items
