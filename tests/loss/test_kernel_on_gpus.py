"""
What the fused loss does on a GPU, run on a CPU: Triton's kernel in its interpreter, and half-precision products by float32 ones.

tests/__init__.py turns the interpreter on. Without Triton its tests are skipped.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.loss.problems import (
    BETAS,
    HALVES,
    MASK_BT,
    WIDE,
    B,
    T,
    assert_equals,
    chunks_of,
    copied,
    masked_problem,
    padded_loss,
    plain_loss,
    problem,
    truth_of,
)
from trl_crisp.loss import kernel, kernel_torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# Triton's interpreter computes by numpy, which warns of exp(1e30) = inf
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
FOLDS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.fixture
def fold(request, monkeypatch):
    """The elementwise pass that the loss uses, with blocks that are smaller than the vocabulary."""
    if request.param == "triton":
        from trl_crisp.loss import kernel_triton

        monkeypatch.setattr(kernel_triton, "_BLOCK_LOGITS", 8)
        monkeypatch.setattr(kernel, "fold_for", lambda device: kernel_triton.fold)
    return request.param


@pytest.fixture
def half_products(monkeypatch):
    """Products of half-precision tensors into float32, as of cuBLAS. Returns the number of rows of each product's left side."""
    rows = []

    def multiply(a, b, out):
        assert a.dtype == b.dtype
        assert a.dtype in HALVES
        rows.append(len(a))
        # In float64, because the rows of a float32 product on a CPU can differ in the last bit although their inputs are equal
        out.copy_(a.double() @ b.double())

    def add_product(total, a, b):
        assert a.dtype == b.dtype
        assert a.dtype in HALVES
        assert total.dtype == torch.float32
        rows.append(len(a))
        total.addmm_(a.float(), b.float())

    monkeypatch.setattr(kernel, "_multiplies_halves", lambda device_type: True)
    monkeypatch.setattr(kernel, "_multiply", multiply)
    monkeypatch.setattr(kernel, "_add_product", add_product)
    return rows


@needs_triton
@pytest.mark.parametrize("fold", ["triton"], indirect=True)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("head", "temperature"),
    [
        ({}, 1.0),
        ({"frozen": True}, 2.5),
        ({"bias": True, "logit_scale": 0.25}, 1.0),
        ({"softcap": 1.5, "logit_scale": 2.0, "bias": True}, 0.7),
    ],
)
def test_values_and_gradients_equal_the_oracle(monkeypatch, fold, beta, head, temperature):
    chunks_of(monkeypatch, 4)
    given = problem(**head)
    assert_equals(given, padded_loss(given, beta, temperature), truth_of(given, beta, temperature))


@needs_triton
@pytest.mark.parametrize("fold", ["triton"], indirect=True)
@pytest.mark.parametrize("beta", BETAS)
def test_each_side_has_its_own_scale_and_soft_capping(monkeypatch, fold, beta):
    chunks_of(monkeypatch, 2)
    given = problem(bias=True, logit_scale=2.0, softcap=1.5)
    given = given._replace(teacher=given.teacher._replace(logit_scale=0.5, softcap=None))
    assert_equals(given, padded_loss(given, beta, 1.0), truth_of(given, beta, 1.0))


@needs_triton
@pytest.mark.parametrize("fold", ["triton"], indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("beta", BETAS)
def test_masked_tokens_carry_nothing(monkeypatch, fold, beta, temperature):
    """The plain pass has more cases of it; here the two passes are compared, with a first block that is nearly all masked."""
    chunks_of(monkeypatch, 2)
    ids = [0, 1, 2, 3, 4, 6, 7, 10]
    given, other = (masked_problem(-torch.inf, ids, ids) for _ in range(2))
    given, other = (p._replace(token_ids=torch.full((B, T), 9)) for p in (given, other))
    loss, values = padded_loss(given, beta, temperature)
    loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "fold_for", lambda device: kernel_torch.fold)
        expected, expected_values = padded_loss(other, beta, temperature)
    expected.backward()
    for value, expected_value in zip(values, expected_values, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=2e-6)
    for gradient, expected_gradient in zip(given.gradients, other.gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("fold", FOLDS, indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head"), [(torch.bfloat16, {}), (torch.float16, {"bias": True, "softcap": 2.0, "logit_scale": 0.7})]
)
@pytest.mark.parametrize("beta", [*BETAS, 0.999])
def test_equal_models_give_exactly_zero(monkeypatch, half_products, fold, beta, head, dtype):
    chunks_of(monkeypatch, 3)
    given = problem(dtype, **head)
    given = given._replace(teacher_hidden=given.student_hidden.detach(), teacher=given.student)
    loss, values = padded_loss(given, beta, 0.9)
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(values.divergence) == torch.count_nonzero(values.reverse_kl) == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("fold", FOLDS, indirect=True)
@pytest.mark.parametrize(("frozen", "shared"), [(False, True), (True, False)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_equals_the_oracle(monkeypatch, half_products, fold, beta, dtype, frozen, shared):
    """All that a head may have, in several chunks. Only the gradient with respect to the logits is rounded."""
    chunks_of(monkeypatch, 2)
    given = problem(dtype, bias=True, frozen=frozen, softcap=2.0, logit_scale=0.7)
    if shared:
        given = given._replace(teacher=given.teacher._replace(weight_VH=given.student.weight_VH))
    truth = truth_of(given, beta, 0.9)
    loss, values = padded_loss(given, beta, 0.9)
    loss.backward()
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=2e-6)
    for name, value, expected in zip(values._fields, values, truth.values, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert len(given.leaves) == (1 if frozen else 3)
    for gradient, expected in zip(given.gradients, truth.leaves, strict=False):
        error = (gradient.double() - expected.grad).norm() / expected.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fold", FOLDS, indirect=True)
@pytest.mark.parametrize(("autocast", "bias"), [(False, True), (True, False)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_is_no_worse_than_plain_half_precision(
    monkeypatch, half_products, fold, dtype, beta, bias, autocast
):
    """Against the float64 truth, with inputs in half precision and with inputs that autocast rounds to it."""
    shape = {"shape": (2, 8, 16, 30), "mask": (torch.arange(16).view(2, 8) % 7 != 0).long()}
    chunks_of(monkeypatch, 5, 30)
    given = problem(dtype, bias=bias, **shape)
    wide, plain = copied(given, torch.float64), copied(given)
    if autocast:
        given = copied(given, torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss, _ = padded_loss(given, beta, 1.3)
    losses = [loss, plain_loss(plain, beta, 1.3), plain_loss(wide, beta, 1.3)]
    for one in losses:
        one.backward()
    ours, theirs, truth = losses
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-5 * truth
    for mine, other, expected in zip(given.gradients, plain.gradients, wide.gradients, strict=True):
        errors = [(gradient.double() - expected).norm() for gradient in (mine, other)]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("fold", FOLDS, indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", BETAS)
def test_small_weights_cost_no_precision(monkeypatch, half_products, fold, dtype, beta):
    """The gradient with respect to the logits is in half precision, but the weights of a large batch are not in it."""
    chunks_of(monkeypatch, 2)
    given, small = problem(dtype, bias=True), problem(dtype, bias=True)
    small = small._replace(weights=small.weights * 2.0**-40)
    padded_loss(given, beta, 1.0)[0].backward()
    (padded_loss(small, beta, 1.0)[0] * 2.0**40).backward()
    for gradient, expected in zip(small.gradients, given.gradients, strict=True):
        assert torch.count_nonzero(expected) > 0
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("fold", FOLDS, indirect=True)
@pytest.mark.parametrize("mask", [torch.zeros(B, T), MASK_BT], ids=["no tokens", "weights of zero"])
def test_nothing_to_learn_gives_zero(half_products, fold, mask):
    given = problem(torch.bfloat16, mask=mask)._replace(weights=torch.zeros(B, T))
    loss, _ = padded_loss(given, 1.0, 1.0)
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in given.gradients)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shared_head_projects_both_models_at_once(monkeypatch, half_products, shared, frozen, dtype):
    """Also one that autocast has to convert."""
    chunks_of(monkeypatch, 300, 300)
    given = problem(dtype, frozen=frozen, **WIDE)
    if shared:
        given = given._replace(teacher=given.student._replace(bias_V=None))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss, _ = padded_loss(given, 1.0, 1.0)
    loss.backward()
    tokens, vocabulary = int(given.mask.sum()), WIDE["shape"][3]
    projections = [2 * tokens] if shared else [tokens, tokens]
    assert half_products == [*projections, tokens, *([] if frozen else [vocabulary])]


@needs_triton
def test_the_triton_kernel_compiles_for_a_gpu(tmp_path):
    """Triton compiles for an H100 without one; the interpreter does not check types."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_crisp.loss.kernel_triton import _fold_kernel

pointers = {name: "*fp32" for name in ("student_ptr", "teacher_ptr", "factors_ptr", "values_ptr")}
pointers |= {"token_ids_ptr": "*i64", "gradient_ptr": "*bf16"}
counts = ("student_stride", "teacher_stride", "gradient_stride", "num_tokens", "vocab_size")
for mode in (1, 2):
    constants = {"MODE": mode, "STUDENT_HAS_SOFTCAP": True, "TEACHER_HAS_SOFTCAP": False, "HAS_GRADIENT": True,
                 "HAS_FACTORS": True, "LARGEST_LOG_RATIO": 80.0, "BLOCK": 4096}
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32" if n in counts else "fp32") for n in _fold_kernel.arg_names}
    source = ASTSource(_fold_kernel, types, {(_fold_kernel.arg_names.index(n),): v for n, v in constants.items()})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(size) > 1000 for size in done.stdout.split())
    assert len(done.stdout.split()) == 2
