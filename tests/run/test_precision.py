"""The share of weights that a step rounds away, against weights that the step was applied to."""

import pytest
import torch

from trl_crisp.run.precision import unchanged_weight_share

LEARNING_RATES = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]


def applied(parameters, learning_rate: float) -> float:
    """Move every weight by the learning rate, away from zero, and count those that are what they were."""
    unchanged = total = 0
    for parameter in parameters:
        exact = parameter.detach().double()
        moved = (exact + torch.where(exact >= 0, learning_rate, -learning_rate)).to(parameter.dtype)
        unchanged += (moved == parameter.detach()).sum().item()
        total += parameter.numel()
    return unchanged / total


def weights(dtype, *shape, std: float = 0.02, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter((torch.randn(*shape, generator=generator) * std).to(dtype))


@pytest.mark.parametrize("learning_rate", LEARNING_RATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_share_is_what_applying_the_step_leaves_unchanged(dtype, learning_rate):
    parameters = [weights(dtype, 64, 60)]  # fewer than are sampled, so that the share is exact
    assert unchanged_weight_share(parameters, learning_rate) == pytest.approx(
        applied(parameters, learning_rate), abs=0.01
    )


def test_the_cases_differ():
    """The test above would pass on a constant if every case were 0 or every case 1."""
    shares = {
        dtype: [applied([weights(dtype, 64, 60)], rate) for rate in LEARNING_RATES]
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert shares[torch.bfloat16][1] > 0.9  # bf16 at the paper's rate
    assert 0.1 < shares[torch.bfloat16][3] < 0.9
    assert shares[torch.bfloat16][5] < 0.01
    assert shares[torch.float32][1] < 0.01


def test_an_adamw_step_in_bf16_leaves_that_share():
    parameter = weights(torch.bfloat16, 64, 60)
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
    parameter.grad = before.sign() * -3.0  # away from zero; its size does not matter to AdamW
    optimizer.step()
    unchanged = (parameter.detach() == before).float().mean().item()
    assert unchanged_weight_share([parameter], 1e-4) == pytest.approx(unchanged, abs=0.01)
    assert 0.1 < unchanged < 0.9


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8191, 100_000])
def test_a_sample_of_a_large_parameter_is_close(size):
    parameters = [weights(torch.bfloat16, size)]
    assert unchanged_weight_share(parameters, 1e-4) == pytest.approx(applied(parameters, 1e-4), abs=0.03)


def test_a_parameter_counts_by_its_number_of_weights():
    """The norms of a model are many vectors of ones and few of its weights."""
    norms = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(4)]
    parameters = [*norms, weights(torch.bfloat16, 1024, 1024)]
    assert applied(norms, 1e-3) == 1.0
    assert applied(parameters, 1e-3) < 0.1
    assert unchanged_weight_share(parameters, 1e-3) == pytest.approx(applied(parameters, 1e-3), abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_zero_always_move(dtype):
    """Such as LoRA's B at its start."""
    zeros = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
    assert applied([zeros], 1e-6) == 0.0
    assert unchanged_weight_share([zeros], 1e-6) == 0.0


def test_dtypes_are_judged_apart():
    parameters = [weights(torch.bfloat16, 4096), weights(torch.float32, 4096)]
    assert unchanged_weight_share(parameters, 1e-6) == pytest.approx(0.5, abs=0.02)


def test_no_weights_have_a_share_of_zero():
    assert unchanged_weight_share([], 1e-6) == 0.0
    assert unchanged_weight_share([torch.nn.Parameter(torch.empty(0))], 1e-6) == 0.0


def test_the_parameters_are_left_alone():
    parameter = weights(torch.bfloat16, 10, 10)
    before = parameter.detach().clone()
    unchanged_weight_share([parameter], 1e-6)
    assert torch.equal(parameter.detach(), before)
    assert parameter.grad is None
