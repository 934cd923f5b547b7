"""Sends a LoRA student's weights to vLLM: each adapted tensor is merged out of place, so the base model never changes.

TRL merges the adapter into the base model for each push and takes it out again. In bfloat16 both round, so the base model drifts, and
with it the teacher that shares it (huggingface/trl#6688).
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from trl_crisp.teacher.sharding import full_tensor, named_parameters, plain_name


def prepare_pushes(generation: Any, model: nn.Module) -> None:
    """
    Make TRL's engine read a LoRA student's weights through [`merged_parameters`], and another student's when its shards are in place.

    Args:
        generation: TRL's `VLLMGeneration`, colocated or of a server.
        model: The student, unwrapped.

    Raises:
        ValueError: See [`check_pushable`].
    """
    if is_peft_model(model):
        check_pushable(model)
        generation._iter_named_params = lambda: merged_parameters(model, generation.accelerator.device)
        return
    read = generation._iter_named_params

    def read_shards() -> Iterator[tuple[str, torch.Tensor]]:
        # Under FSDP2 TRL reads shards only, and an evaluation leaves gathered weights behind
        named_parameters(model)
        yield from read()

    generation._iter_named_params = read_shards


def check_pushable(model: Any) -> None:
    """
    Check that vLLM has a parameter for all that a LoRA adapter changes.

    Args:
        model: A PEFT model with one active LoRA adapter.

    Raises:
        ValueError: If the base model is quantized, if the adapter adds a bias to a layer without one, or if it adapts one of several
            modules that share a weight.
    """
    way_out = "or sample the rollouts by transformers (use_vllm=False)."
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        raise ValueError(
            "the base model is quantized, and vLLM's weights are updated with the adapter merged into them: to quantize the sum again "
            f"would round most of the adapter away. Load the base model without quantization (dtype='bfloat16'), {way_out}"
        )
    adapter = model.active_adapters[0]
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(engine_name(name))
    for name, layer in _adapted_layers(model, adapter):
        base = layer.get_base_layer()
        for parameter_name in _adapted_parameters(layer, adapter):
            parameter = getattr(base, parameter_name, None)
            if parameter is None:
                raise ValueError(
                    f"the LoRA config's lora_bias=True adds a bias to {engine_name(name)}, which has none, so vLLM has no parameter for it. "
                    f"Set lora_bias=False, {way_out}"
                )
            if len(names := names_of[id(parameter)]) > 1:
                raise ValueError(
                    f"the adapter changes one of several modules that share a weight ({', '.join(names)}), and vLLM has one parameter "
                    f"for all of them. Leave the embedding out of target_modules, untie the weights (tie_word_embeddings=False), {way_out}"
                )


def engine_name(name: str) -> str:
    """Return a parameter's name as vLLM expects it: without the prefixes of PEFT, of activation checkpointing and of torch.compile."""
    return plain_name(name).removeprefix("base_model.model.").replace(".base_layer", "")


@torch.no_grad()
def merged_parameters(model: Any, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yield the parameters of a PEFT model with its active adapter merged, one at a time, under the names that vLLM expects.

    PEFT's own merge of the layer runs on float32 copies, and its result is rounded once to the base model's dtype. Neither the base model
    nor an adapter is written. Other adapters, such as the teacher's, are left out. If the parameters are sharded, all processes have to
    consume the iterator, because they gather each parameter together.

    Args:
        model: A PEFT model with one active LoRA adapter, unwrapped; with FSDP2 its parameters are shards.
        device: Where the tensors are wanted, the process's device.

    Raises:
        RuntimeError: If the adapter is merged into the base model already, so that it would be counted twice.
    """
    adapter = model.active_adapters[0]
    adapted: dict[int, list[tuple[Any, str]]] = {}
    for name, layer in _adapted_layers(model, adapter):
        if layer.merged:
            raise RuntimeError(
                f"the adapter is merged into the base model at {engine_name(name)}, so vLLM would count it twice. Call "
                "model.unmerge_adapter()."
            )
    parameters = list(named_parameters(model))
    # After named_parameters, which puts FSDP2's shards back in place of gathered weights
    for _, layer in _adapted_layers(model, adapter):
        for name in _adapted_parameters(layer, adapter):
            adapted.setdefault(id(getattr(layer.get_base_layer(), name)), []).append((layer, name))
    of_adapters = {
        id(parameter)
        for layer in _lora_layers(model)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, parameter in parameters:
        if id(parameter) in of_adapters:
            continue
        whole = _whole(parameter, device)
        if id(parameter) in adapted:
            merged = whole.float()
            # One layer, except if a module and its parameter are adapted both
            for layer, parameter_name in adapted[id(parameter)]:
                merged = _merge(layer, adapter, parameter_name, merged, device)
            whole = merged.to(whole.dtype)
        yield engine_name(name), whole


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            yield name, module


def _adapted_parameters(layer: Any, adapter: str) -> list[str]:
    """Return the names of the base layer's parameters that a merge changes."""
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    return ["weight", "bias"] if layer.lora_bias.get(adapter) else ["weight"]


def _whole(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        # Offloaded shards cannot be gathered by the GPUs' backend
        parameter = parameter.to(device)
    return full_tensor(parameter).to(device)


class _Merge(nn.Module):
    """PEFT's merge as a forward, so that `functional_call` can run it on other tensors than the layer's own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter: str, parameter_name: str) -> torch.Tensor:
        self.layer.merge(adapter_names=[adapter])
        return getattr(self.layer.get_base_layer(), parameter_name).data


def _merge(layer: Any, adapter: str, parameter_name: str, base: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a base layer's parameter with the adapter merged into it, float32."""
    base_layer: Any = layer.get_base_layer()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in layer.named_parameters():
        is_adapters = not name.startswith("base_layer.") and adapter in name.split(".")
        # A merge with lora_bias writes the bias too
        is_written = any(
            parameter is getattr(base_layer, other, None) for other in _adapted_parameters(layer, adapter)
        )
        if parameter is getattr(base_layer, parameter_name):
            copied = base.clone()
        elif is_adapters or is_written:
            copied = _whole(parameter, device).float().clone()
        else:
            continue
        tensors[f"layer.{name}"] = nn.Parameter(copied, requires_grad=False)
    before = layer.merged_adapters
    layer.merged_adapters = []
    try:
        return torch.func.functional_call(_Merge(layer), tensors, (adapter, parameter_name))
    finally:
        layer.merged_adapters = before
