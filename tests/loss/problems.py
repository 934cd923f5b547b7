"""Small problems for the fused loss, and their solutions by float64 loops and by full logits."""

import math
from typing import NamedTuple

import torch

from tests.oracles import divergence_nats, entropy_nats
from trl_crisp.loss import kernel, kernel_torch
from trl_crisp.loss.divergence import OutputHead

B, T, H, V = 2, 4, 5, 11
MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]])
BETAS = [0.0, 0.3, 1.0]
HALVES = [torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    """Rollouts of a micro-batch, [B, T]; the mask says which tokens are in the loss."""

    student_hidden: torch.Tensor
    student: OutputHead
    teacher_hidden: torch.Tensor
    teacher: OutputHead
    token_ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.student_hidden, *self.student[:2]) if x is not None and x.requires_grad]

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [leaf.grad for leaf in self.leaves]


def problem(
    dtype=torch.float32, bias=False, frozen=False, shape=(B, T, H, V), mask=MASK_BT, seed=1, **head
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    b, t, h, v = shape

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    student_hidden, weight = draw(b, t, h).requires_grad_(), draw(v, h).requires_grad_(not frozen)
    student_bias = draw(v).requires_grad_(not frozen) if bias else None
    return Problem(
        student_hidden,
        OutputHead(weight, student_bias, **head),
        (student_hidden.detach() + draw(b, t, h, scale=0.5)).to(dtype),
        OutputHead((weight.detach() + draw(v, h, scale=0.3)).to(dtype), draw(v) if bias else None, **head),
        torch.randint(0, v, (b, t), generator=generator),
        mask,
        torch.rand(b, t, generator=generator),
    )


def padded_loss(given: Problem, beta: float, temperature: float) -> tuple[torch.Tensor, kernel_torch.TokenValues]:
    """The fused loss of the tokens in the mask, with their values as [B, T], zero where the mask is zero."""
    in_loss = given.mask != 0
    loss, values = kernel.fused_loss(
        given.student_hidden[in_loss],
        given.student,
        given.teacher_hidden[in_loss],
        given.teacher,
        given.token_ids[in_loss],
        given.weights[in_loss],
        beta,
        temperature,
    )
    zeros = torch.zeros(in_loss.shape, device=loss.device)
    return loss, kernel_torch.TokenValues(*(zeros.masked_scatter(in_loss, value) for value in values))


def loop_logits(hidden_H, head: OutputHead):
    logits = []
    for v in range(len(head.weight_VH)):
        logit = sum(hidden_H[h] * head.weight_VH[v][h] for h in range(len(hidden_H)))
        logit = (logit + (head.bias_V[v] if head.bias_V is not None else 0)) * head.logit_scale
        logits.append(head.softcap * torch.tanh(logit / head.softcap) if head.softcap else logit)
    return logits


def log_prob(logits, token: int, temperature: float) -> float:
    numbers = [logit.item() / temperature for logit in logits]
    return numbers[token] - math.log(sum(math.exp(number) for number in numbers))


def in_float64(head: OutputHead) -> OutputHead:
    return OutputHead(*(None if x is None else x.detach().double() for x in head[:2]), *head[2:])


class Truth(NamedTuple):
    values: list[torch.Tensor]  # each [B, T], in the order of TokenValues
    loss: torch.Tensor
    leaves: list[torch.Tensor]


def truth_of(given: Problem, beta, temperature) -> Truth:
    """Loops in float64; the gradients are in the leaves' `grad`."""
    leaves = [x.detach().double().requires_grad_() if x is not None else None for x in (given[0], *given[1][:2])]
    student = OutputHead(*leaves[1:], *given.student[2:])
    teacher = in_float64(given.teacher)
    b, t = given.mask.shape
    values = [torch.zeros(b, t, dtype=torch.float64) for _ in kernel_torch.TokenValues._fields]
    loss = torch.zeros((), dtype=torch.float64)
    for i, j in given.mask.nonzero().tolist():
        q = loop_logits(leaves[0][i, j], student)
        p = loop_logits(given.teacher_hidden[i, j].double(), teacher)
        divergence = divergence_nats(q, p, beta, temperature)
        loss = loss + given.weights[i, j].double() * divergence
        token = int(given.token_ids[i, j])
        numbers = (
            divergence,
            entropy_nats(q, temperature),
            entropy_nats(p, temperature),
            divergence_nats(q, p, 1.0, temperature),
            log_prob(q, token, temperature),
            log_prob(p, token, temperature),
        )
        for value, number in zip(values, numbers, strict=True):
            value[i, j] = number.item() if isinstance(number, torch.Tensor) else number
    if loss.requires_grad:
        loss.backward()
    return Truth(values, loss.detach(), [leaf for leaf in leaves if leaf is not None])


def chunks_of(monkeypatch, tokens: int, vocab: int = V, block_tokens: int = 2) -> None:
    monkeypatch.setattr(kernel, "CPU_CHUNK_TOKENS", tokens)
    monkeypatch.setattr(kernel_torch, "BLOCK_LOGITS", block_tokens * vocab)


def assert_equals(given: Problem, result, truth: Truth) -> None:
    loss, values = result
    for name, value, expected in zip(values._fields, values, truth.values, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not value.requires_grad
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=2e-6)
    loss.backward()
    for leaf, expected in zip(given.leaves, truth.leaves, strict=False):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=5e-6)


def plain_loss(given: Problem, beta: float, temperature: float) -> torch.Tensor:
    """Full logits in the inputs' dtype, as without any kernel."""

    def log_probs(hidden, head):
        logits = hidden @ head.weight_VH.T
        logits = logits if head.bias_V is None else logits + head.bias_V
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)

    log_q, log_p = log_probs(*given[:2]), log_probs(*given[2:4]).detach()
    if beta == 0.0:
        divergence = log_p.exp() * (log_p - log_q)
    elif beta == 1.0:
        divergence = log_q.exp() * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
        divergence = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return (divergence.sum(-1) * given.weights * given.mask).sum()


def copied(given: Problem, dtype=None) -> Problem:
    def copy(x):
        return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad)

    return given._replace(
        student_hidden=copy(given.student_hidden),
        student=OutputHead(*map(copy, given.student[:2]), *given.student[2:]),
        teacher_hidden=copy(given.teacher_hidden),
        teacher=OutputHead(*map(copy, given.teacher[:2]), *given.teacher[2:]),
    )


WIDE = {"shape": (3, 100, 16, 300), "mask": (torch.arange(300).view(3, 100) % 7 != 0).long()}


def masked_problem(mask_value: float, student_ids: list[int], teacher_ids: list[int], dtype=torch.float32) -> Problem:
    given = problem(dtype, bias=True)
    for side, ids in ((given.student, student_ids), (given.teacher, teacher_ids)):
        side.bias_V.data[ids] = mask_value
    return given
