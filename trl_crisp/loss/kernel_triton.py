"""
The elementwise part of the fused loss as a Triton kernel, for GPUs. [`~trl_crisp.loss.kernel_torch.fold`] is the same in plain torch.

One program reads a token's logits of both models twice (three times for the generalized JSD) and writes its values and gradient. It is
tested by Triton's interpreter on a CPU.
"""

import torch
import triton
import triton.language as tl

from trl_crisp.loss.kernel_torch import LARGEST_LOG_RATIO, TokenValues, Transform

# Logits that a program holds at once, and its warps. Our choice, not measured: 16 values a thread and model
_BLOCK_LOGITS = 4096
_WARPS = 8

_FORWARD_KL, _REVERSE_KL, _JSD = 0, 1, 2


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
    """As [`~trl_crisp.loss.kernel_torch.fold`], but `teacher_CV` is not overwritten, and `gradient_CV` may have half precision."""
    num_tokens, vocab_size = student_CV.shape
    values_6C = student_CV.new_empty((len(TokenValues._fields), num_tokens))
    if num_tokens:
        _fold_kernel[(num_tokens,)](
            student_CV,
            student_CV.stride(0),
            teacher_CV,
            teacher_CV.stride(0),
            token_ids_C,
            student_CV if gradient_CV is None else gradient_CV,
            0 if gradient_CV is None else gradient_CV.stride(0),
            student_CV if factors_C is None else factors_C,
            values_6C,
            num_tokens,
            vocab_size,
            float(student_transform.scale),
            float(student_transform.softcap or 1.0),
            float(teacher_transform.scale),
            float(teacher_transform.softcap or 1.0),
            1 / temperature,
            float(beta),
            MODE=_FORWARD_KL if beta == 0.0 else _REVERSE_KL if beta == 1.0 else _JSD,
            STUDENT_HAS_SOFTCAP=student_transform.softcap is not None,
            TEACHER_HAS_SOFTCAP=teacher_transform.softcap is not None,
            HAS_GRADIENT=gradient_CV is not None,
            HAS_FACTORS=factors_C is not None,
            LARGEST_LOG_RATIO=LARGEST_LOG_RATIO,
            BLOCK=min(_BLOCK_LOGITS, triton.next_power_of_2(vocab_size)),
            num_warps=_WARPS,
        )
    return TokenValues(*values_6C)


@triton.jit
def _transform(logits, scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    logits = logits.to(tl.float32) * scale
    if HAS_SOFTCAP:
        # tanh(x) = 2 * sigmoid(2 * x) - 1
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits * inverse_temperature


@triton.jit
def _log_mixture_over_student(gap, beta):
    # log m - log q for the gap log p - log q. Exactly 0 if the gap is
    return tl.log(1 + beta * (tl.exp(gap) - 1))


@triton.jit
def _fold_kernel(
    student_ptr,
    student_stride,
    teacher_ptr,
    teacher_stride,
    token_ids_ptr,
    gradient_ptr,
    gradient_stride,
    factors_ptr,
    values_ptr,
    num_tokens,
    vocab_size,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    inverse_temperature,
    beta,
    MODE: tl.constexpr,
    STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    LARGEST_LOG_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + token * student_stride
    teacher_row = teacher_ptr + token * teacher_stride

    # First reading: both normalizers, and sums weighted by exp(logit - largest so far)
    student_max, teacher_max = -float("inf"), -float("inf")
    student_sum, teacher_sum = 0.0, 0.0
    student_dot, teacher_dot = 0.0, 0.0
    student_gap, teacher_gap = 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < vocab_size
        student = tl.load(student_row + offsets, mask=mask, other=0.0)
        student = _transform(student, student_scale, student_softcap, inverse_temperature, STUDENT_HAS_SOFTCAP)
        teacher = tl.load(teacher_row + offsets, mask=mask, other=0.0)
        teacher = _transform(teacher, teacher_scale, teacher_softcap, inverse_temperature, TEACHER_HAS_SOFTCAP)
        gap = tl.where(mask, student - teacher, 0.0)

        new_max = tl.maximum(student_max, tl.max(tl.where(mask, student, -float("inf")), axis=0))
        rescale = tl.exp(student_max - new_max)
        weights = tl.where(mask, tl.exp(student - new_max), 0.0)
        student_sum = student_sum * rescale + tl.sum(weights, axis=0)
        student_dot = student_dot * rescale + tl.sum(weights * student, axis=0)
        student_gap = student_gap * rescale + tl.sum(weights * gap, axis=0)
        student_max = new_max

        new_max = tl.maximum(teacher_max, tl.max(tl.where(mask, teacher, -float("inf")), axis=0))
        rescale = tl.exp(teacher_max - new_max)
        weights = tl.where(mask, tl.exp(teacher - new_max), 0.0)
        teacher_sum = teacher_sum * rescale + tl.sum(weights, axis=0)
        teacher_dot = teacher_dot * rescale + tl.sum(weights * teacher, axis=0)
        teacher_gap = teacher_gap * rescale + tl.sum(weights * gap, axis=0)
        teacher_max = new_max
    student_log_sum = student_max + tl.log(student_sum)
    teacher_log_sum = teacher_max + tl.log(teacher_sum)
    log_sum_gap = student_log_sum - teacher_log_sum
    reverse_kl = student_gap / student_sum - log_sum_gap
    divergence = reverse_kl
    if MODE == 0:
        divergence = log_sum_gap - teacher_gap / teacher_sum

    student_kl = 0.0
    if MODE == 2:
        # Second reading: the mixture needs both normalizers
        teacher_kl = 0.0
        for start in range(0, vocab_size, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < vocab_size
            student = tl.load(student_row + offsets, mask=mask, other=0.0)
            student = _transform(student, student_scale, student_softcap, inverse_temperature, STUDENT_HAS_SOFTCAP)
            teacher = tl.load(teacher_row + offsets, mask=mask, other=0.0)
            teacher = _transform(teacher, teacher_scale, teacher_softcap, inverse_temperature, TEACHER_HAS_SOFTCAP)
            log_q, log_p = student - student_log_sum, teacher - teacher_log_sum
            gap = tl.minimum(tl.maximum(log_p - log_q, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
            log_ratio = _log_mixture_over_student(gap, beta)
            student_kl -= tl.sum(tl.where(mask, tl.exp(log_q) * log_ratio, 0.0), axis=0)
            teacher_kl += tl.sum(tl.where(mask, tl.exp(log_p) * (gap - log_ratio), 0.0), axis=0)
        divergence = beta * teacher_kl + (1 - beta) * student_kl

    sampled = tl.load(token_ids_ptr + token)
    student_sampled = _transform(
        tl.load(student_row + sampled), student_scale, student_softcap, inverse_temperature, STUDENT_HAS_SOFTCAP
    )
    teacher_sampled = _transform(
        tl.load(teacher_row + sampled), teacher_scale, teacher_softcap, inverse_temperature, TEACHER_HAS_SOFTCAP
    )
    # In the order of TokenValues
    tl.store(values_ptr + token, divergence)
    tl.store(values_ptr + num_tokens + token, student_log_sum - student_dot / student_sum)
    tl.store(values_ptr + 2 * num_tokens + token, teacher_log_sum - teacher_dot / teacher_sum)
    tl.store(values_ptr + 3 * num_tokens + token, reverse_kl)
    tl.store(values_ptr + 4 * num_tokens + token, student_sampled - student_log_sum)
    tl.store(values_ptr + 5 * num_tokens + token, teacher_sampled - teacher_log_sum)

    if HAS_GRADIENT:
        # Last reading. A block is read before it is written, so the gradient may replace the student's logits
        factor = 1.0
        if HAS_FACTORS:
            factor = tl.load(factors_ptr + token)
        gradient_row = gradient_ptr + token * gradient_stride
        for start in range(0, vocab_size, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < vocab_size
            student = tl.load(student_row + offsets, mask=mask, other=0.0)
            student = _transform(student, student_scale, student_softcap, inverse_temperature, STUDENT_HAS_SOFTCAP)
            teacher = tl.load(teacher_row + offsets, mask=mask, other=0.0)
            teacher = _transform(teacher, teacher_scale, teacher_softcap, inverse_temperature, TEACHER_HAS_SOFTCAP)
            log_q, log_p = student - student_log_sum, teacher - teacher_log_sum
            q = tl.exp(log_q)
            if MODE == 0:
                gradient = q - tl.exp(log_p)
            elif MODE == 1:
                gradient = q * (log_q - log_p - reverse_kl)
            else:
                gap = tl.minimum(tl.maximum(log_p - log_q, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
                gradient = (beta - 1) * q * (_log_mixture_over_student(gap, beta) + student_kl)
            gradient = gradient * factor
            if STUDENT_HAS_SOFTCAP:
                capped = student / (student_softcap * inverse_temperature)
                gradient = gradient * (1 - capped * capped)
            tl.store(gradient_row + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
