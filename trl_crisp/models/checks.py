"""Checks at the start, by a few short forward passes, that the loss is correct for a model."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import nn

from trl_crisp._upstream import maybe_gather_lm_head_ctx
from trl_crisp.loss.divergence import MASKED_LOGIT, logits_of, output_head
from trl_crisp.models.hidden_states import (
    backbone,
    causal_model,
    difference,
    evaluation_mode,
    last_hidden_state,
    takes,
    tolerance_of,
)

# Our choice: enough tokens for a median, and enough padding to detect shifted positions
_TOKENS = 8
_PADDING_TOKENS = 16


class _UnfitModel(ValueError):
    pass


def check_config(model: nn.Module) -> None:
    """
    Check what can be checked without a forward pass.

    Raises:
        ValueError: If no parameter is trainable, or the config adds another loss.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model is trainable (requires_grad is False everywhere), so nothing would be learned. "
            + (
                "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
                if is_peft_model(model)
                else "Call model.requires_grad_(True), or pass a LoRA config."
            )
        )
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "the model's config has output_router_logits=True, which adds a load-balancing loss to the model's own loss. "
            "CRISP trains the divergence only, so it would have no effect. Set model.config.output_router_logits = False."
        )


def needs_positions(
    model: nn.Module,
    wrapped: nn.Module | None,
    redirect: Callable,
    pad_token_id: int,
    accelerator: Accelerator,
) -> bool:
    """
    Check that the loss is correct for a model, and return whether its padded rows need position ids.

    A short row is passed with and without padding on its left, and the head's logits are compared with the model's own logits.
    The model, its modes, its gradients and the random states do not change.

    Args:
        model: The teacher's module, or the student's if the teacher is a part of it.
        wrapped: The same module as the distributed backend wrapped it; all processes run it. `None` if it is not wrapped yet. Then
            its weights may be in the first process only, so the result of that process is used by all.
        redirect: TRL's `_ForwardRedirection`.
        pad_token_id: The id under the padding.
        accelerator: The run's accelerator.

    Raises:
        ValueError: If padding changes the hidden states even with position ids, if the model is not causal, or if its logits are
            not those of its output head.
    """
    if wrapped is not None:

        def run_wrapped() -> bool:
            # A forward of the backend returns tensors
            return bool(redirect(wrapped, model, lambda: torch.tensor(probe_model(model, pad_token_id))))

        found = _probe(run_wrapped, model, is_ready=True)
    else:
        # Under DeepSpeed and FSDP the model is not on its device yet, and some kernels run only there
        is_ready = model.get_input_embeddings().weight.device.type == accelerator.device.type  # type: ignore[operator]
        result = [None]
        if accelerator.is_main_process:
            result = [_probe(lambda: probe_model(model, pad_token_id), model, is_ready)]
        found = broadcast_object_list(result)[0] if accelerator.num_processes > 1 else result[0]
    if isinstance(found, _UnfitModel):
        raise ValueError(str(found)) from found.__cause__
    if found is None:
        warnings.warn(
            "it could not be checked whether padding changes the model's hidden states, because the model is not on its device "
            "yet. No position ids are passed, which is correct for models with rotary or other relative positions.",
            stacklevel=3,
        )
    return bool(found)


def _probe(run: Callable[[], bool], model: nn.Module, is_ready: bool) -> Any:
    try:
        return run()
    except _UnfitModel as error:
        return error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not is_ready:
            return None
        unfit = _UnfitModel(
            f"{_name(model)} fails on a row of {2 * _TOKENS} tokens, as it would in the first step: "
            f"{type(error).__name__}: {error}"
        )
        unfit.__cause__ = error
        return unfit


@torch.no_grad()
def probe_model(model: nn.Module, pad_token_id: int) -> bool:
    """Run the check of [`needs_positions`] in one process, which must have all parameters."""
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    # The ids are spread over the vocabulary. The row has twice the compared tokens, to detect an effect of later tokens
    ids = [(i + 1) * vocab_size // (2 * _TOKENS + 1) for i in range(2 * _TOKENS)]
    row = torch.tensor([[i if i != pad_token_id else (i + 1) % vocab_size for i in ids]], device=device)
    ones = torch.ones_like(row)
    padding = torch.full((1, _PADDING_TOKENS), pad_token_id, device=device)
    # The second row is padded on its right, so both kinds of padding are in one batch
    padded = torch.cat([torch.cat([padding, row[:, :_TOKENS]], 1), torch.cat([row, padding[:, _TOKENS:]], 1)])
    mask = torch.ones_like(padded)
    mask[0, :_PADDING_TOKENS] = 0
    mask[1, 2 * _TOKENS :] = 0

    # Some kernels draw random numbers even if they do not use them
    with evaluation_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        hidden = last_hidden_state(model, row, ones, pass_positions=False)
        if not torch.isfinite(hidden).all():
            raise _UnfitModel(
                f"{_name(model)} gives hidden states that are NaN or infinite. Check its weights, and load it in float32."
            )
        tolerance = tolerance_of(model, hidden)
        _check_head(model, hidden, row, ones, tolerance)
        alone = hidden[0, :_TOKENS]
        first_half = last_hidden_state(model, row[:, :_TOKENS], ones[:, :_TOKENS], pass_positions=False)[0]
        if difference(first_half, alone) > tolerance:
            raise _UnfitModel(
                f"{_name(model)} is not causal: later tokens change the hidden states of earlier ones, so rollouts and loss "
                "would have different distributions. Set is_decoder=True in its config if it has that field, or train "
                "another model."
            )
        # generate passes position ids only if the model's own forward has that argument
        takes_positions = takes(causal_model(model), "position_ids") and takes(backbone(model), "position_ids")
        for pass_positions in (False, True) if takes_positions else (False,):
            hidden = last_hidden_state(model, padded, mask, pass_positions)[0, _PADDING_TOKENS:]
            if difference(hidden, alone) <= tolerance:
                return pass_positions
    raise _UnfitModel(
        f"{_name(model)} gives other hidden states when a row is padded on its left, even with position ids: it ignores the "
        "attention mask, or counts the padding in the positions. The rows of a batch differ in length, so rollouts and loss "
        "would be wrong. Train another model."
    )


def _check_head(
    model: nn.Module, hidden_BTH: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor, tolerance: float
) -> None:
    advice = "The loss reads the head's weight and bias, so it would use another distribution. Train another model."
    own_BTV = causal_model(model)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    head = output_head(model, hidden_BTH.dtype)
    hidden_BTH = hidden_BTH.to(head.weight_VH.device)
    with maybe_gather_lm_head_ctx(head.weight_VH, head.bias_V):  # type: ignore[arg-type]
        if hasattr(head.bias_V, "ds_id") and torch.isneginf(head.bias_V).any():  # type: ignore[arg-type]
            raise _UnfitModel(
                "the output head's bias is -inf for some tokens, which DeepSpeed ZeRO-3 does not support. Use ZeRO-2 or "
                "FSDP2, or a finite bias such as -1e4."
            )
        read_BTV = logits_of(hidden_BTH, head)
    own_BTV = own_BTV.to(read_BTV)
    if own_BTV.shape != read_BTV.shape:
        raise _UnfitModel(
            f"{_name(model)} gives {own_BTV.shape[-1]} logits, and its output head has {read_BTV.shape[-1]} rows. {advice}"
        )
    if own_BTV.isnan().any() or own_BTV.isposinf().any():
        raise _UnfitModel(
            f"{_name(model)} gives logits that are NaN or infinite. Check the weights of its output head; only its bias "
            "can mask a token with -inf."
        )
    same_mask = torch.equal(own_BTV < MASKED_LOGIT, read_BTV < MASKED_LOGIT)
    if not same_mask or difference(read_BTV[0], own_BTV[0]) > tolerance:
        raise _UnfitModel(
            f"{_name(model)} gives other logits than its output head (get_output_embeddings) computes from its last hidden "
            f"states: it transforms them in an unknown way. {advice}"
        )


def _name(model: nn.Module) -> str:
    return type(causal_model(model)).__name__
