"""How many FLOPs a training step needs, and how many a device can do at most."""

import copy
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# FLOPs per weight and token: a product in the forward pass, one in the backward pass to the inputs, one to the weights
_FORWARD, _TO_INPUTS, _TO_WEIGHTS = 2, 2, 2
# Our choice: large enough that the rate no longer grows on an H100, and that it takes a second or two on a CPU
_ACCELERATOR_SIZE, _CPU_SIZE = 8192, 1024
_REPEATS = 10
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MatrixWeights:
    """
    The weights that a token is multiplied with. Embeddings are looked up, and vectors (norms, biases) do not count.

    Attributes:
        body: In the layers; of a mixture of experts, in the experts that a token is routed to.
        head: In the output head.
    """

    body: int
    head: int


def count_matrix_weights(model: nn.Module) -> MatrixWeights:
    """
    Count the weights of a model's config, so that shards, quantization and adapters do not matter.

    Args:
        model: A causal language model of transformers.

    Raises:
        ValueError: If the model has experts, and its config does not say how many a token is routed to.
    """
    config: Any = copy.deepcopy(model.config)
    with torch.device("meta"):
        whole: Any = type(model)(config)
    head = whole.get_output_embeddings()
    experts = next(
        (count for name in _EXPERT_COUNTS if (count := getattr(config.get_text_config(), name, None))), None
    )
    routed = getattr(config.get_text_config(), "num_experts_per_tok", None)
    body = 0.0
    for name, module in whole.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        for own_name, parameter in module.named_parameters(recurse=False):
            # The biases of experts are stacked
            if parameter.ndim < 2 or own_name.endswith("bias"):
                continue
            is_stack = experts is not None and parameter.ndim == 3 and len(parameter) == experts
            if not is_stack and not re.search(r"\.experts\.", f".{name}.{own_name}."):
                body += parameter.numel()
            elif experts and routed:
                body += parameter.numel() * routed / experts
            else:
                raise ValueError(
                    f"the model has experts ({name}), and its {type(config).__name__} does not say how many a token is routed to "
                    f"(num_experts_per_tok, of {' or '.join(_EXPERT_COUNTS)})."
                )
    return MatrixWeights(round(body), head.weight.numel())


@dataclass(frozen=True)
class StepFlops:
    """
    FLOPs of a step's training half. The attention scores, which grow with the square of the length, are left out.

    Attributes:
        needed: Of the student's forward and backward pass and of the teacher's forward pass.
        recomputed: Of the forward pass that gradient checkpointing repeats.
    """

    needed: float
    recomputed: float


def step_flops(
    weights: MatrixWeights,
    student_tokens: int,
    teacher_tokens: int,
    loss_tokens: int,
    has_frozen_weights: bool,
    recomputes: bool,
) -> StepFlops:
    """
    Count the FLOPs of training on some rollouts.

    A token costs, for P weights, 6P in the student that is trained as a whole, 4P in a student whose weights are frozen under an
    adapter (whose own FLOPs are left out), and 2P in the teacher.

    Args:
        weights: See [`count_matrix_weights`].
        student_tokens, teacher_tokens: Tokens that each model reads, prompts included.
        loss_tokens: Those whose distribution is computed, which alone pass the head.
        has_frozen_weights: Whether an adapter is trained instead of the weights.
        recomputes: Whether the student's layers are computed again in the backward pass.
    """
    student = _FORWARD + _TO_INPUTS + (0 if has_frozen_weights else _TO_WEIGHTS)
    needed = weights.body * (student * student_tokens + _FORWARD * teacher_tokens)
    needed += weights.head * (student + _FORWARD) * loss_tokens
    return StepFlops(needed, _FORWARD * weights.body * student_tokens if recomputes else 0.0)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_limit(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """
    Return the FLOPs per second of a square matrix product, the best of ten, after one for warming up.

    Args:
        device: Where.
        dtype: Of the matrices.
        size: Rows and columns. If `None`, 8,192 on an accelerator and 1,024 on a CPU.
    """
    if size is None:
        size = _CPU_SIZE if device.type == "cpu" else _ACCELERATOR_SIZE
    # A generator of its own, so that the rollouts' random stream goes on; zeros would draw less power than real values
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best_s = float("inf")
    for repeat in range(1 + _REPEATS):
        synchronize(device)
        started_s = time.perf_counter()
        left @ right
        synchronize(device)
        if repeat:
            best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * size**3 / best_s
