"""
Computes the seconds of a training step on one GPU from a model's shape. Nothing is measured: nobody has run these models with this package.

Training half: the FLOPs of [`~trl_crisp.run.flops.step_flops`] with those that gradient checkpointing computes again, and of the attention
scores, at `SHARE_OF_PEAK` of the GPU's peak. The optimizer's step, communication and padding are left out.

Sampling: each new token of the rollouts reads all weights that a token is multiplied with once, in bfloat16, and the keys and values of all
rollouts so far, at the GPU's full bandwidth. So it is a lower bound, of an engine that samples all rollouts of the step at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from trl_crisp.run.flops import count_matrix_weights, step_flops

# Our assumption: nobody has measured this package on a GPU
SHARE_OF_PEAK = 0.4
_BFLOAT16_BYTES = 2
# Passes over the attention scores: the teacher's, the student's forward, the one that is computed again, and two in the backward
_ATTENTION_PASSES = 5


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak of dense bfloat16 products, and its memory's bandwidth, both from NVIDIA's data sheet."""

    name: str
    flops_per_s: float
    bytes_per_s: float


H100 = Gpu("H100 SXM", 989e12, 3.35e12)
A100 = Gpu("A100 80GB SXM", 312e12, 2.039e12)


@dataclass(frozen=True)
class StepTime:
    """
    Seconds of a step's two halves.

    Attributes:
        flops: Of the training half.
        training_s: At `SHARE_OF_PEAK`.
        sampling_s: At least.
    """

    flops: float
    training_s: float
    sampling_s: float

    @property
    def step_s(self) -> float:
        return self.training_s + self.sampling_s


def estimate_step_time(
    config: PretrainedConfig,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    lora: bool,
    rollouts: int = 32,
    gpu: Gpu = H100,
) -> StepTime:
    """
    Estimate a step with gradient checkpointing, all of whose prompts and rollouts have the full length.

    Args:
        config: Of a causal language model with full attention in each layer.
        prompt_tokens: Of the student's prompt, and of the teacher's, which is a few tokens longer.
        completion_tokens: Of each rollout.
        lora: Whether an adapter is trained instead of the weights.
        rollouts: Of the step. The default is the paper's batch.
        gpu: What computes.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    weights = count_matrix_weights(model)
    row_tokens = prompt_tokens + completion_tokens
    tokens = rollouts * row_tokens
    loss_tokens = rollouts * completion_tokens
    flops = step_flops(weights, tokens, tokens, loss_tokens, has_frozen_weights=lora, recomputes=True)
    # Two products of a multiplication and an addition with each earlier token, half of the row on average
    query_width = config.num_attention_heads * config.head_dim
    scores = _ATTENTION_PASSES * config.num_hidden_layers * tokens * (row_tokens / 2) * query_width * 4
    all_flops = flops.needed + flops.recomputed + scores
    cached_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * _BFLOAT16_BYTES
    mean_cached_tokens = prompt_tokens + (completion_tokens - 1) / 2
    read_bytes = (weights.body + weights.head) * _BFLOAT16_BYTES + rollouts * mean_cached_tokens * cached_bytes
    return StepTime(
        flops=all_flops,
        training_s=all_flops / (SHARE_OF_PEAK * gpu.flops_per_s),
        sampling_s=completion_tokens * read_bytes / gpu.bytes_per_s,
    )
