"""The fused loss against float64 loops over the vocabulary, and against TRL's kernel: values, gradients, number of products."""

import math
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles import divergence_nats, entropy_nats
from trl_crisp.loss import kernel, kernel_torch
from trl_crisp.loss.divergence import OutputHead, per_token_divergence
from trl_crisp.loss.kernel import fused_loss

B, T, H, V = 2, 4, 5, 11
MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]])
BETAS = [0.0, 0.3, 1.0]
HALVES = [torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    """The first arguments of `fused_loss`."""

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
    monkeypatch.setattr(kernel, "CPU_CHUNK_LOGITS", tokens * vocab)
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


@pytest.mark.parametrize("chunk_tokens", [1, 3, 256])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("head", "temperature"),
    [
        ({}, 1.0),
        ({"frozen": True}, 2.5),
        ({"bias": True, "logit_scale": 0.25}, 1.0),
        ({"softcap": 1.5, "logit_scale": 2.0, "bias": True}, 0.7),
    ],
)
def test_values_and_gradients_equal_the_oracle(monkeypatch, beta, head, temperature, chunk_tokens):
    """Ragged masks, weights of each token, several chunks and blocks; zero where the mask is zero."""
    chunks_of(monkeypatch, chunk_tokens)
    given = problem(**head)
    assert_equals(given, fused_loss(*given, beta, temperature), truth_of(given, beta, temperature))


@pytest.mark.parametrize("chunk_tokens", [2, 256])
@pytest.mark.parametrize("beta", BETAS)
def test_each_side_has_its_own_scale_and_soft_capping(monkeypatch, beta, chunk_tokens):
    chunks_of(monkeypatch, chunk_tokens)
    given = problem(bias=True, logit_scale=2.0, softcap=1.5)
    given = given._replace(teacher=given.teacher._replace(logit_scale=0.5, softcap=None))
    assert_equals(given, fused_loss(*given, beta, 1.0), truth_of(given, beta, 1.0))


@pytest.mark.parametrize("chunk_tokens", [2, 256])
@pytest.mark.parametrize("beta", BETAS)
def test_a_tied_head_sums_both_of_its_gradients(monkeypatch, beta, chunk_tokens):
    """The weight is the embedding too, and the teacher's head is the very same tensor."""
    chunks_of(monkeypatch, chunk_tokens)
    made = problem()
    ids = made.token_ids.flip(1)

    def hidden(weight_VH):
        return torch.tanh(weight_VH[ids])

    weight = made.student.weight_VH
    head = OutputHead(weight)
    given = made._replace(
        student_hidden=hidden(weight), student=head, teacher_hidden=hidden(weight.detach() + 0.2), teacher=head
    )
    loss, _ = fused_loss(*given, beta, 1.0)
    loss.backward()

    wide = weight.detach().double().requires_grad_()
    hidden_BTH, expected = hidden(wide), 0.0
    fixed = in_float64(head)
    for i, j in MASK_BT.nonzero().tolist():
        q = loop_logits(hidden_BTH[i, j], OutputHead(wide))
        p = loop_logits(given.teacher_hidden[i, j].detach().double(), fixed)
        expected = expected + given.weights[i, j].double() * divergence_nats(q, p, beta)
    expected.backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1e-4, atol=5e-6)


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_is_no_worse_than_plain_half_precision(monkeypatch, dtype, beta, bias):
    """Against the float64 truth, loss and gradients are at most as far off as those from full logits in half precision."""
    chunks_of(monkeypatch, 64, 300, 5)
    monkeypatch.setattr(kernel, "CONVERTED_ROWS", 77)
    given = problem(dtype, bias=bias, **WIDE)
    wide, plain = copied(given, torch.float64), copied(given)
    losses = [fused_loss(*given, beta, 1.3)[0], plain_loss(plain, beta, 1.3), plain_loss(wide, beta, 1.3)]
    for loss in losses:
        loss.backward()
    ours, theirs, truth = losses
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-6 * truth
    for mine, other, expected in zip(given.gradients, plain.gradients, wide.gradients, strict=True):
        assert mine.dtype == dtype
        errors = [(gradient.double() - expected).norm() for gradient in (mine, other)]
        assert errors[0] <= errors[1]
        # The rounding of the result alone
        assert errors[0] <= torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_autocast_rounds_the_inputs_and_nothing_else(monkeypatch, dtype, beta):
    """As with inputs in that dtype, and the gradients come in float32, before rounding."""
    chunks_of(monkeypatch, 64, 300, 5)
    monkeypatch.setattr(kernel, "CONVERTED_ROWS", 77)
    given = problem(bias=True, **WIDE)
    with torch.autocast("cpu", dtype=dtype):
        loss, values = fused_loss(*given, beta, 1.0)
    loss.backward()
    rounded = copied(given, dtype)
    rounded = rounded._replace(
        student=rounded.student._replace(bias_V=copied(given).student.bias_V),
        teacher=rounded.teacher._replace(bias_V=given.teacher.bias_V),
    )
    expected, expected_values = fused_loss(*rounded, beta, 1.0)
    expected.backward()
    assert loss == expected
    assert all(torch.equal(*pair) for pair in zip(values, expected_values, strict=True))
    for gradient, expected_gradient in zip(given.gradients, rounded.gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.to(expected_gradient.dtype), expected_gradient)
        assert not torch.equal(gradient, gradient.to(dtype).float())


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.0, "logit_scale": 0.7}])
@pytest.mark.parametrize("beta", BETAS)
def test_it_equals_trls_kernel(monkeypatch, beta, head):
    """On 258 tokens, several chunks of ours and several slices of TRL's."""
    chunks_of(monkeypatch, 50, 300, 7)
    monkeypatch.setattr("trl_crisp.loss.divergence.CPU_SLICE_TOKENS", 100)
    given = problem(**WIDE, **head)
    other = copied(given)
    loss, values = fused_loss(*given, beta, 1.7)
    loss.backward()
    divergence, entropy = per_token_divergence(*other[:4], other.mask, beta, 1.7)
    (divergence * other.weights).sum().backward()
    torch.testing.assert_close(values.divergence, divergence.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.student_entropy, entropy, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(given.gradients, other.gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 256])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.0, "logit_scale": 0.7}])
@pytest.mark.parametrize("beta", [*BETAS, 0.999])
def test_equal_models_give_exactly_zero(monkeypatch, beta, head, chunk_tokens, dtype):
    """The identity of the method without an instruction, before the first step."""
    chunks_of(monkeypatch, chunk_tokens, 300)
    given = problem(dtype, **WIDE, **head)
    given = given._replace(teacher_hidden=given.student_hidden.detach(), teacher=given.student)
    loss, values = fused_loss(*given, beta, 0.9)
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(values.divergence) == torch.count_nonzero(values.reverse_kl) == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)
    assert torch.equal(values.student_entropy, values.teacher_entropy)
    assert torch.equal(values.student_log_prob, values.teacher_log_prob)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_a_micro_batch_without_tokens_gives_zero_and_zero_gradients(beta, bias):
    """And it stays connected to the parameters, so that backward works."""
    given = problem(bias=bias, mask=torch.zeros(B, T))
    loss, values = fused_loss(*given, beta, 1.0)
    loss.backward()
    assert loss == 0
    assert all(value.shape == (B, T) and torch.count_nonzero(value) == 0 for value in values)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("dtype", HALVES)
def test_tokens_of_zero_weight_have_values_and_no_gradient(dtype):
    given = problem(dtype)._replace(weights=torch.zeros(B, T))
    loss, values = fused_loss(*given, 1.0, 1.0)
    loss.backward()
    assert loss == 0
    assert ((values.divergence > 0) == (MASK_BT != 0)).all()
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_in_float16_survives_a_loss_scaler(beta):
    """Weights of a large batch make gradients below float16's smallest number; the scaled backward keeps them."""
    given = problem(torch.float16)
    given = given._replace(weights=given.weights * 1e-9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    loss, _ = fused_loss(*given, beta, 1.0)
    scaler.scale(loss).backward()
    truth = truth_of(given, beta, 1.0)
    for gradient, expected in zip(given.gradients, truth.leaves, strict=True):
        assert torch.count_nonzero(expected.grad.half()) == 0, "the test is of gradients that float16 cannot hold"
        expected_scaled = expected.grad * 2.0**24
        torch.testing.assert_close(
            gradient.double(), expected_scaled, rtol=1e-3, atol=1e-3 * expected_scaled.abs().max()
        )


def test_a_factor_on_the_loss_scales_the_gradients():
    given, other = problem(bias=True), problem(bias=True)
    fused_loss(*given, 1.0, 1.0)[0].backward()
    (fused_loss(*other, 1.0, 1.0)[0] * 0.125 + 3).backward()
    for gradient, scaled in zip(given.gradients, other.gradients, strict=True):
        assert torch.equal(gradient * 0.125, scaled)


def test_a_second_backward_is_an_error():
    """A gradient of zeros, or a scaled one, would be a wrong number."""
    loss, _ = fused_loss(*problem(), 1.0, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        loss.backward()


def masked_problem(mask_value: float, student_ids: list[int], teacher_ids: list[int], dtype=torch.float32) -> Problem:
    given = problem(dtype, bias=True)
    for side, ids in ((given.student, student_ids), (given.teacher, teacher_ids)):
        side.bias_V.data[ids] = mask_value
    return given


@pytest.mark.parametrize("mask_value", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk_tokens", [256, 1])
def test_masked_tokens_carry_nothing(monkeypatch, beta, temperature, mask_value, chunk_tokens):
    """Values and gradients are those of the vocabulary without them; theirs are zero."""
    chunks_of(monkeypatch, chunk_tokens)
    ids, kept = [2, 7], [v for v in range(V) if v not in (2, 7)]
    given = masked_problem(mask_value, ids, ids)
    # The sampled tokens are not masked ones
    given = given._replace(token_ids=torch.tensor(kept)[given.token_ids % len(kept)])
    smaller = given._replace(
        student=OutputHead(*(x[kept] for x in given.student[:2])),
        teacher=OutputHead(*(x[kept] for x in given.teacher[:2])),
        token_ids=torch.tensor([[kept.index(v) for v in row] for row in given.token_ids.tolist()]),
    )
    truth = truth_of(smaller, beta, temperature)
    loss, values = fused_loss(*given, beta, temperature)
    for value, expected in zip(values, truth.values, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)
    loss.backward()
    torch.testing.assert_close(given.student_hidden.grad.double(), truth.leaves[0].grad, rtol=1e-4, atol=5e-6)
    for leaf, expected in zip(given.student[:2], truth.leaves[1:], strict=True):
        torch.testing.assert_close(leaf.grad[kept].double(), expected.grad, rtol=1e-4, atol=5e-6)
        assert torch.count_nonzero(leaf.grad[ids]) == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_masks_of_half_precision_carry_nothing(dtype, beta):
    given = masked_problem(-torch.inf, [2, 7], [2, 7], dtype)
    loss, values = fused_loss(*given, beta, 0.7)
    assert all(torch.isfinite(value).all() for value in values[:4])
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in given.gradients)


@pytest.mark.parametrize(("beta", "masked"), [(0.0, "teacher"), (0.3, "teacher"), (0.3, "student"), (1.0, "student")])
def test_a_token_that_one_side_masks_counts_if_the_divergence_is_finite(beta, masked):
    """Its term is the other side's mass on the mixture, or zero. The reverse KL is infinite if the teacher masks."""
    sides = ([2] if masked == "student" else [], [2] if masked == "teacher" else [])
    given, low = masked_problem(-torch.inf, *sides), masked_problem(-1e4, *sides)
    truth = truth_of(low, beta, 1.0)
    loss, values = fused_loss(*given, beta, 1.0)
    torch.testing.assert_close(values.divergence.double(), truth.values[0], rtol=1e-5, atol=2e-6)
    in_loss = values.reverse_kl[MASK_BT != 0]
    assert in_loss.isinf().all() if masked == "teacher" else torch.isfinite(in_loss).all()
    assert torch.count_nonzero(values.reverse_kl[MASK_BT == 0]) == 0
    loss.backward()
    torch.testing.assert_close(given.student_hidden.grad.double(), truth.leaves[0].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("beta", "masked", "other"), [(0.0, "student", "teacher"), (1.0, "teacher", "student")])
def test_an_infinite_divergence_is_an_error(beta, masked, other):
    given = masked_problem(-torch.inf, [2] if masked == "student" else [], [2] if masked == "teacher" else [])
    with pytest.raises(ValueError, match=f"infinite: the bias of the {masked}'s .* id 2, that the {other}"):
        fused_loss(*given, beta, 1.0)


class Operations(TorchDispatchMode):
    """Counts products of matrices, and keeps the size of the largest tensor that an operation gave."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += str(func.overloadpacket) in ("aten.mm", "aten.addmm", "aten.addmm_", "aten.bmm")
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("frozen", "needs_gradient", "products"), [(False, True, 4), (True, True, 3), (False, False, 2)]
)
def test_products_with_the_vocabulary(beta, frozen, needs_gradient, products):
    """4 in forward and backward together, 3 with a frozen head, 2 in an evaluation."""
    given = problem(frozen=frozen, **WIDE)
    with Operations() as seen, torch.set_grad_enabled(needs_gradient):
        loss, _ = fused_loss(*given, beta, 1.0)
        if needs_gradient:
            loss.backward()
    assert seen.products == products


@pytest.mark.parametrize("beta", BETAS)
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(monkeypatch, beta):
    chunks_of(monkeypatch, 20, 300, 5)
    given = problem(**WIDE)
    with Operations() as seen:
        fused_loss(*given, beta, 1.0)[0].backward()
    # Of both models
    assert seen.largest <= 2 * 20 * 300


def test_the_gradient_is_handed_over_and_not_copied():
    """The head's gradient in float32 is the one that the forward made: it is large, and it exists once."""
    given = problem()
    loss, _ = fused_loss(*given, 1.0, 1.0)
    [made] = [g.data_ptr() for g in loss.grad_fn.gradients if g is not None and g.shape == (V, H)]
    loss.backward()
    assert given.student.weight_VH.grad.data_ptr() == made
