"""The elementwise part of the fused loss in plain torch. [`~trl_crisp.loss.kernel_triton.fold`] is the same for GPUs.

Shape suffixes: C tokens of a chunk, R tokens of a block of the chunk, V vocabulary.
"""

from typing import NamedTuple

import torch

# Logits of a block. All operations on a block come before the next block's, so that its tensors stay in the cache. Our choice:
# 1 MiB a tensor in float32; smaller blocks were not faster.
BLOCK_LOGITS = 2**18
# exp(-80) is 2e-35, which adds nothing to a sum of probabilities in float32, and expm1(80) is still finite
LARGEST_LOG_RATIO = 80.0


class Transform(NamedTuple):
    """From a head's products to logits: `softcap * tanh(scale * x / softcap)`. The temperature comes afterwards."""

    scale: float
    softcap: float | None


class TokenValues(NamedTuple):
    """What the pass knows of each token: float32, in nats, without a gradient, all of one shape."""

    divergence: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    reverse_kl: torch.Tensor
    # Of the sampled token
    student_log_prob: torch.Tensor
    teacher_log_prob: torch.Tensor


def fold(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    token_ids_C: torch.Tensor,
    student_transform: Transform,
    teacher_transform: Transform,
    temperature: float,
    beta: float,
    gradient_CV: torch.Tensor | None,
    factors_C: torch.Tensor | None = None,
) -> TokenValues:
    """
    Return the values of a chunk's tokens, and write the gradient.

    Args:
        student_CV, teacher_CV: The heads' products with their biases, float32, finite. Both are overwritten.
        token_ids_C: The sampled tokens.
        student_transform, teacher_transform: See [`Transform`].
        temperature, beta: See [`~trl_crisp.loss.divergence.per_token_divergence`].
        gradient_CV: Gets the gradient of each token's divergence with respect to `student_CV`, times the token's factor and
            without the factor scale / temperature. It may be `student_CV` itself. If `None`, there is no gradient.
        factors_C: If `None`, all are 1.
    """
    num_tokens, vocab_size = student_CV.shape
    rows = min(max(1, BLOCK_LOGITS // vocab_size), max(1, num_tokens))
    values_6C = student_CV.new_empty((len(TokenValues._fields), num_tokens))
    scratch_3RV = student_CV.new_empty((2 if beta == 1.0 else 3, rows, vocab_size))
    for start in range(0, num_tokens, rows):
        block = slice(start, min(start + rows, num_tokens))
        scratch = scratch_3RV[:, : block.stop - start]
        student_RV, teacher_RV = student_CV[block], teacher_CV[block]
        needs_gradient = gradient_CV is not None
        slope_RV = _transform_(student_RV, student_transform, temperature, needs_gradient)
        _transform_(teacher_RV, teacher_transform, temperature, False)
        gradient_RV = _fold_block(
            TokenValues(*values_6C[:, block]),
            student_RV,
            teacher_RV,
            token_ids_C[block],
            beta,
            needs_gradient,
            scratch,
        )
        if gradient_CV is None or gradient_RV is None:
            continue
        if slope_RV is not None:
            gradient_RV.mul_(slope_RV)
        if factors_C is not None:
            gradient_RV.mul_(factors_C[block, None])
        gradient_CV[block].copy_(gradient_RV)
    return TokenValues(*values_6C)


def _transform_(
    logits_RV: torch.Tensor, transform: Transform, temperature: float, needs_slope: bool
) -> torch.Tensor | None:
    # Returns the derivative of the soft-capping
    scale, softcap = transform
    if softcap is None:
        if scale != temperature:
            logits_RV.mul_(scale / temperature)
        return None
    capped_RV = logits_RV.mul_(scale / softcap).tanh_()
    slope_RV = 1 - capped_RV.square() if needs_slope else None
    capped_RV.mul_(softcap / temperature)
    return slope_RV


def _fold_block(
    values: TokenValues,
    student_RV: torch.Tensor,
    teacher_RV: torch.Tensor,
    token_ids_R: torch.Tensor,
    beta: float,
    needs_gradient: bool,
    scratch: torch.Tensor,
) -> torch.Tensor | None:
    # Few tensors, written over and over: on a CPU this is faster than new ones
    log_q, log_p = scratch[0], scratch[1]
    torch.log_softmax(student_RV, -1, out=log_q)
    torch.log_softmax(teacher_RV, -1, out=log_p)
    for log_prob_R, log_probs_RV in ((values.student_log_prob, log_q), (values.teacher_log_prob, log_p)):
        log_prob_R.copy_(log_probs_RV.gather(1, token_ids_R[:, None])[:, 0])
    q, p = torch.exp(log_q, out=student_RV), torch.exp(log_p, out=teacher_RV)

    # Equal models give exactly 0: their log-probabilities went through the same operations
    if beta == 1.0:
        torch.sum(p.mul_(log_p), -1, out=values.teacher_entropy).neg_()
        gap = torch.sub(log_q, log_p, out=log_p)
        torch.sum(log_q.mul_(q), -1, out=values.student_entropy).neg_()
        terms = torch.mul(q, gap, out=log_q)
        torch.sum(terms, -1, out=values.reverse_kl)
        values.divergence.copy_(values.reverse_kl)
        # q * (log q - log p - KL)
        return terms.addcmul_(q, values.reverse_kl[:, None], value=-1) if needs_gradient else None

    gap = torch.sub(log_p, log_q, out=scratch[2])
    torch.sum(log_q.mul_(q), -1, out=values.student_entropy).neg_()
    torch.sum(log_p.mul_(p), -1, out=values.teacher_entropy).neg_()
    torch.sum(torch.mul(q, gap, out=log_q), -1, out=values.reverse_kl).neg_()
    if beta == 0.0:
        torch.sum(torch.mul(p, gap, out=log_p), -1, out=values.divergence)
        return q.sub_(p) if needs_gradient else None

    # With m the mixture: log m - log q = log1p(beta * (p / q - 1)), and log p - log m = gap - that
    gap.clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    log_m_over_q = torch.expm1(gap, out=log_q).mul_(beta).log1p_()
    torch.sum(p.mul_(gap.sub_(log_m_over_q)), -1, out=values.divergence)
    terms = torch.mul(q, log_m_over_q, out=log_p)
    student_kl_R = terms.sum(-1).neg_()
    values.divergence.mul_(beta).add_(student_kl_R, alpha=1 - beta)
    # (1 - beta) * q * (log q - log m - KL(q || m))
    return terms.addcmul_(q, student_kl_R[:, None]).mul_(beta - 1) if needs_gradient else None
