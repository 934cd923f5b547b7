"""Runs a model's body without its head, with the positions of padded rows, and compares the outputs of two passes."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Tolerance for passes in float32. Our choice: rounding stays a hundred times below it, and the weakest effect of positions that
# we found in transformers' models is above it.
_FLOAT32_TOLERANCE = 1e-4
_LOWEST_COMPARED = -9e3


def causal_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.base_model.model if is_peft_model(model) else model  # type: ignore[union-attr, return-value]


def backbone(model: nn.Module) -> nn.Module:
    """
    Return the part of a causal language model that computes its last hidden states.

    Raises:
        ValueError: If the model has no such part.
    """
    model = causal_model(model)
    # Llama 4's text model has its body as `model`, although its class declares another name
    body = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if not isinstance(body, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no part without the output head (`base_model`), whose hidden states the loss "
            "reads. Train a causal language model of transformers that has one."
        )
    return body


def positions_of(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Return each token's position among the tokens of its row that are not padding, as `generate` numbers them."""
    return (attention_mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)


def left_aligned(
    ids_BT: torch.Tensor, mask_BT: torch.Tensor, multiple_of: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Move each row to the left, so that it begins with its first token, and cut the rows to the longest.

    In a causal model no token attends to the padding that is now behind it, so the mask may be 1 there. Without a zero in the mask,
    attention runs without one: its kernels for causal attention alone compute half of the matrix.

    Args:
        ids_BT: Token ids.
        mask_BT: 1 for a token, 0 for padding on either side.
        multiple_of: The width stays a multiple of it, if it was one.

    Returns:
        The ids and the mask, [B, W], and the index at which each row began, [B]. The mask is 0 only at a 0 between two tokens.
    """
    width = mask_BT.size(1)
    first_B = mask_BT.argmax(dim=1)
    length_B = width - mask_BT.flip(1).argmax(dim=1) - first_B
    longest = int(length_B.max())
    if multiple_of is not None:
        longest = min(-(-longest // multiple_of) * multiple_of, width)
    step_W = torch.arange(longest, device=ids_BT.device)
    index_BW = (first_B[:, None] + step_W).clamp(max=width - 1)
    mask_BW = mask_BT.gather(1, index_BW).masked_fill(step_W >= length_B[:, None], 1)
    return ids_BT.gather(1, index_BW), mask_BW, first_B


def takes(module: nn.Module, argument: str) -> bool:
    """Return whether a module's forward has an argument of this name."""
    return argument in inspect.signature(module.forward).parameters


def last_hidden_state(
    model: nn.Module, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, pass_positions: bool
) -> torch.Tensor:
    """
    Run a model's body on padded rows, and return its last hidden states, [B, T, H].

    Args:
        model: An unwrapped transformers model, or a PEFT model.
        input_ids_BT: Token ids.
        attention_mask_BT: 1 for a token, 0 for padding on either side.
        pass_positions: Pass the positions of [`positions_of`]. A model with a learned embedding for each position needs them; a
            model with relative positions gives the same output without them.
    """
    positions = {"position_ids": positions_of(attention_mask_BT)} if pass_positions else {}
    output = backbone(model)(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **positions)
    return output.last_hidden_state


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each of its modules on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model draws random numbers in training mode: a dropout module, or a module's rate for a functional one."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False


def difference(output_TH: torch.Tensor, expected_TH: torch.Tensor) -> float:
    """
    Return the median over rows of the relative distance between two outputs; infinite for NaN. Logits that mask a token (-inf,
    finfo.min) are left out.
    """
    output_TH, expected_TH = (x.float().masked_fill(x < _LOWEST_COMPARED, 0) for x in (output_TH, expected_TH))
    # The median, because rounding can route single tokens to another expert, while padding changes all tokens
    errors_T = (output_TH - expected_TH).norm(dim=-1) / expected_TH.norm(dim=-1).clamp(min=1e-30)
    return errors_T.median().nan_to_num(math.inf).item()


def tolerance_of(model: nn.Module, output: torch.Tensor) -> float:
    """Return the largest [`difference`] that rounding explains, for the coarsest of the model's dtypes."""
    dtypes = {output.dtype, *(parameter.dtype for parameter in model.parameters())}
    # Quantized weights (integers) are multiplied in bfloat16, and matrices on a GPU may be in TF32, as coarse as float16
    floats = {dtype if dtype.is_floating_point else torch.bfloat16 for dtype in dtypes}
    if output.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        floats.add(torch.float16)
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    return _FLOAT32_TOLERANCE if eps <= torch.finfo(torch.float32).eps else math.sqrt(eps)
