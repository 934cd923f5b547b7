"""Divergences between student and teacher, one number per token, from hidden states and output heads.

Shape suffixes: B rollouts of a micro-batch, T completion positions, N tokens in the loss, H hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from trl_crisp._upstream import ChunkedDivergenceFunction, maybe_gather_lm_head_ctx

# Tokens per call of the kernel on a CPU, where it allocates several [tokens, 32768] float32 temporaries. Our choice: down to
# this number the kernel is not slower, and fewer tokens need less memory.
CPU_SLICE_TOKENS = 256
# Tokens of a micro-batch that the overlap of the two models' top tokens is measured on. Our choice: 256 would take
# some percent of a small micro-batch's time on a CPU, and 32 take an eighth of that; their logits (40 MB with 150,000 tokens of
# vocabulary) exist at once.
OVERLAP_TOKENS = 32
# As in Rethinking OPD (arXiv 2604.13016)
OVERLAP_TOP_K = 16
# A token with a logit below this has probability 0 in float32, so it adds no divergence. Our choice: masks (-1e4 and below,
# such as finfo.min or -inf) are below it, and a model's unmasked logits are not.
MASKED_LOGIT = -9e3
# Lower biases are raised to this for the kernel, because -inf gives NaN (0 * inf), and so does finfo.min at a temperature below 1.
_LOWEST_BIAS = -1e30


class OutputHead(NamedTuple):
    """How a model turns hidden states into logits: `softcap * tanh(scale * (h @ weight.T + bias) / softcap)`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class Diagnostic(NamedTuple):
    """A sum over tokens of a micro-batch and the number of tokens. Both are summed over processes before dividing."""

    total: torch.Tensor
    num_tokens: torch.Tensor


def output_head(model: torch.nn.Module, dtype: torch.dtype) -> OutputHead:
    """
    Return a causal language model's output head, with the logit scale and soft-capping of its config, which TRL also reads.

    Args:
        model: An unwrapped transformers model, or a PEFT model without an adapter on the head.
        dtype: Dtype of the hidden states. A head that FSDP2 shards is gathered once and cast to this dtype.

    Returns:
        The head. Under ZeRO-3 its tensors may be empty: the kernel gathers them.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    if isinstance(weight_VH, DTensor):
        weight_VH = weight_VH.full_tensor().to(dtype)
        bias_V = bias_V.full_tensor() if isinstance(bias_V, DTensor) else bias_V
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return OutputHead(weight_VH, bias_V, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config) -> float:
    # The names of a factor in the configs of Cohere, Muse Glimmer and Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        # Granite and MiniCPM3 divide by this value, HyperCLOVA X multiplies by it
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0


def logits_of(hidden_BTH: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Return a head's logits, [B, T, V] in float32, as the loss computes them. Use it for few positions: it is one tensor."""
    logits_BTV = (hidden_BTH.to(head.weight_VH.dtype) @ head.weight_VH.T).float()
    if head.bias_V is not None:
        logits_BTV = logits_BTV + head.bias_V.float()
    logits_BTV = logits_BTV * head.logit_scale
    return logits_BTV if head.softcap is None else head.softcap * torch.tanh(logits_BTV / head.softcap)


@contextmanager
def gathered(*heads: OutputHead) -> Iterator[None]:
    """Gather heads that ZeRO-3 partitions, for all that reads them inside. Heads that are gathered already stay so."""
    with ExitStack() as stack:
        for head in heads:
            # One context each, because a teacher may share the student's head
            stack.enter_context(maybe_gather_lm_head_ctx(*head[:2]))  # type: ignore[arg-type]
        yield


def per_token_divergence(
    student_hidden_BTH: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_BTH: torch.Tensor,
    teacher_head: OutputHead,
    loss_mask_BT: torch.Tensor,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the full-vocabulary divergence and the student's entropy at each token.

    TRL's chunked kernel projects the tokens in tiles, so no [tokens, vocabulary] tensor of the whole batch exists.
    Gradients flow to the student's hidden states and head only. A token that the biases of both heads mask with -inf has no
    probability and adds no divergence.

    Args:
        student_hidden_BTH, teacher_hidden_BTH: Last hidden states that predict the completion's tokens. Both models see
            the same completion, so the positions align although the prompts differ.
        student_head, teacher_head: See [`output_head`].
        loss_mask_BT: 1 where a token is in the loss, else 0.
        beta: 1 for the reverse KL(student || teacher), 0 for the forward KL(teacher || student), in between the
            generalized JSD with mixture (1 - beta) * student + beta * teacher.
        temperature: Softmax temperature of both distributions.

    Returns:
        The divergence and the student's entropy, both [B, T] in nats, float32, zero where the mask is zero.

    Raises:
        ValueError: If the divergence is infinite: with beta 1 if the teacher's bias masks a token that the student can generate,
            with beta 0 if the student's bias masks a token that the teacher can generate.
    """
    refuse_infinite(student_head, teacher_head, beta)
    in_loss_BT = loss_mask_BT != 0
    divergence_N, entropy_N = _divergence(
        student_hidden_BTH[in_loss_BT], student_head, teacher_hidden_BTH[in_loss_BT], teacher_head, beta, temperature
    )
    zeros_BT = torch.zeros(in_loss_BT.shape, device=divergence_N.device)
    # masked_scatter keeps a micro-batch without any token in the loss connected to the model's parameters
    return zeros_BT.masked_scatter(in_loss_BT, divergence_N), zeros_BT.masked_scatter(in_loss_BT, entropy_N)


@torch.no_grad()
def sampled_topk_overlap(
    student_hidden_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_NH: torch.Tensor,
    teacher_head: OutputHead,
    temperature: float,
) -> Diagnostic:
    """
    Return the overlap of the models' top tokens ([`topk_overlap_of`]) over at most 32 tokens of the loss, evenly spaced.

    Args:
        student_hidden_NH, teacher_hidden_NH: Last hidden states that predict the tokens in the loss.
        student_head, teacher_head, temperature: As in [`per_token_divergence`].
    """
    tokens_N = evenly_spaced(torch.arange(len(student_hidden_NH), device=student_hidden_NH.device), OVERLAP_TOKENS)
    sides = (student_hidden_NH, student_head), (teacher_hidden_NH, teacher_head)
    with gathered(student_head, teacher_head):
        student_NV, teacher_NV = (logits_of(hidden_NH[tokens_N][None], head)[0] for hidden_NH, head in sides)
    overlap_N = topk_overlap_of(student_NV, teacher_NV, temperature)
    return Diagnostic(overlap_N.sum(), torch.full((), len(overlap_N), device=overlap_N.device))


def evenly_spaced(items_N: torch.Tensor, limit: int) -> torch.Tensor:
    """Return at most `limit` of the items, evenly spaced over them."""
    if len(items_N) <= limit:
        return items_N
    return items_N[torch.linspace(0, len(items_N) - 1, limit, device=items_N.device).round().long()]


@torch.no_grad()
def topk_overlap_of(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Return how much probability the two models put on the tokens that are among the 16 most likely ones of both, [N], float32.

    With S the student's and T the teacher's 16 most likely tokens, it is half of the student's mass on S ∩ T plus half of the
    teacher's: 1 if all mass of both is on common tokens, 0 if the sets have no token in common. A measure of whether
    the teacher still reads the student's text as its own (arXiv 2604.13016).

    Args:
        student_logits_NV, teacher_logits_NV: Logits of the same positions.
        temperature: Softmax temperature of both distributions. It does not change the sets.
    """
    k = min(OVERLAP_TOP_K, student_logits_NV.size(-1))
    student_NK, teacher_NK = (
        logits_NV.topk(k, dim=-1).indices for logits_NV in (student_logits_NV, teacher_logits_NV)
    )
    # Which of the student's top tokens are the teacher's too. Both models' mass on the intersection is read at the student's
    common_NK = (student_NK[:, :, None] == teacher_NK[:, None, :]).any(dim=-1)
    masses_N = [
        (((logits_NV / temperature).log_softmax(dim=-1).gather(1, student_NK).exp()) * common_NK).sum(dim=-1)
        for logits_NV in (student_logits_NV, teacher_logits_NV)
    ]
    return (masses_N[0] + masses_N[1]) / 2


def _divergence(
    student_hidden_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_NH: torch.Tensor,
    teacher_head: OutputHead,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if student_hidden_NH.device.type == "cpu" and len(student_hidden_NH) > CPU_SLICE_TOKENS:
        sides = zip(student_hidden_NH.split(CPU_SLICE_TOKENS), teacher_hidden_NH.split(CPU_SLICE_TOKENS), strict=True)
        slices = [_divergence(q, student_head, p, teacher_head, beta, temperature) for q, p in sides]
        divergences, entropies = zip(*slices, strict=True)
        return torch.cat(divergences), torch.cat(entropies)
    return ChunkedDivergenceFunction.apply(
        student_hidden_NH,
        student_head.weight_VH,
        finite_bias(student_head.bias_V),
        teacher_hidden_NH,
        teacher_head.weight_VH,
        finite_bias(teacher_head.bias_V),
        beta,
        temperature,
        student_head.logit_scale,
        student_head.softcap,
        teacher_head.logit_scale,
        teacher_head.softcap,
    )


def finite_bias(bias_V: torch.Tensor | None) -> torch.Tensor | None:
    """Return a head's bias in float32, with values that are finite in products and at any temperature."""
    # Under ZeRO-3 the kernel gathers the bias. A bias that masks tokens was refused at the start
    if bias_V is None or hasattr(bias_V, "ds_id"):
        return bias_V
    return bias_V.float().clamp(min=_LOWEST_BIAS)


def refuse_infinite(student_head: OutputHead, teacher_head: OutputHead, beta: float) -> None:
    """Raise a `ValueError` if the biases make the divergence infinite ([`per_token_divergence`])."""
    if beta not in (0.0, 1.0):
        return
    sides = [("student", student_head), ("teacher", teacher_head)]
    (giver, giver_head), (masker, masker_head) = sides if beta == 1.0 else sides[::-1]
    masked_V = only_masked_by(masker_head, giver_head)
    if masked_V is not None and len(tokens := masked_V.nonzero()):
        raise ValueError(
            f"the divergence is infinite: the bias of the {masker}'s output head is -inf for {len(tokens)} tokens, such "
            f"as id {tokens[0].item()}, that the {giver} can generate. Mask the same tokens in both, or set beta between 0 "
            "and 1."
        )


def only_masked_by(head: OutputHead, other: OutputHead) -> torch.Tensor | None:
    """Return which tokens, [V], the bias of a head masks with -inf and another head does not mask; `None` if it can mask none."""
    if head.bias_V is None or hasattr(head.bias_V, "ds_id") or head.softcap is not None:
        # Soft-capping raises a masked logit to -softcap, so the token keeps a probability
        return None
    masked_V = torch.isneginf(head.bias_V)
    return masked_V if other.bias_V is None else masked_V & (other.bias_V > MASKED_LOGIT)
