"""The method's numbers, computed another way: float64, one number at a time, nothing shared with the package."""

import math

import torch


def divergence_nats(student_logits, teacher_logits, beta: float, temperature: float = 1.0):
    """Divergence at one position; logits are sequences of scalars (floats or float64 tensors that carry gradients)."""
    log_q = _log_softmax([logit / temperature for logit in student_logits])
    log_p = _log_softmax([logit / temperature for logit in teacher_logits])
    total = 0.0
    for log_q_v, log_p_v in zip(log_q, log_p, strict=True):
        q_v, p_v = _exp(log_q_v), _exp(log_p_v)
        if beta == 1.0:
            total = total + q_v * (log_q_v - log_p_v)
        elif beta == 0.0:
            total = total + p_v * (log_p_v - log_q_v)
        else:
            log_m_v = _log((1 - beta) * q_v + beta * p_v)
            total = total + beta * p_v * (log_p_v - log_m_v) + (1 - beta) * q_v * (log_q_v - log_m_v)
    return total


def entropy_nats(logits, temperature: float = 1.0):
    """Entropy of the softmax at one position."""
    return -sum(_exp(log_q) * log_q for log_q in _log_softmax([logit / temperature for logit in logits]))


def topk_overlap(student_logits, teacher_logits, k: int = 16, temperature: float = 1.0) -> float:
    """Mean of both models' probability on the tokens that are among the k most likely ones of both, at one position."""
    log_q = _log_softmax([logit / temperature for logit in student_logits])
    log_p = _log_softmax([logit / temperature for logit in teacher_logits])
    vocabulary = range(len(log_q))
    top_q = sorted(vocabulary, key=lambda v: -log_q[v])[:k]
    top_p = sorted(vocabulary, key=lambda v: -log_p[v])[:k]
    common = [v for v in vocabulary if v in top_q and v in top_p]
    return (sum(_exp(log_q[v]) for v in common) + sum(_exp(log_p[v]) for v in common)) / 2


def mean_loss(divergences: list[list], masks: list[list[int]], normalization: str):
    """Loss of a global batch: one list of per-token divergences, and of mask values, for each rollout."""
    if normalization == "token":
        total, count = 0.0, 0
        for rollout, mask in zip(divergences, masks, strict=True):
            for value, in_loss in zip(rollout, mask, strict=True):
                if in_loss:
                    total, count = total + value, count + 1
        return total / count
    total, rollouts = 0.0, 0
    for rollout, mask in zip(divergences, masks, strict=True):
        values = [value for value, in_loss in zip(rollout, mask, strict=True) if in_loss]
        if values:
            total, rollouts = total + sum(values) / len(values), rollouts + 1
    return total / rollouts


def completion_logits(model, prompt_ids: list[int], completion_ids: list[int]):
    """Logits that predict each completion token, [T, V] float64, of one unpadded sequence through the model's forward."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(input_ids=ids).logits[0]
    return logits[len(prompt_ids) - 1 : -1]


def _log_softmax(logits):
    largest = max(logit.item() if isinstance(logit, torch.Tensor) else logit for logit in logits)
    log_sum = _log(sum(_exp(logit - largest) for logit in logits)) + largest
    return [logit - log_sum for logit in logits]


def _exp(x):
    return x.exp() if isinstance(x, torch.Tensor) else math.exp(x)


def _log(x):
    return x.log() if isinstance(x, torch.Tensor) else math.log(x)
