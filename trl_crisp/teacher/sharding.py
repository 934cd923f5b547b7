"""All that knows of ZeRO's and FSDP2's shards: gathering, placing and copying."""

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
    """Return a copy of a module that ZeRO-3 partitioned while loading, which cannot be deep-copied: its tensors are empty."""
    import deepspeed

    # The draw of its first values must not move the random stream of the rollouts
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        # transformers' own way in, which keeps tied weights tied and the rotary frequencies float32
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
    """Return whole values as FSDP2 shards the target, or as they are if it does not."""
    if not isinstance(target, DTensor) or isinstance(values, DTensor):
        return values
    # Every process has all the values, so that none has to be sent
    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return a model's parameters by name, as shards under FSDP2."""
    # FSDP2 keeps what a forward gathered until a backward frees it, and no backward follows an evaluation
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrappers of activation checkpointing and torch.compile."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def gathered(*parameters: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context in which ZeRO-3's partitioned parameters are whole; what is written into them is kept."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter's whole values. If they are sharded all processes have to call it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        with gathered(tensor):
            return tensor.detach().clone()
    return tensor.detach()


def check_backend(accelerator: Accelerator) -> None:
    """Raise `ValueError` for a backend under which a copied teacher cannot be refreshed."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "a teacher cannot be refreshed under FSDP version 1, which flattens the parameters. Set fsdp_version: 2 in "
            "the accelerate config (examples/accelerate/fsdp2.yaml), or use DeepSpeed."
        )


def place(model: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, nn.Module]:
    """
    Place a frozen copy on the device, sharded as the student will be.

    Returns:
        The module, and what the backend wrapped it in.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return model, prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        # Layer by layer, and from the first process's weights if only that one loaded them (fsdp_cpu_ram_efficient_loading)
        sharded = fsdp2_prepare_model(accelerator, model)
        # No backward follows the teacher's forward, which would free the head's gathered weights
        sharded.set_reshard_after_forward(True)
        return sharded, sharded
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    return model, model
