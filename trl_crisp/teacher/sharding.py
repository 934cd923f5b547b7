"""How to gather, place and copy parameters that ZeRO-3 or FSDP2 shards. No other teacher module handles shards."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from trl_crisp._upstream import prepare_deepspeed


def zero3_copy(student: nn.Module) -> nn.Module:
    """Return a copy of a module that ZeRO-3 partitioned while loading. copy.deepcopy cannot do this: the tensors are empty."""
    import deepspeed

    # Drawing the initial values must not advance the rollouts' random stream
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        # transformers' _from_config keeps tied weights tied and the rotary frequencies in float32
        teacher = type(student)._from_config(copy.deepcopy(student.config), dtype=student.dtype)  # type: ignore[attr-defined]
    pairs = zip(student.named_parameters(), teacher.named_parameters(), strict=True)
    for (source_name, source), (target_name, target) in pairs:
        assert source_name == target_name, (source_name, target_name)
        with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0), torch.no_grad():
            target.copy_(source)
    for (_, source_buffer), (_, target_buffer) in zip(student.named_buffers(), teacher.named_buffers(), strict=True):
        target_buffer.data = source_buffer.detach().clone()
    return teacher


def is_partitioned(model: nn.Module) -> bool:
    """Return whether ZeRO-3 has partitioned a model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def sharded_like(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return unsharded values with the target's FSDP2 sharding, or unchanged if the target is not sharded."""
    if not isinstance(target, DTensor) or isinstance(values, DTensor):
        return values
    # Every process has all values, so nothing is sent (src_data_rank=None)
    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return a model's parameters by name; under FSDP2 as shards."""
    # FSDP2 keeps the weights that a forward gathered until a backward frees them, and no backward follows an evaluation
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrappers of activation checkpointing and torch.compile."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def gathered(*parameters: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context in which ZeRO-3's partitioned parameters are whole; values written into them are kept."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter's unsharded values. If the parameter is sharded, all processes have to call this."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        with gathered(tensor):
            return tensor.detach().clone()
    return tensor.detach()


def check_backend(accelerator: Accelerator) -> None:
    """Raise `ValueError` for a backend that is not supported, whatever the teacher: FSDP version 1."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 is not supported: it flattens the parameters, so no teacher can take the student's. Set fsdp_version: 2 in "
            "the accelerate config (examples/accelerate/fsdp2.yaml), or use DeepSpeed."
        )


def check_offload(accelerator: Accelerator) -> None:
    """Raise `ValueError` for a backend that decides itself where the teacher's weights are."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        backend, setting = "DeepSpeed", "offload_param_device: cpu (ZeRO-3)"
    elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
        backend, setting = "FSDP", "fsdp_offload_params: true"
    else:
        return
    raise ValueError(
        f"teacher_offload=True: {backend} places the teacher's weights itself. Leave teacher_offload out, and set {setting} in the "
        "accelerate config, which holds for the teacher too."
    )


def place(model: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, nn.Module]:
    """
    Place a frozen copy on the device, with the sharding that the student will have.

    Returns:
        The module, and its wrapper by the distributed backend.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return model, prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        # This shards layer by layer. If only the first process loaded weights (fsdp_cpu_ram_efficient_loading), it sends them
        sharded = fsdp2_prepare_model(accelerator, model)
        # Without this the head's gathered weights would stay: a backward frees them, and the teacher has no backward
        sharded.set_reshard_after_forward(True)
        return sharded, sharded
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    return model, model
