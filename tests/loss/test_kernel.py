"""The fused loss against float64 loops over the vocabulary, and against TRL's kernel: values, gradients, number of products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.loss.problems import (
    BETAS,
    HALVES,
    MASK_BT,
    WIDE,
    B,
    H,
    T,
    V,
    assert_equals,
    chunks_of,
    copied,
    in_float64,
    loop_logits,
    masked_problem,
    padded_loss,
    plain_loss,
    problem,
    truth_of,
)
from tests.oracles import divergence_nats
from trl_crisp.loss import kernel
from trl_crisp.loss.divergence import OutputHead, per_token_divergence


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
    assert_equals(given, padded_loss(given, beta, temperature), truth_of(given, beta, temperature))


@pytest.mark.parametrize("chunk_tokens", [2, 256])
@pytest.mark.parametrize("beta", BETAS)
def test_each_side_has_its_own_scale_and_soft_capping(monkeypatch, beta, chunk_tokens):
    chunks_of(monkeypatch, chunk_tokens)
    given = problem(bias=True, logit_scale=2.0, softcap=1.5)
    given = given._replace(teacher=given.teacher._replace(logit_scale=0.5, softcap=None))
    assert_equals(given, padded_loss(given, beta, 1.0), truth_of(given, beta, 1.0))


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
    loss, _ = padded_loss(given, beta, 1.0)
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_is_no_worse_than_plain_half_precision(monkeypatch, dtype, beta, bias):
    """Against the float64 truth, loss and gradients are at most as far off as those from full logits in half precision."""
    chunks_of(monkeypatch, 64, 300, 5)
    monkeypatch.setattr(kernel, "CONVERTED_ROWS", 77)
    given = problem(dtype, bias=bias, **WIDE)
    wide, plain = copied(given, torch.float64), copied(given)
    losses = [padded_loss(given, beta, 1.3)[0], plain_loss(plain, beta, 1.3), plain_loss(wide, beta, 1.3)]
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
        loss, values = padded_loss(given, beta, 1.0)
    loss.backward()
    rounded = copied(given, dtype)
    rounded = rounded._replace(
        student=rounded.student._replace(bias_V=copied(given).student.bias_V),
        teacher=rounded.teacher._replace(bias_V=given.teacher.bias_V),
    )
    expected, expected_values = padded_loss(rounded, beta, 1.0)
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
    loss, values = padded_loss(given, beta, 1.7)
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
    loss, values = padded_loss(given, beta, 0.9)
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
    loss, values = padded_loss(given, beta, 1.0)
    loss.backward()
    assert loss == 0
    assert all(value.shape == (B, T) and torch.count_nonzero(value) == 0 for value in values)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("dtype", HALVES)
def test_tokens_of_zero_weight_have_values_and_no_gradient(monkeypatch, dtype):
    chunks_of(monkeypatch, 2)
    given = problem(dtype)._replace(weights=torch.zeros(B, T))
    loss, values = padded_loss(given, 1.0, 1.0)
    loss.backward()
    assert loss == 0
    assert ((values.divergence > 0) == (MASK_BT != 0)).all()
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_in_float16_survives_a_loss_scaler(monkeypatch, beta):
    """Weights of a large batch make gradients below float16's smallest number; the scaled backward keeps them."""
    chunks_of(monkeypatch, 2)
    given = problem(torch.float16)
    given = given._replace(weights=given.weights * 1e-9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    loss, _ = padded_loss(given, beta, 1.0)
    scaler.scale(loss).backward()
    truth = truth_of(given, beta, 1.0)
    for gradient, expected in zip(given.gradients, truth.leaves, strict=True):
        assert torch.count_nonzero(expected.grad.half()) == 0, "the test is of gradients that float16 cannot hold"
        expected_scaled = expected.grad * 2.0**24
        torch.testing.assert_close(
            gradient.double(), expected_scaled, rtol=1e-3, atol=1e-3 * expected_scaled.abs().max()
        )


def test_a_factor_on_the_loss_scales_the_gradients(monkeypatch):
    chunks_of(monkeypatch, 2)
    given, other = problem(bias=True), problem(bias=True)
    padded_loss(given, 1.0, 1.0)[0].backward()
    (padded_loss(other, 1.0, 1.0)[0] * 0.125 + 3).backward()
    for gradient, scaled in zip(given.gradients, other.gradients, strict=True):
        assert torch.equal(gradient * 0.125, scaled)


def test_a_second_backward_is_an_error():
    """A gradient of zeros, or a scaled one, would be a wrong number."""
    loss, _ = padded_loss(problem(), 1.0, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        loss.backward()


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
    loss, values = padded_loss(given, beta, temperature)
    for value, expected in zip(values, truth.values, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)
    loss.backward()
    torch.testing.assert_close(given.student_hidden.grad.double(), truth.leaves[0].grad, rtol=1e-4, atol=5e-6)
    for leaf, expected in zip(given.student[:2], truth.leaves[1:], strict=True):
        torch.testing.assert_close(leaf.grad[kept].double(), expected.grad, rtol=1e-4, atol=5e-6)
        assert torch.count_nonzero(leaf.grad[ids]) == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_masks_of_half_precision_carry_nothing(monkeypatch, dtype, beta):
    chunks_of(monkeypatch, 2)
    given = masked_problem(-torch.inf, [2, 7], [2, 7], dtype)
    loss, values = padded_loss(given, beta, 0.7)
    assert all(torch.isfinite(value).all() for value in values[:4])
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in given.gradients)


@pytest.mark.parametrize(("beta", "masked"), [(0.0, "teacher"), (0.3, "teacher"), (0.3, "student"), (1.0, "student")])
def test_a_token_that_one_side_masks_counts_if_the_divergence_is_finite(monkeypatch, beta, masked):
    """Its term is the other side's mass on the mixture, or zero. The reverse KL is infinite if the teacher masks."""
    chunks_of(monkeypatch, 2)
    sides = ([2] if masked == "student" else [], [2] if masked == "teacher" else [])
    given, low = masked_problem(-torch.inf, *sides), masked_problem(-1e4, *sides)
    truth = truth_of(low, beta, 1.0)
    loss, values = padded_loss(given, beta, 1.0)
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
        padded_loss(given, beta, 1.0)


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
def test_products_with_the_vocabulary(monkeypatch, beta, frozen, needs_gradient, products):
    """4 in forward and backward together, 3 with a frozen head, 2 in an evaluation."""
    chunks_of(monkeypatch, 300, 300)
    given = problem(frozen=frozen, **WIDE)
    with Operations() as seen, torch.set_grad_enabled(needs_gradient):
        loss, _ = padded_loss(given, beta, 1.0)
        if needs_gradient:
            loss.backward()
    assert seen.products == products


@pytest.mark.parametrize("beta", BETAS)
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(monkeypatch, beta):
    chunks_of(monkeypatch, 20, 300, 5)
    given = problem(**WIDE)
    with Operations() as seen:
        padded_loss(given, beta, 1.0)[0].backward()
    # Of both models
    assert seen.largest <= 2 * 20 * 300


def test_the_gradient_is_handed_over_and_not_copied():
    """The head's gradient in float32 is the one that the forward made: it is large, and it exists once."""
    given = problem()
    loss, _ = padded_loss(given, 1.0, 1.0)
    [made] = [g.data_ptr() for g in loss.grad_fn.gradients if g is not None and g.shape == (V, H)]
    loss.backward()
    assert given.student.weight_VH.grad.data_ptr() == made
