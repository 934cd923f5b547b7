"""What vLLM's build for CPUs needs so that a trainer can update its weights."""

from typing import Any

import torch


def let_weights_be_updated(monkeypatch: Any) -> None:
    """vLLM's build for CPUs packs the weights of linear layers, which then take no update. On a GPU they stay as they are."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(
        utils,
        "dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear),
    )
