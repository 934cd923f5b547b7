"""Whether a model's gradients are finite: every value counts, in every dtype, and finding out takes no memory to speak of."""

import pytest
import torch

from trl_crisp.run.nonfinite import gradients_are_finite


def model_with(*gradients: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for i, gradient in enumerate(gradients):
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        model.register_parameter(f"p{i}", parameter)
    # A frozen parameter has none
    model.register_parameter("frozen", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_bad_value_is_found(dtype, bad, place):
    largest = torch.finfo(dtype).max
    fine = torch.full((1001,), largest, dtype=dtype)
    fine[1::2] = -largest
    # The largest values are finite, and so is a part of a parameter that has no values
    assert gradients_are_finite(model_with(fine, torch.zeros(0, 7, dtype=dtype)))
    wrong = fine.clone()
    wrong[place] = bad
    assert not gradients_are_finite(model_with(fine, wrong, fine))


def test_a_model_without_gradients_is_fine():
    assert gradients_are_finite(torch.nn.Linear(2, 2))


def test_it_takes_no_temporary_of_the_gradients_size():
    model = model_with(torch.ones(1024, 1024))
    with torch.profiler.profile(profile_memory=True) as profile:
        assert gradients_are_finite(model)
    taken = [one.nbytes() for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    assert taken
    assert max(taken) < 1024
