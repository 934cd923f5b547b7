"""Per-token divergences against float64 loops over the vocabulary, values and gradients."""

import pytest
import torch
from torch import nn

from tests.oracles import divergence_nats, entropy_nats, topk_overlap
from tests.tiny_models import tiny_model
from trl_crisp.loss.divergence import (
    OutputHead,
    output_head,
    per_token_divergence,
    sampled_topk_overlap,
    topk_overlap_of,
)

B, T, H, V = 2, 4, 5, 11
MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])


def problem(dtype=torch.float32, bias: bool = False, **head):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student_hidden, teacher_hidden = draw(B, T, H).requires_grad_(), draw(B, T, H)
    student = OutputHead(draw(V, H).requires_grad_(), draw(V).requires_grad_() if bias else None, **head)
    teacher = OutputHead(draw(V, H), draw(V) if bias else None, **head)
    return student_hidden, student, teacher_hidden, teacher


def loop_logits(hidden_H, weight_VH, bias_V, scale, softcap):
    logits = []
    for v in range(len(weight_VH)):
        logit = sum(hidden_H[h] * weight_VH[v][h] for h in range(len(hidden_H)))
        logit = (logit + (bias_V[v] if bias_V is not None else 0)) * scale
        logits.append(softcap * torch.tanh(logit / softcap) if softcap else logit)
    return logits


def oracle(problem, beta, temperature):
    leaves = [x.detach().double().requires_grad_() if x is not None else None for x in (problem[0], *problem[1][:2])]
    student_hidden, weight, bias = leaves
    teacher_hidden, teacher = problem[2].double(), problem[3]
    scale, softcap = problem[1].logit_scale, problem[1].softcap
    divergences, entropies = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            if MASK_BT[b, t]:
                q = loop_logits(student_hidden[b, t], weight, bias, scale, softcap)
                teacher_bias = None if teacher.bias_V is None else teacher.bias_V.double()
                p = loop_logits(
                    teacher_hidden[b, t],
                    teacher.weight_VH.double(),
                    teacher_bias,
                    teacher.logit_scale,
                    teacher.softcap,
                )
                divergences[b, t] = divergence_nats(q, p, beta, temperature)
                entropies[b, t] = entropy_nats(q, temperature)
    return divergences, entropies, [leaf for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 0.1])
@pytest.mark.parametrize(
    ("head", "temperature"),
    [
        ({}, 1.0),
        ({}, 2.5),
        ({"bias": True}, 1.0),
        ({"logit_scale": 0.25}, 1.0),
        ({"softcap": 1.5, "logit_scale": 2.0, "bias": True}, 0.7),
    ],
)
def test_divergence_and_gradients_equal_the_oracle(beta, head, temperature):
    """Values and gradients agree to float32 precision, masked positions are zero."""
    given = problem(**head)
    divergence, entropy = per_token_divergence(*given, MASK_BT, beta, temperature)
    expected, expected_entropy, expected_leaves = oracle(given, beta, temperature)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)

    weights = torch.rand(B, T)
    (weights * divergence).sum().backward()
    (weights.double() * expected).sum().backward()
    leaves = [x for x in (given[0], *given[1][:2]) if x is not None]
    for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected_leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slice_tokens", [1, 3, 256])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_each_token_meets_its_own_under_each_sides_own_head(monkeypatch, beta, slice_tokens):
    """Scale and soft-capping are the side's own, and slices on a CPU keep the tokens in their order."""
    monkeypatch.setattr("trl_crisp.loss.divergence.CPU_SLICE_TOKENS", slice_tokens)
    *sides, teacher = problem(bias=True, logit_scale=2.0, softcap=1.5)
    given = (*sides, teacher._replace(logit_scale=0.5, softcap=3.0))
    expected, expected_entropy, _ = oracle(given, beta, 1.0)
    divergence, entropy = per_token_divergence(*given, MASK_BT, beta, 1.0)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bfloat16_is_no_worse_than_plain_bfloat16(beta):
    """Against the float64 truth, the error is at most that of materialised bfloat16 logits."""
    given = problem(torch.bfloat16)
    truth, *_ = oracle(given, beta, 1.0)
    divergence, _ = per_token_divergence(*given, MASK_BT, beta, 1.0)
    q = torch.log_softmax(given[0] @ given[1].weight_VH.T, -1)
    p = torch.log_softmax(given[2] @ given[3].weight_VH.T, -1)
    m = torch.logsumexp(
        torch.stack([q.float() + torch.tensor(1 - beta).log(), p.float() + torch.tensor(beta).log()]), 0
    )
    plain = {
        0.0: p.exp() * (p - q),
        1.0: q.exp() * (q - p),
        0.5: 0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m),
    }[beta].sum(-1)
    mask = MASK_BT != 0
    error = (divergence.double() - truth)[mask].abs().max()
    plain_error = (plain.double() - truth)[mask].abs().max()
    assert error <= plain_error + 1e-6, (error, plain_error)


def test_a_fully_masked_micro_batch_gives_zero_gradients():
    """No token in the loss: zero, and connected to the parameters, so that backward works."""
    given = problem()
    divergence, entropy = per_token_divergence(*given, torch.zeros(B, T), 1.0, 1.0)
    assert divergence.sum() == 0
    assert entropy.sum() == 0
    divergence.sum().backward()
    assert torch.count_nonzero(given[0].grad) == 0
    assert torch.count_nonzero(given[1].weight_VH.grad) == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_sides_give_zero_loss_and_zero_gradient(beta):
    """An identity of any divergence."""
    student_hidden, student, _, _ = problem()
    same = OutputHead(student.weight_VH.detach())
    divergence, _ = per_token_divergence(student_hidden, student, student_hidden.detach(), same, MASK_BT, beta, 1.0)
    divergence.sum().backward()
    torch.testing.assert_close(divergence, torch.zeros(B, T), atol=1e-6, rtol=0)
    torch.testing.assert_close(student_hidden.grad, torch.zeros(B, T, H), atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [9, 16, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_overlap_equals_the_oracle(vocabulary, temperature):
    """Models that are near, that are far and that are equal; a vocabulary below 16 is common as a whole."""
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(6, vocabulary, generator=generator)
    noise = 3 * torch.randn(6, vocabulary, generator=generator)
    teacher = student + noise * torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 9.0])[:, None]
    expected = [
        topk_overlap(q.double().tolist(), p.double().tolist(), 16, temperature)
        for q, p in zip(student, teacher, strict=True)
    ]
    assert topk_overlap_of(student, teacher, temperature).tolist() == pytest.approx(expected, rel=1e-5)
    if vocabulary <= 16:
        assert expected == pytest.approx([1.0] * 6)
    else:
        assert len({round(value, 6) for value in expected}) == 6


def test_models_without_a_common_top_token_have_no_overlap():
    student = torch.cat([torch.ones(1, 16), torch.zeros(1, 16)], dim=1)
    assert topk_overlap_of(student, student.flip(1), 1.0).tolist() == [0.0]


@pytest.mark.parametrize(("limit", "picked"), [(32, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (3, [0, 2, 3]), (2, [0, 3])])
def test_the_sampled_overlap_meets_each_side_under_its_own_head(monkeypatch, limit, picked):
    """With bias, scale and soft-capping of each; of the tokens in the loss, evenly spaced, first and last among them."""
    monkeypatch.setattr("trl_crisp.loss.divergence.OVERLAP_TOKENS", limit)
    monkeypatch.setattr("trl_crisp.loss.divergence.OVERLAP_TOP_K", 4)
    *sides, teacher = problem(bias=True, logit_scale=2.0, softcap=1.5)
    given = (*sides, teacher._replace(logit_scale=0.5, softcap=3.0))
    expected = [
        topk_overlap(
            [float(x) for x in loop_logits(given[0][b, t].double(), *given[1])],
            [float(x) for x in loop_logits(given[2][b, t].double(), *given[3])],
            4,
            0.7,
        )
        for b in range(B)
        for t in range(T)
        if MASK_BT[b, t]
    ]
    in_loss = MASK_BT != 0
    overlap = sampled_topk_overlap(given[0][in_loss], given[1], given[2][in_loss], given[3], 0.7)
    assert overlap.num_tokens == len(picked)
    assert overlap.total.item() == pytest.approx(sum(expected[i] for i in picked), rel=1e-5)
    assert not overlap.total.requires_grad


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_output_head_gives_the_models_own_logits(kind):
    """Head, logit scale and soft-capping together are what the model's forward does."""
    model = tiny_model(kind)
    ids = torch.arange(7)[None]
    head = output_head(model, torch.float32)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        logits = torch.stack([torch.stack(loop_logits(h, *head)) for h in hidden])
        torch.testing.assert_close(logits, model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logit_scale": None}, 1.0),
        ({"output_multiplier": 3.0}, 3.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0}, 1 / 8),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale_is_read_under_each_familys_name(fields, scale):
    """Cohere, Muse Glimmer, Falcon-H1, Granite, HyperCLOVA X."""
    model = tiny_model("llama")
    for name, value in fields.items():
        setattr(model.config, name, value)
    assert output_head(model, torch.float32).logit_scale == scale


def test_a_head_without_bias_attribute_is_read():
    """Some heads are no nn.Linear."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))

    model = tiny_model("llama")
    model.set_output_embeddings(Head())
    assert output_head(model, torch.float32).bias_V is None


def masked_problem(mask_value: float, student_ids: list[int], teacher_ids: list[int], **head):
    """As `problem`, with a head's bias that masks tokens on each side."""
    given = problem(bias=True, **head)
    for side, ids in ((given[1], student_ids), (given[3], teacher_ids)):
        side.bias_V.data[ids] = mask_value
    return given


def oracle_without(ids: list[int], given, beta, temperature):
    """The oracle on the vocabulary without the masked tokens."""
    kept = [v for v in range(V) if v not in ids]
    student, teacher = (
        side._replace(weight_VH=side.weight_VH[kept], bias_V=side.bias_V[kept]) for side in given[1::2]
    )
    return oracle((given[0], student, given[2], teacher), beta, temperature), kept


@pytest.mark.parametrize("mask_value", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("slice_tokens", [256, 1])
def test_masked_tokens_carry_no_divergence(monkeypatch, beta, temperature, mask_value, slice_tokens):
    """Values, the student's entropy and gradients are those of the vocabulary without them; theirs are zero."""
    monkeypatch.setattr("trl_crisp.loss.divergence.CPU_SLICE_TOKENS", slice_tokens)
    ids = [2, 7]
    given = masked_problem(mask_value, ids, ids)
    (expected, expected_entropy, leaves), kept = oracle_without(ids, given, beta, temperature)
    divergence, entropy = per_token_divergence(*given, MASK_BT, beta, temperature)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)
    divergence.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(given[0].grad.double(), leaves[0].grad, rtol=1e-4, atol=1e-5)
    for leaf, expected_leaf in zip(given[1][:2], leaves[1:], strict=True):
        torch.testing.assert_close(leaf.grad[kept].double(), expected_leaf.grad, rtol=1e-4, atol=1e-5)
        assert torch.count_nonzero(leaf.grad[ids]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_half_precision_carry_no_divergence(dtype):
    """The lowest number of float16 is no lower than -65504."""
    ids = [2, 7]
    hidden, student, teacher_hidden, teacher = problem(dtype, bias=True)
    for side in (student, teacher):
        side.bias_V.data[ids] = -torch.inf
    for beta in (0.0, 0.5, 1.0):
        divergence, entropy = per_token_divergence(hidden, student, teacher_hidden, teacher, MASK_BT, beta, 0.7)
        assert torch.isfinite(divergence).all()
        assert torch.isfinite(entropy).all()
        assert (divergence[MASK_BT != 0] > 0).all()
        divergence.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (hidden, *student[:2]))


@pytest.mark.parametrize(("beta", "masked"), [(0.0, "teacher"), (0.5, "teacher"), (0.5, "student"), (1.0, "student")])
def test_a_token_that_one_side_masks_counts_if_the_divergence_is_finite(beta, masked):
    """Its term is the other side's mass on the mixture, or zero; by the oracle with a very low logit."""
    given = masked_problem(-torch.inf, [2] if masked == "student" else [], [2] if masked == "teacher" else [])
    low = masked_problem(-1e4, [2] if masked == "student" else [], [2] if masked == "teacher" else [])
    expected, _, leaves = oracle(low, beta, 1.0)
    divergence, _ = per_token_divergence(*given, MASK_BT, beta, 1.0)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    divergence.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(given[0].grad.double(), leaves[0].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("beta", "masked", "other"), [(0.0, "student", "teacher"), (1.0, "teacher", "student")])
def test_an_infinite_divergence_is_an_error(beta, masked, other):
    """The one side gives no probability to what the other can say."""
    given = masked_problem(-torch.inf, [2] if masked == "student" else [], [2] if masked == "teacher" else [])
    with pytest.raises(ValueError, match=f"infinite: the bias of the {masked}'s .* id 2, that the {other}"):
        per_token_divergence(*given, MASK_BT, beta, 1.0)


@pytest.mark.parametrize(("beta", "giver", "masker"), [(1.0, 1, 3), (0.0, 3, 1)])
def test_a_token_that_both_sides_mask_by_different_values_carries_no_divergence(beta, giver, masker):
    """Such as -1e4 in one head and -inf in the other: neither can give the token."""
    given = problem(bias=True)
    given[giver].bias_V.data[2], given[masker].bias_V.data[2] = -1e4, -torch.inf
    (expected, *_), _ = oracle_without([2], given, beta, 1.0)
    divergence, _ = per_token_divergence(*given, MASK_BT, beta, 1.0)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)


def test_soft_capping_lifts_a_mask():
    """A capped logit is no lower than -softcap, so the token has a probability."""
    given = masked_problem(-torch.inf, [2], [2], softcap=2.0)
    low = masked_problem(-1e9, [2], [2], softcap=2.0)
    expected, expected_entropy, _ = oracle(low, 1.0, 1.0)
    divergence, entropy = per_token_divergence(*given, MASK_BT, 1.0, 1.0)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)
